"""Callbacks of a run: metrics, time and memory, adapters that do not train, and Ctrl-C."""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from hymba_tune.adapters import AdapterWatch
from hymba_tune.distributed.environment import world_size
from hymba_tune.distributed.processes import gathered
from hymba_tune.distributed.sharding import whole_weights
from hymba_tune.errors import TrainingError
from hymba_tune.memory import peak_memory
from hymba_tune.train.base import RunTrainer
from hymba_tune.train.run import Run
from hymba_tune.train.screen import OF_SOURCE, MetricsRow, Screen

LEAST_RATE = 1e-3
"""The least learning rate, as a share of its peak, at which every step is certain to change the weights."""
ONE_PRESS_SECONDS = 1.0
"""The time within which signals are one Ctrl-C: a launcher passes on what the terminal has sent as well."""
REWARDS = {
    f"{mode}rewards/{name}": f"{mode}{ours}"
    for mode in ("", "eval_")
    for name, ours in {
        "margins": "margin",
        "accuracies": "accuracy",
        "chosen": "chosen_reward",
        "rejected": "rejected_reward",
    }.items()
}
"""TRL's names of preference metrics, and the names of a run's columns."""
MORE = "more/"
"""Prefix of the names of logged values that become columns of their own."""


class Metrics(TrainerCallback):
    """Writes ``metrics.jsonl`` and shows each line."""

    def __init__(self, run: Run, screen: Screen) -> None:
        self._run, self._screen = run, screen
        # Since the last row.
        self._seconds = 0.0
        self._tokens = 0
        # Since the start of this process.
        self._steps = 0
        self._step_seconds = 0.0
        self._started = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start counting tokens from where the run or its checkpoint stopped."""
        del control
        # A resumed trainer would use the intervals saved in its checkpoint, not those of the current settings.
        state.compute_steps(args, state.max_steps)
        self._tokens = state.num_input_tokens_seen

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock. Time between steps, such as an evaluation's, does not count."""
        del args, state, control
        self._started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop the clock."""
        del args, state, control
        seconds = time.perf_counter() - self._started
        self._seconds += seconds
        self._step_seconds += seconds
        self._steps += 1

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        """Write and show a line. The trainer logs losses and evaluations at different times."""
        del control
        if "loss" not in logs and "eval_loss" not in logs:
            return
        speed = None
        if "loss" in logs and self._seconds:
            speed = (state.num_input_tokens_seen - self._tokens) / self._seconds
            self._tokens = state.num_input_tokens_seen
            self._seconds = 0.0

        row = MetricsRow(
            step=state.global_step,
            loss=logs.get("loss"),
            eval_loss=logs.get("eval_loss"),
            learning_rate=logs.get("learning_rate"),
            grad_norm=logs.get("grad_norm"),
            tokens_per_s=speed,
            memory_bytes=max(gathered(peak_memory(args.device))),
            **{name: logs[key] for key, name in REWARDS.items() if key in logs},
            more={
                name.replace(MORE, "", 1): value
                for name, value in logs.items()
                if MORE in name or name.startswith(OF_SOURCE)
            },
        )
        self._run.log(row)
        seconds_left = (state.max_steps - state.global_step) * self._step_seconds / self._steps if self._steps else None
        self._screen.row(row, total_steps=state.max_steps, seconds_left=seconds_left)


class HeldOutParts(TrainerCallback):
    """Writes the losses of the parts of the held-out data, on which verdicts are tested.

    Args:
        trainer: The run's trainer.
        run: The run.
    """

    def __init__(self, trainer: RunTrainer, run: Run) -> None:
        self._trainer, self._run = trainer, run

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write a line."""
        del args, control
        self._run.log_parts(state.global_step, self._trainer.held_out_parts)


class Account(TrainerCallback, ExportableState):
    """Adds up the time and memory of a run over all its processes: each resumption starts a new one.

    What a killed process used after its last checkpoint is lost with its steps.

    Attributes:
        step_seconds: Seconds in steps alone, without evaluations and checkpoints.
    """

    def __init__(self) -> None:
        self._seconds_before = 0.0
        self._memory_before = 0
        self.step_seconds = 0.0
        self._step_started = 0.0
        self._started: float | None = None
        self._device = torch.device("cpu")

    @property
    def seconds(self) -> float:
        """Seconds since training began, without the time between two processes."""
        return self._seconds_before + (time.time() - self._started if self._started else 0.0)

    @property
    def peak_memory_bytes(self) -> int:
        """The peak over all processes; see `peak_memory`."""
        return max(self._memory_before, peak_memory(self._device))

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint saves."""
        names = ("seconds", "step_seconds", "peak_memory_bytes")
        return {"args": {}, "attributes": {name: getattr(self, name) for name in names}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Restore what the checkpoint saved."""
        del control
        saved = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {})
        self._seconds_before = saved.get("seconds", 0.0)
        self._memory_before = saved.get("peak_memory_bytes", 0)
        self.step_seconds = saved.get("step_seconds", 0.0)
        self._started = time.time()
        self._device = args.device

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock of the steps alone, without evaluations and checkpoints."""
        del args, state, control
        self._step_started = time.time()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop the clock."""
        del args, state, control
        self.step_seconds += time.time() - self._step_started


class FirstStep(TrainerCallback):
    """Stops a run in which a part of the adapter does not train at all."""

    def __init__(self) -> None:
        self._watch: AdapterWatch | None = None
        self._moved = False

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any, **_: Any
    ) -> None:
        """Record the adapter before the first step of a run, or before the first one after resuming.

        A step without any gradient is passed over: equal rewards give none.
        """
        del args, state, control
        if not self._moved and self._watch is None and any(_has_gradient(one) for one in model.parameters()):
            with whole_weights(model):
                self._watch = AdapterWatch(model)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any,
        optimizer: torch.optim.Optimizer,
        **_: Any,
    ) -> None:
        """Compare the adapter with its values before the step.

        Raises:
            TrainingError: Naming the modules that did not move.
        """
        del args, state, control
        # At the end of a schedule the rates are so small that a step may be rounded away.
        if self._watch is None or any(
            group["lr"] < LEAST_RATE * group["initial_lr"] for group in optimizer.param_groups
        ):
            return
        with whole_weights(model):
            unmoved = self._watch.unmoved()
        self._watch = None
        self._moved = True
        if unmoved:
            raise TrainingError(
                f"{len(unmoved)} adapted modules did not move at the first step: {', '.join(unmoved[:5])}.",
                expected="every adapted module to be reached by a gradient",
                fix="leave them out of --targets",
            )


def _has_gradient(parameter: torch.nn.Parameter) -> bool:
    return parameter.grad is not None and bool(parameter.grad.any())


class Interrupt(TrainerCallback):
    """Ends a run on Ctrl-C after the current step, with a checkpoint. A second Ctrl-C ends it at once.

    Args:
        trainer: The run's trainer. Its processes agree at each step, when the loss is checked.
    """

    def __init__(self, trainer: RunTrainer) -> None:
        self._trainer = trainer
        self._before: Any = None
        self._pressed_at = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Install the handler of the signal."""
        del args, state, control
        self._before = signal.signal(signal.SIGINT, self._press)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save and stop if Ctrl-C was pressed in any process."""
        del args, state
        if self._trainer.stop_agreed:
            control.should_save = control.should_training_stop = True

    def release(self) -> None:
        """Restore the previous handler of the signal."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _press(self, signal_number: int, frame: FrameType | None) -> None:
        del signal_number, frame
        if not self._trainer.stop_requested:
            self._trainer.stop_requested = True
            self._pressed_at = time.monotonic()
            if world_size() == 1:
                signal.signal(signal.SIGINT, self._before)
        elif time.monotonic() - self._pressed_at > ONE_PRESS_SECONDS:
            signal.signal(signal.SIGINT, self._before)
            raise KeyboardInterrupt
