"""The launches of Triton kernels, counted where they are interpreted and where they are compiled."""

from __future__ import annotations

from typing import Any

import pytest

from hymba_tune.model.triton_kernels import INTERPRETED


def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows by the name of each kernel that is launched from now on."""
    if INTERPRETED:
        from triton.runtime.interpreter import GridExecutor as Launcher

        method, name = "__call__", "fn"
    else:
        from triton import JITFunction as Launcher

        method, name = "run", "fn"

    started: list[str] = []
    original = getattr(Launcher, method)

    def counted(kernel: Any, *arguments: Any, **named: Any) -> Any:
        started.append(getattr(kernel, name).__name__)
        return original(kernel, *arguments, **named)

    monkeypatch.setattr(Launcher, method, counted)
    return started
