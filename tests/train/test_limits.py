"""Limits of disk and memory are checked before a run, or handled within it with an explanation."""

from __future__ import annotations

import errno
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hymba_tune.config import SFTConfig
from hymba_tune.errors import ConfigError, TrainingError
from hymba_tune.model import backends
from hymba_tune.model.backends import Backend, Operation, Problem, Task
from hymba_tune.train.limits import (
    blamed_kernels,
    check_disk,
    disk_needed,
    is_disk_full,
    is_out_of_memory,
    limits_explained,
    memory_advice,
)
from hymba_tune.train.resuming import resume_config
from hymba_tune.train.run import Run
from hymba_tune.train.trainer import HymbaTrainer
from tests.runs import run, settings

CPU = torch.device("cpu")


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("changes", [{}, {"method": "full"}, {"optimizer": "adamw8bit"}, {"optimizer": "sgd"}])
def test_disk_needed_covers_what_a_run_writes(
    changes: dict[str, Any], small_model: Path, questions: Path, tmp_path: Path
) -> None:
    config = settings(small_model, questions, tmp_path / "out", steps=3, save_every=1, eval_split=0, **changes)
    finished = run(config)
    counts = finished.facts()["parameters"]
    needed = disk_needed(config, trained=counts["trainable"], total=counts["total"])
    checkpoint = folder_bytes(finished.last_checkpoint())
    written = 3 * checkpoint + folder_bytes(finished.model if "method" in changes else finished.adapter)
    assert written < needed < written + 4 * 2**23


def test_disk_too_small_is_refused_before_weights_are_read(
    small_model: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hymba_tune.train.flow.open_model", None)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**30, 2**30 - 2**20, 2**20))  # type: ignore[attr-defined]
    with pytest.raises(
        ConfigError,
        match=r"its disk has 1\.0 MB free\.\n  expected   3\d\.\d MB for the checkpoints (.|\n)*free 3\d\.\d MB, or",
    ):
        run(settings(small_model, questions, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_existing_checkpoints_count_as_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**30, 2**30 - 100, 100))  # type: ignore[attr-defined]
    (tmp_path / "checkpoints/checkpoint-1").mkdir(parents=True)
    (tmp_path / "checkpoints/checkpoint-1/weights").write_bytes(b"0" * 50)
    check_disk(Run(tmp_path), 150)
    with pytest.raises(ConfigError, match="its disk has"):
        check_disk(Run(tmp_path), 151)


@pytest.mark.parametrize("file", ["optimizer.pt", "trainer_state.json"])
def test_disk_that_fills_leaves_the_last_whole_checkpoint(
    file: str, small_model: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing to /dev/full fails as on a full disk."""
    save = HymbaTrainer.save_model

    def save_model(self: HymbaTrainer, output_dir: str, **kwargs: Any) -> None:
        save(self, output_dir, **kwargs)
        if output_dir.endswith("checkpoint-4"):
            (Path(output_dir) / file).symlink_to("/dev/full")

    monkeypatch.setattr(HymbaTrainer, "save_model", save_model)
    monkeypatch.setattr("hymba_tune.train.limits._free", lambda _: 2**29)
    out = tmp_path / "out"
    with pytest.raises(TrainingError, match=r"The disk of .*out is full\.(.|\n)*--resume .*out \(from checkpoint-2\)"):
        run(settings(small_model, questions, out, steps=4, save_every=2))
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["checkpoint-2"]
    monkeypatch.undo()
    assert run(resume_config(SFTConfig(resume=out))).facts()["steps"] == 4


def test_full_disks_are_recognized_by_the_messages_of_libraries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hymba_tune.train.limits._free", lambda _: 0)
    full = [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
        RuntimeError("basic_ios::clear: iostream error"),
        Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
    ]
    assert all(is_disk_full(error, tmp_path) for error in full)
    assert not any(is_disk_full(error, tmp_path) for error in (OSError(errno.EACCES, "no"), RuntimeError("shapes")))
    monkeypatch.setattr("hymba_tune.train.limits._free", lambda _: 2**40)
    assert not is_disk_full(full[2], tmp_path)


def test_out_of_memory_is_distinguished_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60)
    assert is_out_of_memory(error.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))


def test_out_of_memory_says_what_to_lower(
    small_model: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HymbaTrainer, "compute_loss", lambda *_, **__: torch.empty(2**60))
    with pytest.raises(TrainingError, match=r"Out of memory on cpu: the run had used \d\.\d+ GB") as error:
        run(settings(small_model, questions, tmp_path / "out", eval_split=0, method="full"))
    message = str(error.value)
    assert "room for 4 × 2,048 tokens at a time" in message
    for advice in ("--batch-size 2 --grad-accum 2", "--gradient-checkpointing", "--method lora"):
        assert re.search(rf"{advice} \(about \d\.\d+ GB instead of \d\.\d+ GB, ", message)
    assert "--max-length" not in message  # no row is so long that it would help
    assert not (tmp_path / "out").exists()


def test_what_is_on_already_is_not_advised(tmp_path: Path) -> None:
    config = SFTConfig(batch_size=1, gradient_checkpointing=True, method="full", optimizer="adamw8bit")
    with pytest.raises(TrainingError) as error, limits_explained(Run(tmp_path), config, CPU):
        raise MemoryError
    message = str(error.value)
    assert all(word not in message for word in ("--batch-size", "--gradient-checkpointing", "--optimizer"))
    assert "--max-length 1024" in message


def test_advice_says_what_each_change_would_take() -> None:
    """The estimate is that of the settings with this change alone."""

    def needs(config: SFTConfig) -> int:
        rows = min(config.max_length, 1024)
        return config.batch_size * rows * (2**17 if config.gradient_checkpointing else 2**20)

    config = SFTConfig(batch_size=4, grad_accum=3, max_length=2048)
    assert memory_advice(config, needs) == [
        "--batch-size 2 --grad-accum 6 (about 2.0 GB instead of 4.0 GB, the same steps)",
        "--gradient-checkpointing (about 0.50 GB instead of 4.0 GB, a third more time)",
    ]  # there are no rows that half of --max-length would cut


def test_several_processes_are_advised_to_share() -> None:
    config = SFTConfig(nproc="8", batch_size=1, method="full")
    assert "--strategy fsdp (weights, gradients and optimizer divided among the processes)" in memory_advice(config)
    zero3 = memory_advice(SFTConfig(nproc="8", strategy="zero3"))
    assert "--offload optimizer (its states in CPU memory, slower)" in zero3
    assert not any(advice.startswith("--quantize") for advice in zero3)
    assert not any(advice.startswith("--strategy") for advice in memory_advice(SFTConfig(method="full")))


def test_other_errors_pass_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shapes"), limits_explained(Run(tmp_path), SFTConfig(), CPU):
        raise RuntimeError("shapes")


class FailingBackward(torch.autograd.Function):
    """Doubles; its backward fails as a kernel does, in CUDA's words or in a compiler's."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, error: Exception | None) -> torch.Tensor:
        ctx.error = error
        return 2 * x

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        if ctx.error is not None:
            raise ctx.error
        return 2 * dy, None


def doubled(x: torch.Tensor, error: Exception | None = None) -> torch.Tensor:
    return FailingBackward.apply(x, error)


@pytest.fixture
def doubling(monkeypatch: pytest.MonkeyPatch) -> Operation:
    """Return an operation whose fast backend has passed its self-test for training."""
    monkeypatch.setattr(backends, "OPERATIONS", {})
    leaf = torch.ones(3, requires_grad=True)
    fast, plain = Backend("fast", doubled, needs_self_test=True), Backend("plain", lambda x: 2 * x)
    problem = Problem(lambda backend: (backend.run(leaf),), [leaf])
    operation = Operation("doubling", [fast, plain], plain="plain", problem=lambda _: problem)
    monkeypatch.setattr("hymba_tune.train.limits.OPERATIONS", backends.OPERATIONS)
    assert operation.choose(Task("cpu", torch.float32)).name == "fast"
    return operation


def test_a_backward_that_fails_names_its_kernel_and_another(doubling: Operation, tmp_path: Path) -> None:
    x = torch.ones(3, requires_grad=True)
    y = doubling.compute(Task.of(x), x, RuntimeError("out of resource: shared memory\nRequired: 1048576"))
    with pytest.raises(TrainingError) as error, limits_explained(Run(tmp_path), SFTConfig(), CPU):
        y.sum().backward()
    message = str(error.value)
    assert "The doubling kernel fast failed on cpu: RuntimeError: out of resource: shared memory" in message
    assert "--kernels doubling=plain, which is slower" in message
    assert "Required" not in message
    assert "--resume" not in message


@pytest.mark.usefixtures("doubling")
def test_an_error_of_the_device_may_come_from_any_kernel(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    with (
        pytest.raises(TrainingError, match="--kernels doubling=plain"),
        limits_explained(Run(tmp_path), SFTConfig(), CPU),
    ):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_a_plain_kernel_is_not_blamed(doubling: Operation) -> None:
    doubling.chosen = "plain"
    assert blamed_kernels(RuntimeError("CUDA error: an illegal memory access was encountered")) == {}


def test_what_torch_compile_runs_belongs_to_the_kernel_that_it_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Operation, "tested", property(lambda operation: [*operation.backends.values()]))
    with pytest.raises(torch._dynamo.exc.Unsupported) as error:
        torch.compile(torch._dynamo.graph_break, fullgraph=True, backend="eager")()
    assert blamed_kernels(error.value) == {"attention": ("flex", "blocks")}
    torch.compiler.reset()
