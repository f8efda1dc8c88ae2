"""Stopping a run before a loss or a gradient that is broken reaches the weights."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from hymba_tune.errors import TrainingError
from hymba_tune.train.run import Run

log = logging.getLogger(__name__)

USUAL_STEPS, FEWEST_STEPS = 50, 10
"""Steps whose median loss is the usual one, and how many there must be to speak of it."""
LOWEST_USUAL = 1.0
"""Nats. A loss near zero may well be many times as high at a hard batch; that is no sign of anything."""
NAMED_ROWS = 8


class Watched(Protocol):
    """What a trainer keeps of the step at hand."""

    step_batches: list[tuple[dict[str, Any], Tensor]]
    """Each batch, and its share of the step's loss."""
    step_grad_norm: float | None


class LossGuard(TrainerCallback, ExportableState):
    """Ends a run before a step whose loss or gradient is not finite, or whose loss jumps.

    Args:
        trainer: Whose steps are watched.
        run: Whose checkpoint one can start anew from.
        max_spike: How many times the usual loss a step's may be; None for any.
        places: Says where the rows of a batch stand.
    """

    def __init__(
        self,
        trainer: Watched,
        run: Run,
        *,
        max_spike: float | None,
        places: Callable[[dict[str, Any]], Sequence[str]],
    ) -> None:
        self._trainer, self._run, self._max_spike, self._places = trainer, run, max_spike, places
        self._losses: deque[float] = deque(maxlen=USUAL_STEPS)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a resumed run stops where this one would."""
        return {"args": {}, "attributes": {"losses": list(self._losses)}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Take up what the checkpoint kept."""
        del args, control
        kept: Any = state.stateful_callbacks.get(type(self).__name__, {})
        self._losses.extend(kept.get("attributes", {}).get("losses", []))

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Forget the step before."""
        del args, state, control
        self._trainer.step_batches.clear()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Look at the step while the weights are still those of before it.

        Raises:
            TrainingError: With the step, the rows of its batch, and the last checkpoint.
        """
        del control
        step, batches = state.global_step + 1, self._trainer.step_batches
        shares = torch.stack([share.detach().float() for _, share in batches]).tolist()
        loss, norm = sum(shares), self._trainer.step_grad_norm
        if not math.isfinite(loss):
            broken = [batch for (batch, _), share in zip(batches, shares, strict=True) if not math.isfinite(share)]
            raise self._error(f"The loss is {loss} at step {step}", "a finite loss", broken, args.learning_rate)
        # In float16 the scaler meets infinite gradients by leaving the step out, and goes on.
        if norm is not None and not math.isfinite(norm) and not args.fp16:
            inputs = [batch for batch, _ in batches]
            what = f"The gradient's norm is {norm} at step {step}, at a loss of {loss:.3f}"
            raise self._error(what, "a finite gradient", inputs, args.learning_rate)
        usual = median(self._losses) if len(self._losses) >= FEWEST_STEPS else math.inf
        if self._max_spike is not None and loss > self._max_spike * max(usual, LOWEST_USUAL):
            before = f"{usual:.3f} (the median of {len(self._losses)} steps)"
            what = f"The loss jumped to {loss:.3f} at step {step}, from {before}"
            limit = f"at most {self._max_spike:g} times the usual loss, or {self._max_spike:g} nats (--max-loss-spike)"
            raise self._error(what, limit, [batch for batch, _ in batches], args.learning_rate)
        self._losses.append(loss)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **_: Any,
    ) -> None:
        """Look at an evaluation before its weights are saved.

        Raises:
            TrainingError: If its loss is not finite.
        """
        del control
        loss = metrics.get("eval_loss", 0.0)
        if not math.isfinite(loss):
            what = f"The loss on the held-out data is {loss} at step {state.global_step}"
            raise self._error(what, "a finite loss", [], args.learning_rate)

    def _error(self, what: str, expected: str, batches: list[dict[str, Any]], rate: float) -> TrainingError:
        rows = [place for batch in batches for place in self._places(batch)]
        if rows:
            log.error("%s. Its rows: %s", what, listed(rows))
            more = f" and {len(rows) - NAMED_ROWS:,} more (in log.txt)" if len(rows) > NAMED_ROWS else ""
            what += f". Its rows: {listed(rows[:NAMED_ROWS])}{more}"
        checkpoint = self._run.newest_checkpoint()
        start = f"--model {checkpoint} goes on from the last good weights" if checkpoint else "start again"
        skip = ""
        if self._max_spike is not None and "jumped" in what and checkpoint:
            skip = f"--resume {self._run.path} --max-loss-spike {2 * self._max_spike:g}"
        return TrainingError(
            f"{what}.", expected=expected, fix=f"look at the rows; then {start} with --lr {rate / 2:.2g}", skip=skip
        )


def listed(places: Sequence[str]) -> str:
    """Places with what they share said once: ``a.jsonl, line 3, 18; b.jsonl, line 2``."""
    numbers: dict[str, list[str]] = {}
    for place in places:
        where, _, number = place.rpartition(" ")
        numbers.setdefault(where, []).append(number)
    return "; ".join(f"{where} {', '.join(those)}" for where, those in numbers.items())
