"""Inputs that several tests of training share."""

from __future__ import annotations

import signal

from hymba_tune.train.screen import MetricsRow, Screen


class Pressing(Screen):
    """Presses Ctrl-C when a step's row comes."""

    def __init__(self, step: int, *, times: int = 1) -> None:
        self._step, self._times = step, times

    def row(self, row: MetricsRow, *, total_steps: int, seconds_left: float | None) -> None:
        del total_steps, seconds_left
        if row.step == self._step and row.loss is not None:
            for _ in range(self._times):
                signal.raise_signal(signal.SIGINT)
