"""Explains the errors of adapters that cannot compute packed hidden states."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def adapter_errors_explained() -> Iterator[None]:
    """Explain errors that PEFT raises while the layers run.

    Raises:
        ValueError: Instead of an error that was raised by PEFT's code.
    """
    try:
        yield
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError) or not _raised_by_peft(error):
            raise
        raise ValueError(
            "a PEFT adapter cannot compute the hidden states of Hymba, which are packed as (rows, width): the meta "
            "tokens once, then the tokens of all texts. Methods that need (batch, length, width) do not work: "
            "activated LoRA, ShadowPEFT, and adapter_names, which gives each row of a batch its own adapter. "
            f"PEFT's error: {error}"
        ) from error


def _raised_by_peft(error: BaseException) -> bool:
    """Return whether the innermost code, except that of PyTorch, is PEFT's: its layers also call those of Hymba."""
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    own = [module for module in modules if module.partition(".")[0] != "torch"]
    return bool(own) and own[-1].startswith("peft.")
