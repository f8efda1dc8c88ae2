"""TRL's trainers of preferences for Hymba: rows that come encoded, its own head, one adapter, an exact evaluation."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import torch
import trl
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from transformers.trainer_utils import EvalLoopOutput
from trl import DPOTrainer, KTOTrainer

from hymba_tune.train.base import RunTrainer, keep_own_forward

TRL_REFERENCE = "ref"
"""TRL's name for the copy that it makes of an adapter, to compare it with."""
EXACT = ("rewards/", "logps/", "kl")
"""What TRL measures of a batch that can be averaged over answers; the rest is about tokens."""


class PreferenceTrainer(RunTrainer):
    """Stands before one of TRL's trainers of preferences among the bases."""

    def __init__(self, **kwargs: Any) -> None:
        with _quiet_trl():
            super().__init__(**kwargs)
        model = self.accelerator.unwrap_model(self.model)
        keep_own_forward(model)
        # A new adapter is no other model than the one below it: switched off, it needs no copy. One that is gone on
        # with was compared with its copy before training, when the two were the same.
        if TRL_REFERENCE in getattr(model, "peft_config", {}):
            model.delete_adapter(TRL_REFERENCE)

    def counts(self, inputs: dict[str, Any]) -> dict[str, int]:
        """How many answers, or pairs of them, each number about a batch is a mean of; by the last part of its name."""
        raise NotImplementedError

    def held_out_sums(self, inputs: dict[str, Any]) -> dict[str, tuple[Tensor | float, Tensor | float]]:
        """Return sums over the pairs or answers of a batch."""
        loss, counts = self.compute_loss(self.model, inputs), self.counts(inputs)
        sums: dict[str, tuple[Tensor | float, Tensor | float]] = {"loss": (counts["all"] * loss.item(), counts["all"])}
        for name, values in self._metrics["eval"].items():
            if name.startswith(EXACT):
                count = counts.get(name.split("/")[-1], counts["all"])
                sums[name] = (count * values[-1], count)
        self._metrics["eval"].clear()
        return sums

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """As of every run, with the margin between both means: single answers have none of their own."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        names = {name: f"{metric_key_prefix}_rewards/{name}" for name in ("chosen", "rejected", "margins")}
        if {names["chosen"], names["rejected"]} <= output.metrics.keys():
            output.metrics[names["margins"]] = output.metrics[names["chosen"]] - output.metrics[names["rejected"]]
        return output

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's loss."""
        with _quiet_trl():
            return super().compute_loss(*args, **kwargs)

    def _prepare_dataset(self, dataset: datasets.Dataset, *_: Any) -> datasets.Dataset:
        # Rows come encoded and cut.
        return dataset

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> datasets.Dataset:
        model = self.accelerator.unwrap_model(self.model)
        keep_own_forward(model)
        if isinstance(model, PeftModel):
            # TRL copies the linear layers only, not the meta tokens.
            set_peft_model_state_dict(model, get_peft_model_state_dict(model), TRL_REFERENCE)
        training = model.training
        model.eval()
        try:
            with _no_bars():
                return super()._precompute_ref_logps(*args, **kwargs)
        finally:
            model.train(training)


class PairTrainer(PreferenceTrainer, DPOTrainer):
    """Trains on rows of ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``."""

    def counts(self, inputs: dict[str, Any]) -> dict[str, int]:
        """The better answers are the first half of a batch, the worse ones the second."""
        return {"all": len(inputs["input_ids"]) // 2}


class UnpairedTrainer(PreferenceTrainer, KTOTrainer):
    """Trains on rows of ``prompt_ids``, ``completion_ids`` and ``label``."""

    def counts(self, inputs: dict[str, Any]) -> dict[str, int]:
        """Good answers, bad ones, and both."""
        labels: Tensor = inputs["label"]
        good = int(labels.sum())
        return {"all": len(labels), "chosen": good, "rejected": len(labels) - good}

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """TRL's loss, and among its metrics one that it has of pairs only: how many answers are told right."""
        with caught_scores(self.accelerator.unwrap_model(self.model)) as scores:
            loss = super()._compute_loss(model, inputs, return_outputs)
        # What computes the divergence comes before the answers, under the model as under the reference.
        policy = scores[int(self.calculate_KL)].sum(-1)
        reference = inputs["ref_logps"] if "ref_logps" in inputs else scores[-1].sum(-1)
        metrics = self._metrics["train" if self.model.training else "eval"]
        beyond = policy.detach() - reference - metrics["kl"][-1]
        right = torch.where(inputs["label"].bool(), beyond > 0, beyond < 0)
        metrics["rewards/accuracies"].append(self.accelerator.gather_for_metrics(right.float()).mean().item())
        return loss

    def _prepare_dataset(
        self, dataset: datasets.Dataset, processing_class: Any, args: trl.KTOConfig, *_: Any
    ) -> datasets.Dataset:
        del processing_class
        # KTO measures how far the model has gone from the reference on answers to other prompts: those of the same
        # batch, each handed on to the next prompt.
        if not self.calculate_KL:
            return dataset

        def hand_on(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
            answers = rows["completion_ids"]
            return {"KL_completion_ids": [answers[-1], *answers[:-1]]}

        return dataset.map(hand_on, batched=True, batch_size=args.per_device_train_batch_size)


@contextmanager
def caught_scores(model: torch.nn.Module) -> Iterator[list[Tensor]]:
    """The log-probabilities, ``(B, L - 1)`` each, that a model gives in whatever forwards it goes through meanwhile."""
    found: list[Tensor] = []
    hook = model.register_forward_hook(lambda _, __, output: found.append(output.log_probs))
    try:
        yield found
    finally:
        hook.remove()


@contextmanager
def _quiet_trl() -> Iterator[None]:
    with warnings.catch_warnings():
        # TRL calls transformers by names that transformers is leaving.
        warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing\w*` is deprecated", FutureWarning)
        yield


@contextmanager
def _no_bars() -> Iterator[None]:
    before = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = before
