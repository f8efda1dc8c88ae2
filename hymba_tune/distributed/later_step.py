"""DeepSpeed's step, taken when the trainer takes it, after the loss and the gradient have been checked.

Accelerate lets DeepSpeed step at the end of the backward, and knows the gradient's norm only after it. This module
imports DeepSpeed.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper


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
    accelerator.deepspeed_engine_wrapped = EngineWithoutStep(engine)
    optimizer.step = engine.step
