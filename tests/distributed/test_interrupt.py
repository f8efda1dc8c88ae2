from __future__ import annotations

import signal
import time
from types import SimpleNamespace
from typing import Any

import pytest

from hymba_tune.train.callbacks import ONE_PRESS_SECONDS, Interrupt


def test_signals_of_one_press_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher passes on what the terminal has sent to its processes as well."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    trainer: Any = SimpleNamespace(stop_requested=False)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupt = Interrupt(trainer)
    any_of_them: Any = None
    interrupt.on_train_begin(any_of_them, any_of_them, any_of_them)
    try:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert trainer.stop_requested
        later = time.monotonic() + ONE_PRESS_SECONDS
        monkeypatch.setattr(time, "monotonic", lambda: later + 1)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        interrupt.release()
        assert signal.signal(signal.SIGINT, before) is signal.default_int_handler
