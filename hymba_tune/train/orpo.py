"""Training on pairs without a reference model, by TRL's ORPO trainer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from trl.experimental import orpo

from hymba_tune.config import ORPOConfig
from hymba_tune.data import IGNORED
from hymba_tune.train.flow import train
from hymba_tune.train.preference import PreferenceRun, PreferenceTask, describe_start
from hymba_tune.train.preference_trainers import PreferenceTrainer
from hymba_tune.train.run import Run
from hymba_tune.train.screen import Screen

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
        # TRL's loss is a mean over pairs and takes no number of items: it is to be divided by the accumulated batches.
        self.model_accepts_loss_kwargs = False
        self.data_collator: Any = WithInputs(self.data_collator)

    def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, list[int]]:
        """Bring an encoded row into TRL's columns; TRL would render and tokenize it, and read nothing of templates."""
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

    def held_out_sums(self, inputs: dict[str, Any]) -> dict[str, tuple[Tensor | float, Tensor | float]]:
        """Return sums over the pairs of a batch.

        TRL averages the loss on the chosen texts over the tokens of a batch, so that it depends on which pairs are
        evaluated together. Here it is averaged over each text, then over the pairs.
        """
        with caught_logits(self.accelerator.unwrap_model(self.model)) as logits:
            _, metrics = self.get_batch_loss_metrics(self.model, inputs, "eval")

        pairs = self.counts(inputs)["all"]
        ids, mask = inputs["chosen_input_ids"], inputs["chosen_attention_mask"]
        width = ids.shape[1]
        log_probs = logits[0][:pairs, : width - 1].float().log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
        nll = -(log_probs * mask[:, 1:]).sum(1) / mask[:, 1:].sum(1)
        means = {name.removeprefix(EVAL): value for name, value in metrics.items()}
        loss = nll.sum() - pairs * self.beta * means["log_odds_ratio"]
        sums: dict[str, tuple[Tensor | float, Tensor | float]] = {"loss": (loss, pairs)}
        sums |= {name: (pairs * value, pairs) for name, value in means.items() if name.startswith("rewards/")}
        return sums

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset


class WithInputs:
    """A collator whose batches have ``input_ids`` and ``attention_mask`` too, as the run's counts and guards read them.

    Args:
        collator: TRL's collator, whose batches have those of the chosen and of the rejected texts.
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
        own = {"activation_checkpointing": "gradient_checkpointing"}
        ignored = {"activation_offloading"}
        named = {own.get(name, name): value for name, value in shared.items() if name not in ignored}
        return orpo.ORPOConfig(**named, beta=self.config.beta)

    def describe(self) -> dict[str, str]:
        """Return the banner's lines on where training starts and on the loss."""
        return describe_start(self.setup) | {"loss": f"ORPO, beta {self.config.beta:g} · no reference model"}


@contextmanager
def caught_logits(model: torch.nn.Module) -> Iterator[list[Tensor]]:
    """Collect the logits of a model's forwards within the block."""
    found: list[Tensor] = []
    hook = model.register_forward_hook(lambda _, __, output: found.append(output.logits))
    try:
        yield found
    finally:
        hook.remove()
