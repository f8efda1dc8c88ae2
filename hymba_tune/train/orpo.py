"""Training on pairs without a reference model, by TRL's ORPO trainer."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from trl.import_utils import TRLExperimentalWarning

from hymba_tune.config import ORPOConfig
from hymba_tune.data import IGNORED
from hymba_tune.train.flow import train
from hymba_tune.train.preference import PreferenceRun, PreferenceTask, describe_start
from hymba_tune.train.preference_trainers import PreferenceTrainer
from hymba_tune.train.run import Run
from hymba_tune.train.screen import Screen

with warnings.catch_warnings():
    # TRL warns at this import that the trainer may change; the tests of the loss would notice.
    warnings.simplefilter("ignore", TRLExperimentalWarning)
    from trl.experimental import orpo

EVAL = "eval_"


def run_orpo(config: ORPOConfig, screen: Screen) -> Run | None:
    """Train a model on pairs of answers without a reference model; see `train`."""
    return train(PreferenceTask(config, ORPORun), screen)


class OddsRatioTrainer(PreferenceTrainer, orpo.ORPOTrainer):
    """Trains on rows of ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``.

    TRL's loss on the chosen text covers its prompt too.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # The loss is a mean over pairs: transformers must divide it by the number of accumulated batches.
        self.model_accepts_loss_kwargs = False
        self.data_collator: Any = WithInputs(self.data_collator)

    def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, list[int]]:
        """Return an encoded row in TRL's columns. TRL's own method would tokenize texts, without the chat template."""
        del model
        prompt = feature["prompt_ids"]
        columns: dict[str, list[int]] = {}
        for name in ("chosen", "rejected"):
            answer = feature[f"{name}_ids"]
            columns |= {
                f"{name}_input_ids": prompt + answer,
                f"{name}_attention_mask": [1] * (len(prompt) + len(answer)),
                f"{name}_labels": [IGNORED] * len(prompt) + answer,
            }
        return columns

    def counts(self, inputs: dict[str, Any]) -> dict[str, int]:
        """Return the number of pairs."""
        return {"all": len(inputs["chosen_labels"])}

    def concatenated_forward(self, model: Any, batch: dict[str, Any]) -> tuple[Tensor, ...]:
        """Return TRL's outputs, with the mean over texts of the mean loss on each chosen text.

        TRL averages over the tokens of all chosen texts of a batch, so that the loss and its gradient depend on which
        pairs are in a batch together.
        """
        *outputs, _ = super().concatenated_forward(model, batch)
        ids, mask = batch["chosen_input_ids"], batch["chosen_attention_mask"]
        labels = torch.where(mask == 1, ids, IGNORED)[:, 1:]
        chosen_logits = outputs[2][:, : labels.shape[1]]  # TRL pads the chosen texts to the longest rejected one

        # TRL shifts labels but those of encoder-decoder models; these are shifted already.
        shifted = {"is_encoder_decoder": True}
        log_probs = self.get_batch_logps(chosen_logits.float(), labels, average_log_prob=True, **shifted)
        return *outputs, -log_probs.mean()

    def held_out_sums(self, inputs: dict[str, Any]) -> dict[str, tuple[Tensor | float, Tensor | float]]:
        """Return sums over the pairs of a batch."""
        with self.gathering(inputs):
            loss, metrics = self.get_batch_loss_metrics(self.model, inputs, "eval")
        pairs = self.counts(inputs)["all"]
        sums: dict[str, tuple[Tensor | float, Tensor | float]] = {"loss": (pairs * loss, pairs)}
        for name, mean in metrics.items():
            measure = name.removeprefix(EVAL)
            if measure.startswith("rewards/"):
                sums[measure] = (pairs * mean, pairs)
        return sums


class WithInputs:
    """A collator that adds ``input_ids`` and ``attention_mask`` of all texts, which token counts and guards read.

    Args:
        collator: TRL's collator, which returns those columns for chosen and rejected texts separately.
    """

    def __init__(self, collator: Any) -> None:
        self._collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate examples, the chosen texts before the rejected ones."""
        batch: dict[str, Any] = self._collator(examples)
        for name in ("input_ids", "attention_mask"):
            texts = [text for side in ("chosen", "rejected") for text in batch[f"{side}_{name}"]]
            batch[name] = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        return batch


@dataclass(frozen=True)
class ORPORun(PreferenceRun[ORPOConfig]):
    """A run of ORPO."""

    trainer: ClassVar[type[PreferenceTrainer]] = OddsRatioTrainer

    def arguments(self, shared: dict[str, Any]) -> orpo.ORPOConfig:
        """Return the arguments of TRL's ORPO trainer."""
        arguments = {name: value for name, value in shared.items() if name != "activation_offloading"}
        return orpo.ORPOConfig(**arguments, beta=self.config.beta, remove_unused_columns=False)

    def describe(self) -> dict[str, str]:
        """Return the banner's lines on where training starts and on the loss."""
        return describe_start(self.setup) | {"loss": f"ORPO, beta {self.config.beta:g} · no reference model"}
