"""Stopping a run before a NaN, an infinity or a jump of the loss reaches the weights."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, Protocol

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from hymba_tune.distributed.environment import world_size
from hymba_tune.distributed.processes import added, gathered
from hymba_tune.errors import TrainingError
from hymba_tune.train.run import Run

log = logging.getLogger(__name__)

USUAL_STEPS, FEWEST_STEPS = 50, 10
"""The number of steps over which the median loss is taken, and the fewest steps that give one."""
LOWEST_USUAL = 1.0
"""Nats. A loss near zero is often many times as high on a hard batch, which is no sign of divergence."""
UNIFORM, AWAY = 0.9, 1.5
"""A loss at this share of a uniform guess's is a spike, if it is at least this multiple of the usual loss. In a small
vocabulary, a model that has forgotten everything may lose less than five times the usual loss."""
DEFAULT_SPIKE = 5.0
"""The spike limit at which that share holds; a higher limit raises it."""
NAMED_ROWS = 8


class Watched(Protocol):
    """A trainer that keeps the batches of the current step."""

    step_batches: list[tuple[dict[str, Any], Tensor]]
    """Each batch, and its share of the step's loss."""
    stop_requested: bool
    stop_agreed: bool

    def step_numbers(self) -> tuple[list[float], float]:
        """Return the loss of each batch of the step, as its share, and the norm of the gradient."""


class LossGuard(TrainerCallback, ExportableState):
    """Ends a run before a step whose loss or gradient is not finite, or whose loss jumps.

    All processes of a run see the same loss, and so decide alike; here they also agree on stopping for Ctrl-C.

    Args:
        trainer: The trainer whose steps are checked.
        run: The run, for the checkpoint that an error message names.
        max_spike: The largest loss of a step, as a multiple of the median loss; None for no limit.
        vocabulary: The number of tokens, if the loss is in nats a token: a uniform guess loses its logarithm.
        places: Returns where the rows of a batch were read from.
    """

    def __init__(
        self,
        trainer: Watched,
        run: Run,
        *,
        max_spike: float | None,
        vocabulary: int | None = None,
        places: Callable[[dict[str, Any]], Sequence[str]],
    ) -> None:
        self._trainer = trainer
        self._run = run
        self._max_spike = max_spike
        self._uniform = math.log(vocabulary) if vocabulary else math.inf
        self._places = places
        self._losses: deque[float] = deque(maxlen=USUAL_STEPS)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint saves, so that a resumed run stops where this one would."""
        return {"args": {}, "attributes": {"losses": list(self._losses)}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Restore what the checkpoint saved."""
        del args, control
        saved: Any = state.stateful_callbacks.get(type(self).__name__, {})
        self._losses.extend(saved.get("attributes", {}).get("losses", []))

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Discard the batches of the previous step."""
        del args, state, control
        self._trainer.step_batches.clear()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Check the step's loss and gradient before the weights change.

        Raises:
            TrainingError: If one of them is not finite or the loss jumps; it names the step, its rows and a checkpoint.
        """
        del control
        step = state.global_step + 1
        batches = self._trainer.step_batches
        shares, norm = self._trainer.step_numbers()
        total, stops = added([sum(shares), float(self._trainer.stop_requested)])
        loss = total / world_size()
        self._trainer.stop_agreed = stops > 0

        if not math.isfinite(loss):
            broken = [batch for (batch, _), share in zip(batches, shares, strict=True) if not math.isfinite(share)]
            raise self._error(f"The loss is {loss} at step {step}", "a finite loss", broken, args.learning_rate)
        # In float16 the gradient scaler skips steps with infinite gradients itself.
        if not math.isfinite(norm) and not args.fp16:
            inputs = [batch for batch, _ in batches]
            what = f"The gradient's norm is {norm} at step {step}, at a loss of {loss:.3f}"
            raise self._error(what, "a finite gradient", inputs, args.learning_rate)

        usual = median(self._losses) if len(self._losses) >= FEWEST_STEPS else math.inf
        if self._max_spike is not None and loss > (limit := self._limit(usual, self._max_spike)):
            before = f"{usual:.3f} (the median of {len(self._losses)} steps)"
            what = f"The loss jumped to {loss:.3f} at step {step}, from {before}"
            expected = f"at most {limit:.3g} (--max-loss-spike {self._max_spike:g})"
            raise self._error(what, expected, [batch for batch, _ in batches], args.learning_rate)
        self._losses.append(loss)

    def _limit(self, usual: float, max_spike: float) -> float:
        """Return the largest loss that is no spike."""
        forgotten = UNIFORM * self._uniform * max(1.0, max_spike / DEFAULT_SPIKE)
        return min(max_spike * max(usual, LOWEST_USUAL), max(forgotten, AWAY * usual))

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **_: Any,
    ) -> None:
        """Check an evaluation before its weights are saved.

        Raises:
            TrainingError: If its loss is not finite.
        """
        del control
        loss = metrics.get("eval_loss", 0.0)
        if not math.isfinite(loss):
            what = f"The loss on the held-out data is {loss} at step {state.global_step}"
            raise self._error(what, "a finite loss", [], args.learning_rate)

    def _error(self, what: str, expected: str, batches: list[dict[str, Any]], rate: float) -> TrainingError:
        of_ranks = gathered([place for batch in batches for place in self._places(batch)])
        rows = [place for places in of_ranks for place in places]
        if rows:
            log.error("%s. Its rows: %s", what, listed(rows))
            more = f" and {len(rows) - NAMED_ROWS:,} more (in log.txt)" if len(rows) > NAMED_ROWS else ""
            what += f". Its rows: {listed(rows[:NAMED_ROWS])}{more}"
        checkpoint = self._run.newest_checkpoint()
        start = f"--model {checkpoint} starts from the last good weights" if checkpoint else "start again"
        skip = ""
        if self._max_spike is not None and "jumped" in what and checkpoint:
            skip = f"--resume {self._run.path} --max-loss-spike {2 * self._max_spike:g}"
        return TrainingError(
            f"{what}.", expected=expected, fix=f"look at the rows; then {start} with --lr {rate / 2:.2g}", skip=skip
        )


def listed(places: Sequence[str]) -> str:
    """Return places grouped by file: ``a.jsonl, line 3, 18; b.jsonl, line 2``."""
    numbers: dict[str, list[str]] = {}
    for place in places:
        where, _, number = place.rpartition(" ")
        numbers.setdefault(where, []).append(number)
    return "; ".join(f"{where} {', '.join(those)}" for where, those in numbers.items())
