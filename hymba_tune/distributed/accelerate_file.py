"""The file that `accelerate config` writes, read by Accelerate itself."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TypeVar

from hymba_tune.config import DistributedOptions, LaunchOptions
from hymba_tune.errors import ConfigError

D = TypeVar("D", bound=DistributedOptions)
OURS = ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_GRADIENT_CLIPPING")
"""Variables whose values are settings of a run (--dtype, --grad-accum, --max-grad-norm)."""
PRECISIONS = {"bf16": "bfloat16", "fp16": "float16"}


def with_accelerate_config(settings: D) -> D:
    """Return the settings with those of ``--accelerate-config``, and set the environment variables that it asks for.

    Args:
        settings: The settings of a run. Those that were set explicitly override the file's.

    Raises:
        ConfigError: If the file cannot be read, or asks for what a run cannot do.
    """
    path = settings.accelerate_config
    assert path is not None
    if not path.is_file():
        raise ConfigError(
            f"--accelerate-config {path}: no such file.", fix=f"accelerate config --config_file {path} writes it"
        )
    arguments, environment = _read(path)
    found = _as_settings(path, arguments)
    resumed = getattr(settings, "resume", None) is not None
    free = LaunchOptions.model_fields.keys() if resumed else found.keys() - settings.model_fields_set
    os.environ.update(environment)
    update = {name: value for name, value in found.items() if name in free}
    return type(settings).model_validate(settings.model_dump(exclude_unset=True) | update)


def _read(path: Path) -> tuple[Any, dict[str, str]]:
    """Return the arguments and the environment with which ``accelerate launch`` would start a program."""
    # Imported here because that takes seconds.
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    # Port 0: which port the processes use is decided later, and one in use is no error yet.
    words = ["--config_file", str(path), "--main_process_port", "0", "hymba-tune"]
    try:
        arguments, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(words))
        arguments.deepspeed_fields_from_accelerate_config = ",".join(getattr(defaults, "deepspeed_config", {}))
        environment = (
            prepare_deepspeed_cmd_env(arguments)[1] if arguments.use_deepspeed else prepare_multi_gpu_env(arguments)
        )
    except (ValueError, TypeError, AttributeError, RuntimeError, OSError) as error:
        raise ConfigError(
            f"--accelerate-config {path} cannot be read: {error}", expected="a file that accelerate config has written"
        ) from error
    arguments.main_process_port = defaults.main_process_port
    changed = {name: value for name, value in environment.items() if os.environ.get(name) != value}
    return arguments, {name: value for name, value in changed.items() if name not in (*OURS, "PYTHONPATH")}


def _as_settings(path: Path, arguments: Any) -> dict[str, Any]:
    """Return the settings that stand for Accelerate's arguments."""
    strategy = _strategy(path, arguments)
    machines = int(arguments.num_machines or 1)
    found: dict[str, Any] = {"strategy": strategy, "nnodes": machines}
    found["nproc"] = str(max(1, int(arguments.num_processes or 1) // machines))
    if machines > 1:
        found["node_rank"] = int(arguments.machine_rank or 0)
        found["rendezvous"] = f"{arguments.main_process_ip}:{arguments.main_process_port or 29500}"
    if arguments.use_cpu:
        found["device"] = "cpu"
    if (precision := str(arguments.mixed_precision)) in PRECISIONS:
        found["dtype"] = PRECISIONS[precision]
    elif precision != "no":
        raise ConfigError(f"--accelerate-config {path}: mixed_precision {precision} is not supported.", expected="bf16")
    if strategy == "fsdp" and str(arguments.fsdp_offload_params).lower() == "true":
        found["offload"] = "parameters"
    if strategy == "zero3" and arguments.offload_param_device == "cpu":
        found["offload"] = "parameters"
    elif strategy.startswith("zero") and arguments.offload_optimizer_device == "cpu":
        found["offload"] = "optimizer"
    if arguments.use_deepspeed:
        ours = {"grad_accum": arguments.gradient_accumulation_steps, "max_grad_norm": arguments.gradient_clipping}
        found |= {name: value for name, value in ours.items() if value not in (None, "auto")}
    return found


def _strategy(path: Path, arguments: Any) -> str:
    for name in ("tpu", "use_megatron_lm", "use_parallelism_config"):
        if getattr(arguments, name, False):
            raise ConfigError(
                f"--accelerate-config {path}: {name} is not supported.",
                expected="several GPUs, FSDP version 2, or DeepSpeed's ZeRO 2 or 3",
            )
    if arguments.use_fsdp:
        if int(arguments.fsdp_version) != 2:
            raise ConfigError(
                f"--accelerate-config {path}: FSDP version {arguments.fsdp_version} is not supported.",
                expected="fsdp_version: 2",
            )
        return "fsdp"
    if not arguments.use_deepspeed:
        return "ddp"
    stage = arguments.zero_stage
    if arguments.deepspeed_config_file is not None:
        zero = json.loads(Path(arguments.deepspeed_config_file).read_text(encoding="utf-8"))
        stage = zero.get("zero_optimization", {}).get("stage")
    if str(stage) not in ("2", "3"):
        raise ConfigError(f"--accelerate-config {path}: ZeRO stage {stage} is not supported.", expected="stage 2 or 3")
    return f"zero{stage}"
