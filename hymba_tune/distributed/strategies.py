"""How several processes share the work of training: what a strategy asks of transformers, and whether the run got it.

The rows of a step are divided in every strategy. What else is divided, and the cost of it, is described in
https://huggingface.co/docs/accelerate/concept_guides/fsdp_and_deepspeed. Weights keep their dtypes and autocast chooses
those of the computation, as in one process, so that the numbers are those of one process.
"""

from __future__ import annotations

from typing import Any

from hymba_tune.distributed.environment import world_size
from hymba_tune.errors import ConfigError

LAYER = "HymbaDecoderLayer"
"""The unit that FSDP gathers at once."""
STAGES = {"zero2": 2, "zero3": 3}
REDUCE_BUCKET = 5 * 10**7
"""Gradients in a bucket of ZeRO, which takes its memory whether they are as many or not. By default DeepSpeed takes ten
times as many: 4 GB, also for an adapter."""
LIVE_PARAMETERS = 10**8
"""Gathered parameters that ZeRO-3 keeps for their next use. By default DeepSpeed keeps ten times as many: most of a
model."""
TYPES = {"ddp": "MULTI_", "fsdp": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
"""How the name of Accelerate's type of each strategy begins."""


def strategy_arguments(strategy: str, *, offload: str | None) -> dict[str, Any]:
    """Return the arguments of the trainer that ask for a strategy, by transformers' names.

    Args:
        strategy: ``ddp``, ``fsdp``, ``zero2`` or ``zero3``.
        offload: What is kept in the memory of the CPU: ``optimizer`` or ``parameters``; None for nothing.
    """
    if world_size() == 1:
        return {}
    if strategy == "fsdp":
        return {"fsdp": True, "fsdp_config": _fsdp(offload)}
    if strategy in STAGES:
        return {"deepspeed": _deepspeed(STAGES[strategy], offload)}
    return {}


def _fsdp(offload: str | None) -> dict[str, Any]:
    return {
        "version": 2,
        "transformer_layer_cls_to_wrap": [LAYER],
        "reshard_after_forward": True,
        "state_dict_type": "FULL_STATE_DICT",
        "cpu_offload": offload == "parameters",
    }


def _deepspeed(stage: int, offload: str | None) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage, "contiguous_gradients": True, "overlap_comm": True}
    zero["reduce_bucket_size"] = REDUCE_BUCKET
    if offload is not None:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if offload == "parameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    if stage == 3:
        # Also small parameters are divided, and a checkpoint gathers all of them.
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
        zero |= {"stage3_max_live_parameters": LIVE_PARAMETERS, "stage3_max_reuse_distance": LIVE_PARAMETERS}
    return {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_force_ds_cpu_optimizer": False,  # the optimizer of one process, which nothing has to be compiled for
    }


def check_strategy(strategy: str, accelerator: Any) -> None:
    """Check that a trainer shares the work as it was asked to.

    Args:
        strategy: The strategy of the settings.
        accelerator: The trainer's accelerator. On a CPU, Accelerate drops its plugins without a word.

    Raises:
        ConfigError: If it does not.
    """
    if world_size() == 1:
        return
    got = accelerator.distributed_type.value
    count = accelerator.num_processes
    if not got.startswith(TYPES[strategy]) or count != world_size():
        raise ConfigError(
            f"--strategy {strategy} is not what Accelerate has set up: {got}, {count} of {world_size()} processes.",
            expected="a CUDA device for each process" if strategy != "ddp" else "one process group of all processes",
            fix="--strategy ddp, which also works on CPUs" if strategy != "ddp" else "unset ACCELERATE_* variables",
        )
