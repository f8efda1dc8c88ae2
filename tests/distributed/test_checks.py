from __future__ import annotations

import ctypes
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from hymba_tune.config import DistillCaptureConfig, LaunchOptions, SFTConfig
from hymba_tune.distributed import checks, devices
from hymba_tune.distributed.checks import accumulation, count_processes, processes_here
from hymba_tune.errors import ConfigError


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the number of GPUs."""

    def set_count(count: int) -> None:
        monkeypatch.setattr(checks, "count_gpus", lambda: count)
        monkeypatch.setattr(checks, "count_cores", lambda: 4)

    return set_count


def test_auto_is_the_number_of_gpus_or_one(gpus: Any) -> None:
    gpus(3)
    assert processes_here("auto", "auto") == 3
    assert processes_here("auto", "cpu") == 1
    gpus(0)
    assert processes_here("auto", "auto") == 1


def test_more_processes_than_devices_are_refused(gpus: Any) -> None:
    gpus(2)
    assert processes_here("2", "cuda") == 2
    with pytest.raises(ConfigError, match=r"--nproc 3: this machine has 2 GPUs\.\n .*at most 2\n"):
        processes_here("3", "cuda")
    gpus(0)
    assert processes_here("4", "auto") == 4
    with pytest.raises(ConfigError, match=r"--nproc 5: this machine has no GPU, and 4 CPU cores\."):
        processes_here("5", "auto")


@pytest.mark.parametrize(
    ("visible", "present", "count"),
    [
        (None, 4, 4),
        ("", 4, 0),
        ("-1", 4, 0),
        ("0,2", 4, 2),
        ("0,7,1", 4, 1),
        ("GPU-1a, GPU-2b", 4, 2),
        ("MIG-1a", 0, 1),
        ("0", 0, 0),
    ],
)
def test_visible_gpus_are_counted(
    visible: str | None, present: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    def count_of(pointer: Any) -> int:
        ctypes.cast(pointer, ctypes.POINTER(ctypes.c_uint))[0] = present
        return 0

    driver = SimpleNamespace(nvmlInit_v2=lambda: 0, nvmlDeviceGetCount_v2=count_of, nvmlShutdown=lambda: 0)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: driver)
    assert devices.count_gpus() == count


def test_without_a_driver_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(devices, "NVML", "no-such-library.so")
    assert devices.count_gpus() == 0
    assert devices.count_cores() >= 1


def test_one_gpu_is_not_for_several_processes(gpus: Any) -> None:
    gpus(4)
    with pytest.raises(ConfigError, match=r"--device cuda:1 is one GPU, and 2 processes need one each\."):
        count_processes(SFTConfig(nproc="2"), "cuda:1", "sft")


def test_a_started_process_believes_its_launcher(gpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(1)
    for name, value in {"WORLD_SIZE": "8", "RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert count_processes(SFTConfig(nproc="2"), "auto", "sft") == 8
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE is 8, and MASTER_ADDR is not set\."):
        count_processes(SFTConfig(), "auto", "sft")
    monkeypatch.setenv("WORLD_SIZE", "all")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE is 'all'\.\n .*the number of processes"):
        count_processes(SFTConfig(), "auto", "sft")


def test_mpi_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="hymba-tune dpo runs in a single process"):
        count_processes(SFTConfig(), "cpu", "dpo")


def test_zero_needs_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SFTConfig(strategy="zero3")

    def version(name: str, found: str = "0.19.8+cpu") -> str:
        assert name == "deepspeed"
        return found

    monkeypatch.setattr(metadata, "version", version)
    assert count_processes(settings, "cpu", "sft") == 1
    monkeypatch.setattr(metadata, "version", lambda name: version(name, "0.9.12"))
    with pytest.raises(ConfigError, match=r"zero3 needs DeepSpeed 0\.19\.8 or newer, and 0\.9\.12 is installed\."):
        count_processes(settings, "cpu", "sft")

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(ConfigError, match="--strategy zero3 needs DeepSpeed, which is not installed"):
        count_processes(settings, "cpu", "sft")


def test_global_batch_sets_the_accumulation() -> None:
    assert accumulation(64, 4, 2) == 8
    assert accumulation(8, 8, 1) == 1


def test_global_batch_that_does_not_fit_names_those_that_do() -> None:
    with pytest.raises(ConfigError, match=r"3 processes cannot share evenly\.\n .*1, 2, 4 or 8 processes .*of 24"):
        accumulation(64, 8, 3)
    with pytest.raises(ConfigError, match=r"1 batch of 8 rows, (.|\n)* 1 process in all(.|\n)*--batch-size 4$"):
        accumulation(8, 8, 2)
    with pytest.raises(ConfigError, match=r"64 is not a multiple of --batch-size 5\.\n .*--batch-size 1, 2 or 4"):
        accumulation(64, 5, 2)
    with pytest.raises(ConfigError, match=r"--batch-size 1$"):
        accumulation(7, 5, 2)
    with pytest.raises(ConfigError, match=r"1, 2, 3, 4, 5, 6, …, 120, 144, 180, 240, 360 or 720 processes"):
        accumulation(720, 1, 7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nproc": "0"}, "nproc\n.*must be a whole number of at least 1, or auto"),
        ({"nproc": True}, "nproc\n.*true is neither a number nor a text"),
        ({"rendezvous": "here"}, "rendezvous\n.*must be HOST:PORT"),
        ({"rendezvous": "here:70000"}, "rendezvous\n.*must be HOST:PORT"),
        ({"nnodes": 2}, "add --rendezvous HOST:PORT"),
        ({"node_rank": 1}, "node_rank: 1 is not below --nnodes 1"),
        ({"offload": "optimizer"}, "--strategy ddp keeps its optimizer on the GPU; use --strategy zero2 or zero3"),
        ({"offload": "parameters", "strategy": "zero2"}, "use --strategy zero3 or fsdp"),
        ({"quantize": "nf4", "strategy": "zero2"}, "--strategy zero2 cannot divide quantized weights"),
        ({"quantize": "nf4", "strategy": "zero3"}, "--strategy zero3 cannot divide quantized weights"),
        ({"quantize": "int8", "strategy": "fsdp"}, "--strategy fsdp cannot divide quantized weights"),
        ({"nnodes": 2, "rendezvous": "a:1", "max_restarts": 1}, "max_restarts: .* add --node-rank on each"),
    ],
)
def test_setting_that_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SFTConfig.model_validate(settings)


def test_recipe_may_hold_the_number_of_processes_as_a_number() -> None:
    assert SFTConfig.model_validate({"nproc": 2}).nproc == "2"


def test_capture_takes_what_starts_processes() -> None:
    assert LaunchOptions.model_fields.keys() <= DistillCaptureConfig.model_fields.keys()
    assert "strategy" not in DistillCaptureConfig.model_fields
