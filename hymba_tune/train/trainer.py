"""TRL's trainer with what Hymba needs of it: its own exact loss."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from hymba_tune.train.base import RunTrainer, keep_own_forward


class HymbaTrainer(RunTrainer, SFTTrainer):
    """Trains on rows of ``input_ids`` and ``labels``."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        keep_own_forward(self.accelerator.unwrap_model(self.model))

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The model's own loss, without logits."""
        inputs = {**inputs, "skip_logits": True}
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    def evaluation_loop(
        self, dataloader: DataLoader[Any], description: str, *_: Any, metric_key_prefix: str = "eval", **__: Any
    ) -> EvalLoopOutput:
        """The mean loss over all learned tokens, and over those of each source.

        Trainer's own loop averages batches, however many tokens they have.
        """
        del description
        self.model.eval()
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64, device=self.args.device))
        for source, inputs in self.held_out_batches(dataloader):
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = self.compute_loss(self.model, inputs, num_items_in_batch=1)
            sums[source] += torch.stack([loss.double(), _targets(inputs).double()])
        metrics = self.held_out_losses(sums, metric_key_prefix)
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(self.eval_dataset))


def _targets(inputs: dict[str, Tensor]) -> Tensor:
    """How many tokens the loss of a batch is summed over: a text's first token is never a target."""
    learned = inputs["labels"] != -100
    first = inputs["position_ids"] == 0 if "position_ids" in inputs else torch.zeros_like(learned)
    if "position_ids" not in inputs:
        first[:, 0] = True
    return (learned & ~first).sum()
