"""Training of a model that scores texts, on pairs of answers, by TRL's reward trainer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import trl
from torch import Tensor

from hymba_tune.config import RewardConfig
from hymba_tune.train.flow import train
from hymba_tune.train.preference import PreferenceRun, PreferenceTask
from hymba_tune.train.preference_trainers import PreferenceTrainer
from hymba_tune.train.run import Run
from hymba_tune.train.screen import Screen

METRICS = {"accuracy": "rewards/accuracies", "margin": "rewards/margins"}
"""TRL's names of this trainer's metrics, and those of its other preference trainers."""


def run_reward(config: RewardConfig, screen: Screen) -> Run | None:
    """Train a model to give the better answer of each pair the higher score; see `train`."""
    return train(PreferenceTask(config, RewardRun), screen)


class ScoreTrainer(PreferenceTrainer, trl.RewardTrainer):
    """Trains on rows of ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``; a prompt with an answer has one score."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # The loss is a mean over pairs: transformers must divide it by the number of accumulated batches.
        self.model_accepts_loss_kwargs = False
        self.data_collator: Any = WithPrompts(self.data_collator)

    def counts(self, inputs: dict[str, Any]) -> dict[str, int]:
        """Return the number of pairs: a batch holds all better texts, then all worse ones."""
        return {"all": len(inputs["input_ids"]) // 2}

    def gathered(self, values: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Return values of all processes; of the scores of a batch, more than it has rows, only the mean."""
        return super().gathered(values.mean() if values.numel() > 1 else values, inputs)

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return TRL's loss; its metrics get the names that they have in TRL's other preference trainers."""
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, usual in METRICS.items():
            metrics[usual] += metrics.pop(name, [])
        return loss

    def held_out_sums(self, inputs: dict[str, Any]) -> dict[str, tuple[Tensor | float, Tensor | float]]:
        """Return sums over the pairs of a batch."""
        loss, outputs = self.compute_loss(self.model, inputs, return_outputs=True)
        self._metrics["eval"].clear()
        better, worse = outputs.logits.squeeze(-1).chunk(2)
        pairs = len(better)
        return {
            "loss": (pairs * loss, pairs),
            "rewards/chosen": (better.sum(), pairs),
            "rewards/rejected": (worse.sum(), pairs),
            "rewards/accuracies": ((better > worse).sum(), pairs),
        }

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["prompt_ids", "chosen_ids", "rejected_ids"]


class WithPrompts:
    """A collator of rows whose prompts are columns of their own.

    Args:
        collator: TRL's collator of whole texts.
    """

    def __init__(self, collator: Any) -> None:
        self._collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate examples, the better texts before the worse ones."""
        sides = ("chosen_ids", "rejected_ids")
        batch: dict[str, Any] = self._collator(
            [{side: example["prompt_ids"] + example[side] for side in sides} for example in examples]
        )
        return batch


@dataclass(frozen=True)
class RewardRun(PreferenceRun[RewardConfig]):
    """A run that trains a reward model."""

    trainer: ClassVar[type[PreferenceTrainer]] = ScoreTrainer

    def arguments(self, shared: dict[str, Any]) -> trl.RewardConfig:
        """Return the arguments of TRL's reward trainer."""
        return trl.RewardConfig(**shared, center_rewards_coefficient=self.config.center_rewards or None)

    def describe(self) -> dict[str, str]:
        """Return the banner's line on the loss."""
        centered = self.config.center_rewards
        loss = "the better answer of a pair scores higher" + (f" · centered by {centered:g}" if centered else "")
        return {"loss": loss}
