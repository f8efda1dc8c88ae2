from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml

from hymba_tune.config import SFTConfig
from hymba_tune.distributed.accelerate_file import with_accelerate_config
from hymba_tune.errors import ConfigError

DDP = {"distributed_type": "MULTI_GPU", "num_processes": 4, "num_machines": 2, "machine_rank": 1}
DDP |= {"main_process_ip": "10.0.0.1", "main_process_port": 29511, "mixed_precision": "bf16"}
FSDP = {"distributed_type": "FSDP", "num_processes": 2, "fsdp_config": {"fsdp_version": 2, "fsdp_offload_params": True}}
ZERO: dict[str, Any] = {"distributed_type": "DEEPSPEED", "num_processes": 2, "deepspeed_config": {"zero_stage": 3}}


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    with patch.dict(os.environ):
        yield


def read(folder: Path, content: dict[str, Any], **settings: Any) -> SFTConfig:
    path = folder / "accelerate.yaml"
    path.write_text(yaml.safe_dump({"num_machines": 1, "mixed_precision": "no"} | content))
    return with_accelerate_config(SFTConfig(accelerate_config=path, **settings))


def test_several_machines(tmp_path: Path) -> None:
    settings = read(tmp_path, DDP)
    assert (settings.strategy, settings.nproc, settings.nnodes, settings.node_rank) == ("ddp", "2", 2, 1)
    assert settings.rendezvous == "10.0.0.1:29511"
    assert settings.dtype == "bfloat16"
    assert "ACCELERATE_MIXED_PRECISION" not in os.environ  # --dtype decides


def test_fsdp(tmp_path: Path) -> None:
    settings = read(tmp_path, FSDP)
    assert (settings.strategy, settings.nproc, settings.offload) == ("fsdp", "2", "parameters")
    assert os.environ["FSDP_VERSION"] == "2"


def test_zero(tmp_path: Path) -> None:
    more = {"offload_optimizer_device": "cpu", "gradient_accumulation_steps": 4, "gradient_clipping": 0.5}
    settings = read(tmp_path, ZERO | {"deepspeed_config": {"zero_stage": 2} | more})
    assert (settings.strategy, settings.offload, settings.grad_accum) == ("zero2", "optimizer", 4)
    assert settings.max_grad_norm == 0.5
    assert os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "2"
    more = {"offload_optimizer_device": "cpu", "offload_param_device": "cpu", "gradient_accumulation_steps": "auto"}
    assert read(tmp_path, ZERO | {"deepspeed_config": {"zero_stage": 3} | more}).offload == "parameters"


def test_zero_in_a_file_of_deepspeed(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    settings = read(tmp_path, ZERO | {"deepspeed_config": {"deepspeed_config_file": str(path)}})
    assert settings.strategy == "zero3"


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    settings = read(tmp_path, DDP, nproc="1", dtype="float32")
    assert (settings.nproc, settings.dtype, settings.nnodes) == ("1", "float32", 2)


def test_a_resumed_run_takes_only_how_processes_are_started(tmp_path: Path) -> None:
    settings = read(tmp_path, DDP, resume=tmp_path, nproc="1", dtype="float32")
    assert (settings.nproc, settings.dtype) == ("2", "float32")


def test_cpu(tmp_path: Path) -> None:
    settings = read(tmp_path, {"distributed_type": "MULTI_CPU", "num_processes": 2, "use_cpu": True})
    assert (settings.device, settings.nproc) == ("cpu", "2")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (FSDP | {"fsdp_config": {"fsdp_version": 1}}, "FSDP version 1 is not supported"),
        (ZERO | {"deepspeed_config": {"zero_stage": 1}}, "ZeRO stage 1 is not supported"),
        ({"distributed_type": "MEGATRON_LM", "num_processes": 2}, "use_megatron_lm is not supported"),
        (DDP | {"mixed_precision": "fp8"}, "mixed_precision fp8 is not supported|cannot be read"),
        ({"nonsense": 1}, "cannot be read: A `distributed_type` must be specified"),
    ],
)
def test_what_is_not_supported_is_refused(content: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, content)


def test_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--accelerate-config .*no\.yaml: no such file\."):
        with_accelerate_config(SFTConfig(accelerate_config=tmp_path / "no.yaml"))
