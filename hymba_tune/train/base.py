"""What every trainer of a run does, whatever it trains on: stands before one of TRL's trainers among the bases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hymba_tune.train.checkpoints import seal
from hymba_tune.train.optimizers import Rates, parameter_groups


class RunTrainer(Trainer):
    """Learns each kind of parameter at its own rate, keeps the step at hand in sight, and seals its checkpoints.

    Attributes:
        rates: The learning rates, those of the arguments where none are given.
        held_out_sources: How many of the held-out rows are of each source, in their order; may be left out where there
            is but one.
        step_batches: Each batch of the step at hand, and its share of the step's loss.
        step_grad_norm: The norm of the step's gradient, before it was clipped.
    """

    rates: Rates | None = None
    held_out_sources: Mapping[str, int] = MappingProxyType({})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.step_batches: list[tuple[dict[str, Any], Tensor]] = []
        self.step_grad_norm: float | None = None
        super().__init__(*args, **kwargs)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The trained parameters, as the optimizer takes them."""
        return parameter_groups(
            self.model,
            self.rates or Rates(self.args.learning_rate),
            weight_decay=self.args.weight_decay,
            decayed=self.get_decay_parameter_names(self.model),
        )

    def get_optimizer_cls_and_kwargs(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Transformers' choice of an optimizer, for our groups of parameters."""
        kind, arguments = Trainer.get_optimizer_cls_and_kwargs(*args, **kwargs)
        return kind, {**arguments, "params": self.parameter_groups()}

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """All that weight decay draws to zero: not the SSM's rates A and skips D, which have no reason to be small."""
        names: list[str] = super().get_decay_parameter_names(model)
        return [name for name in names if not name.endswith((".A_log.0", ".D.0"))]

    def packed_share(self) -> float | None:
        """How much of the packed rows is filled with tokens; None where rows are not packed."""
        rows = self.train_dataset
        if "seq_lengths" not in rows.column_names:
            return None
        tokens = pc.sum(pc.list_flatten(rows.data.column("seq_lengths"))).as_py()
        return float(tokens / (len(rows) * self.args.max_length))

    def held_out_batches(self, dataloader: DataLoader[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        """The batches of the held-out rows, none of which is of two sources, each with its source's name.

        Args:
            dataloader: Of all of them.
        """
        if len(self.held_out_sources) < 2:
            yield from (("", self._prepare_inputs(batch)) for batch in dataloader)
            return
        start = 0
        for name, count in self.held_out_sources.items():
            rows = self.eval_dataset.select(range(start, start + count))
            yield from ((name, self._prepare_inputs(batch)) for batch in self.get_eval_dataloader(rows))
            start += count

    def held_out_losses(self, sums: Mapping[str, Tensor], prefix: str) -> dict[str, float]:
        """The mean loss on held-out rows and, where there are several sources, on those of each; by its logged names.

        Args:
            sums: By source ``(2,)``: the summed loss, and what it is a sum of.
            prefix: What the names begin with.
        """
        parts = {name: self.accelerator.reduce(part, "sum").tolist() for name, part in sums.items()}
        total = [sum(values) for values in zip(*parts.values(), strict=True)]
        named = {f"{prefix}_loss": total}
        if len(parts) > 1:
            named |= {f"{prefix}_loss/{name}": part for name, part in parts.items()}
        return {name: loss / count if count else 0.0 for name, (loss, count) in named.items()}

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """A batch's forward and backward, remembered until the next step begins."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self.step_batches.append((inputs, loss))
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> float:
        self.step_grad_norm = float(super()._get_grad_norm(*args, **kwargs))
        return self.step_grad_norm

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Transformers takes one step more from a checkpoint that a run's last step left within an epoch.
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        # Past TRL's, which writes a model card into every checkpoint.
        Trainer._save_checkpoint(self, model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            seal(Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")


def keep_own_forward(model: PreTrainedModel) -> None:
    """Undo what TRL's trainers do to a model: they replace its forward by one that reads the head's weight.

    The model's own knows where documents end, looks at the tokens asked for only, and is several times faster on a CPU.

    Args:
        model: With its adapter on, or without one.
    """
    vars(getattr(model, "get_base_model", lambda: model)()).pop("forward", None)


@contextmanager
def quantization_unseen(model: PreTrainedModel) -> Iterator[None]:
    """Hide from TRL's trainers while they are made that a model is quantized: they would round its adapter to bfloat16.

    Args:
        model: With its adapter on, or without one.
    """
    base = getattr(model, "get_base_model", lambda: model)()
    flags = {name: vars(base).pop(name) for name in ("is_loaded_in_4bit", "is_loaded_in_8bit") if name in vars(base)}
    try:
        yield
    finally:
        vars(base).update(flags)
