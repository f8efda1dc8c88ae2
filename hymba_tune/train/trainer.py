"""TRL's SFT trainer with Hymba's own loss."""

from __future__ import annotations

from typing import Any

import datasets
import torch
import trl
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer
from trl import SFTTrainer

from hymba_tune.data import LOSS_WEIGHTS
from hymba_tune.train.base import RunTrainer, keep_own_forward


class HymbaTrainer(RunTrainer, SFTTrainer):
    """Trains on rows of ``input_ids`` and ``labels``, and ``loss_weights`` where rows have them.

    With weights the loss is the weighted mean: the sum of weight times loss over the sum of weights.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        keep_own_forward(self.accelerator.unwrap_model(self.model))
        self.data_collator: Any = Weighted(self.data_collator)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the model's own loss, without logits."""
        inputs = {**inputs, "skip_logits": True}
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    def held_out_sums(self, inputs: dict[str, Any]) -> dict[str, tuple[Tensor | float, Tensor | float]]:
        """Return the summed loss and the number of learned tokens, or the sum of their weights."""
        # Not by `compute_loss`, which multiplies a sum by the number of processes.
        outputs = self.model(**inputs, skip_logits=True, num_items_in_batch=1)
        return {"loss": (outputs.loss, _targets(inputs))}

    def _prepare_dataset(
        self, dataset: datasets.Dataset, processing_class: Any, args: Any, packing: bool, *rest: Any
    ) -> datasets.Dataset:
        if not packing or LOSS_WEIGHTS not in dataset.column_names:
            return super()._prepare_dataset(dataset, processing_class, args, packing, *rest)
        # TRL's packing would drop the weights.
        columns = ["input_ids", "labels", LOSS_WEIGHTS]
        rows = dataset.select_columns(columns).map(lambda row: {LOSS_WEIGHTS: _weights(row)})
        return trl.pack_dataset(rows, args.max_length, args.packing_strategy)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["input_ids", "labels", LOSS_WEIGHTS, "seq_lengths"]

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor | int | None:
        if not batch_samples or LOSS_WEIGHTS not in batch_samples[0]:
            items: Tensor | int | None = super()._get_num_items_in_batch(batch_samples, device)
            return items
        total = torch.stack([_targets(batch) for batch in batch_samples]).sum().to(device)
        summed: Tensor = self.accelerator.reduce(total, "sum")
        return summed


class Weighted:
    """A collator that adds the weight of each label, ``loss_weights`` ``(B, L)``, where rows have weights.

    Args:
        collator: The collator of padded batches, or of packed ones of one row.
    """

    def __init__(self, collator: Any) -> None:
        self._collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate examples to a batch."""
        batch: dict[str, Any] = self._collator(examples)
        if LOSS_WEIGHTS not in examples[0]:
            return batch
        weights = [torch.tensor(_weights(example)) for example in examples]
        packed = "position_ids" in batch
        return batch | {LOSS_WEIGHTS: torch.cat(weights)[None] if packed else pad_sequence(weights, batch_first=True)}


def _weights(row: dict[str, Any]) -> list[float]:
    """Return the weight of each label of a row; one for a row without weights."""
    return row[LOSS_WEIGHTS] or [1.0] * len(row["labels"])


def _targets(inputs: dict[str, Tensor]) -> Tensor:
    """Return the number of targets of a batch, or the sum of their weights. A text's first token is never a target."""
    learned = inputs["labels"] != -100
    first = inputs["position_ids"] == 0 if "position_ids" in inputs else torch.zeros_like(learned)
    if "position_ids" not in inputs:
        first[:, 0] = True
    counted = learned & ~first
    return (counted * inputs[LOSS_WEIGHTS] if LOSS_WEIGHTS in inputs else counted).sum()
