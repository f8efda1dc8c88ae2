"""Whole weights and optimizer states of a model that FSDP or DeepSpeed has divided among the processes.

A checkpoint holds what that of one process holds, so that a run is resumed with any number of processes and any
strategy, and every command opens its files. All processes call these functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from hymba_tune.distributed.environment import is_main
from hymba_tune.distributed.strategies import LAYER


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Give every process all weights of a model within the block; reading them, or a forward, then waits for nobody.

    Args:
        model: The model, divided or not.
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    with _gathered_by_deepspeed(model):
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        try:
            yield
        finally:
            for unit in units:
                # Accelerate keeps what lies outside of the layers gathered until the backward.
                unit.set_reshard_after_forward(LAYER in type(unit).__name__, recurse=False)
                unit.reshard()


def _gathered_by_deepspeed(model: nn.Module) -> Any:
    divided = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]
    if not divided:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(divided)


def state_of(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Return copies of weights and buffers in the CPU's memory. FSDP's own ``state_dict`` divides them again.

    Args:
        model: The model, within `whole_weights`.
        names: The names of its ``state_dict``.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tensors = parameters | dict(model.named_buffers(remove_duplicate=False))
    return {name: tensors[name].detach().cpu().clone() for name in names}


def is_divided(model: nn.Module) -> bool:
    """Return whether each process holds only a part of a model's weights."""
    return any(isinstance(weight, DTensor) or hasattr(weight, "ds_id") for weight in model.parameters())


def copy_weights(model: nn.Module, whole: nn.Module) -> None:
    """Copy the weights of a divided model to another one, in the first process only.

    Args:
        model: The divided model.
        whole: The same model on the meta device, which gets weights in the CPU's memory; changed in place.
    """
    with whole_weights(model), torch.no_grad():
        if not is_main():
            return
        for name, weight in [*model.named_parameters(), *model.named_buffers()]:
            folder, _, own = name.rpartition(".")
            copy = weight.detach().cpu().clone()
            module = whole.get_submodule(folder)
            setattr(module, own, nn.Parameter(copy, weight.requires_grad) if isinstance(weight, nn.Parameter) else copy)


def whole_optimizer_state(optimizer: Any, groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the state of an optimizer as one process would save it, in the CPU's memory.

    Args:
        optimizer: The trainer's optimizer.
        groups: The trainer's groups of parameters.
    """
    inner = _inner(optimizer)
    if not _is_deepspeed(optimizer):
        state: dict[str, Any] = _whole(inner.state_dict())
        return state
    from hymba_tune.distributed.zero import get_states  # DeepSpeed need not be installed

    step = next(iter(inner.state.values()))["step"]
    states = {
        number: _whole({"step": step, **get_states(parameter)}) for number, parameter in enumerate(_parameters(groups))
    }
    return {"state": states, "param_groups": _numbered(inner.param_groups, groups)}


def load_optimizer_state(optimizer: Any, groups: Sequence[Mapping[str, Any]], saved: Mapping[str, Any]) -> None:
    """Divide the state of an optimizer that `whole_optimizer_state` or one process has saved.

    Args:
        optimizer: The trainer's optimizer.
        groups: The trainer's groups of parameters.
        saved: The saved state, the same in all processes.
    """
    inner = _inner(optimizer)
    if not _is_deepspeed(optimizer):
        parameters = _parameters(groups)
        state = {
            number: {name: _divided(value, parameters[number]) for name, value in values.items()}
            for number, values in saved["state"].items()
        }
        inner.load_state_dict({**saved, "state": state})
        return
    from hymba_tune.distributed.zero import set_states

    for number, parameter in enumerate(_parameters(groups)):
        set_states(optimizer.optimizer, parameter, saved["state"][number])
    step = saved["state"][0]["step"]
    for values in inner.state.values():
        values["step"] = step.clone()
    for group, known in zip(inner.param_groups, saved["param_groups"], strict=True):
        group |= {name: value for name, value in known.items() if name != "params"}


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer of torch within Accelerate's and DeepSpeed's."""
    while not isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _is_deepspeed(optimizer: Any) -> bool:
    return type(optimizer).__name__ == "DeepSpeedOptimizerWrapper"


def _whole(value: Any) -> Any:
    """Return a copy in the CPU's memory, in which divided tensors are whole."""
    if isinstance(value, dict):
        return {name: _whole(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_whole(one) for one in value]
    if isinstance(value, DTensor):
        value = value.full_tensor()
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value


def _divided(value: Any, parameter: nn.Parameter) -> Any:
    """Return a state of a parameter, divided as the parameter is."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def _numbered(groups: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return groups with the numbers of their parameters, as a saved state holds them.

    Args:
        groups: The groups of DeepSpeed's inner optimizer, whose parameters are flat parts.
        own: The trainer's groups.
    """
    numbered = []
    first = 0
    for group, known in zip(groups, own, strict=True):
        after = first + len(known["params"])
        numbered.append({**group, "params": list(range(first, after))})
        first = after
    return numbered


def _parameters(groups: Sequence[Mapping[str, Any]]) -> list[nn.Parameter]:
    return [parameter for group in groups for parameter in group["params"]]
