"""DeepSpeed's ZeRO, whose step is taken when the trainer takes it, and whose optimizer's states are read and set.

Accelerate lets DeepSpeed step at the end of the backward, and knows the norm of the gradient only after it: too late to
check the loss and the gradient before the weights change. This module imports DeepSpeed.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper
from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_optimizer_state
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
"""The states of AdamW that are divided."""


class EngineWithoutStep(DeepSpeedEngineWrapper):
    """Accelerate's wrapper of an engine, whose backward takes no step."""

    def backward(self, loss: torch.Tensor, sync_gradients: bool = True, **kwargs: Any) -> None:
        """Add the gradients of a batch, and divide them among the processes after the last one of a step."""
        self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self.engine.backward(loss, **kwargs)

    def get_global_grad_norm(self) -> float:
        """Return the norm of the whole gradient before it is clipped."""
        optimizer = self.engine.optimizer
        if hasattr(optimizer, "scaled_global_norm"):
            return float(optimizer.scaled_global_norm())
        return float(torch.linalg.vector_norm(torch.stack(optimizer._get_norm_groups())))


def step_later(accelerator: Accelerator, optimizer: Any) -> None:
    """Make ``optimizer.step`` take the step of DeepSpeed's engine, which otherwise follows the backward.

    Args:
        accelerator: The accelerator that has prepared the engine.
        optimizer: Accelerate's wrapper of DeepSpeed's optimizer; changed in place.
    """
    engine = accelerator.deepspeed_engine_wrapped.engine
    _create_states(engine.optimizer)
    accelerator.deepspeed_engine_wrapped = EngineWithoutStep(engine)
    optimizer.step = engine.step


def _create_states(optimizer: Any) -> None:
    """Create the states of AdamW as its first step would: DeepSpeed finds those of the first group only after it."""
    for flat in _flat_parts(optimizer):
        moments = {name: torch.zeros_like(flat) for name in MOMENTS}
        optimizer.optimizer.state[flat] = {"step": torch.tensor(0.0), **moments}
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._lazy_init_hp_params_optimizer_state()


def _flat_parts(optimizer: Any) -> list[Tensor]:
    """Return this process's parts of the weights, one for each group; of ZeRO-3, one for some of each group."""
    names = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
    parts: list[Tensor] = next(getattr(optimizer, name) for name in names if hasattr(optimizer, name))
    return parts


def get_states(parameter: nn.Parameter) -> dict[str, Tensor]:
    """Return the whole states of a parameter, by name; all processes call this."""
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return {name: safe_get_full_optimizer_state(parameter, name).view(shape) for name in MOMENTS}


def set_states(optimizer: Any, parameter: nn.Parameter, states: dict[str, Tensor]) -> None:
    """Set the states of a parameter in the part of each process.

    Args:
        optimizer: DeepSpeed's optimizer.
        parameter: The parameter.
        states: Its whole states, by name.
    """
    for name in MOMENTS:
        value = states[name].to(parameter.device)
        if not hasattr(parameter, "ds_id"):
            safe_set_full_optimizer_state(parameter, value, name)
            continue
        # DeepSpeed's function reads past the end of a parameter that cannot be divided evenly.
        part, _ = optimizer._get_fp32_opt_state_partition(parameter, release_swap_buffers=False, optim_state_key=name)
        first = part.numel() * optimizer._get_param_partition_rank(parameter)
        own = value.flatten()[first : first + part.numel()]
        part[: len(own)].copy_(own)
