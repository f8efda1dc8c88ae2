"""TRL's preference trainers for Hymba: encoded rows, the model's own head, one adapter and an exact evaluation."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import datasets
import torch
import trl
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from transformers.trainer_utils import EvalLoopOutput
from trl import DPOTrainer, KTOTrainer
from trl.models.utils import prepare_deepspeed

from hymba_tune.distributed.environment import world_size
from hymba_tune.distributed.processes import added, gathered_values
from hymba_tune.train.base import RunTrainer, keep_own_forward
from hymba_tune.train.even_batches import FillerBatch

TRL_REFERENCE = "ref"
"""TRL's name for its copy of an adapter, the reference."""
EXACT = ("rewards/", "logps/", "kl")
"""Prefixes of TRL's metrics that are means over the answers of a batch; the others are means over tokens."""


class PreferenceTrainer(RunTrainer):
    """Mixin; list it before the TRL preference trainer.

    Attributes:
        reference_columns: The columns of the log-probabilities under the reference model, in TRL's order.
    """

    reference_columns: ClassVar[tuple[str, ...]] = ()

    def __init__(self, **kwargs: Any) -> None:
        with quiet_trl():
            super().__init__(**kwargs)
        model = self.accelerator.unwrap_model(self.model)
        keep_own_forward(model)
        # No copy is needed: with a new adapter the reference is the model with the adapter off, and with one that is
        # trained further the log-probabilities of the reference were computed before training.
        if TRL_REFERENCE in getattr(model, "peft_config", {}):
            model.delete_adapter(TRL_REFERENCE)

    def counts(self, inputs: dict[str, Any]) -> dict[str, int]:
        """Return the number of answers or pairs behind each metric of a batch, by the last part of its name."""
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
        """Return the means of `RunTrainer`, and the margin between the mean rewards: single answers have no margin."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        names = {name: f"{metric_key_prefix}_rewards/{name}" for name in ("chosen", "rejected", "margins")}
        if {names["chosen"], names["rejected"]} <= output.metrics.keys():
            output.metrics[names["margins"]] = output.metrics[names["chosen"]] - output.metrics[names["rejected"]]
        return output

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return TRL's loss, the mean over the rows of a batch, without TRL's deprecation warnings.

        In training its mean over processes, which is what they learn, is the mean over the rows of all of them.
        """
        with quiet_trl(), self.gathering(inputs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
        if world_size() == 1 or not self.model.training:
            return loss
        rows = 0 if isinstance(inputs, FillerBatch) else self.counts(inputs)["all"]
        return loss * (rows * world_size() / added([rows])[0])

    @contextmanager
    def gathering(self, inputs: dict[str, Any]) -> Iterator[None]:
        """Let TRL gather, for its metrics, from processes whose batches have different numbers of rows.

        Accelerate's method needs equal numbers. It also takes every accumulated batch of an epoch's last step for the
        shorter last one, and drops rows.

        Args:
            inputs: The batch of this process.
        """

        def gather(values: Tensor) -> Tensor:
            return self.gathered(values, inputs)

        names = ("gather", "gather_for_metrics")
        for name in names:
            setattr(self.accelerator, name, gather)
        try:
            yield
        finally:
            for name in names:
                delattr(self.accelerator, name)

    def gathered(self, values: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Return values of the rows of all processes, without those of fillers.

        Args:
            values: ``(n,)``: those of this process's rows, or of some of them; or a single value.
            inputs: The batch of this process.
        """
        own = values.reshape(-1)
        most = max(1, self.args.train_batch_size, self.args.eval_batch_size)
        return gathered_values(own[:0] if isinstance(inputs, FillerBatch) else own, most)

    def _prepare_dataset(self, dataset: datasets.Dataset, *_: Any) -> datasets.Dataset:
        # Rows are already encoded and cut.
        return dataset

    def _precompute_ref_logps(self, dataset: datasets.Dataset, name: str, batch_size: int) -> datasets.Dataset:
        model = self.accelerator.unwrap_model(self.model)
        keep_own_forward(model)
        if isinstance(model, PeftModel):
            # TRL copies only the linear layers, not the meta tokens.
            set_peft_model_state_dict(model, get_peft_model_state_dict(model), TRL_REFERENCE)
        training = model.training
        model.eval()
        try:
            if world_size() > 1:
                return self._with_reference(dataset, batch_size)
            with _no_bars():
                return super()._precompute_ref_logps(dataset, name, batch_size)
        finally:
            model.train(training)

    def _with_reference(self, dataset: datasets.Dataset, batch_size: int) -> datasets.Dataset:
        """Add the columns of the reference. TRL's method hands them on in a file that only one process may find."""
        model = self.model
        if self.is_deepspeed_enabled:
            engine: Any = vars(self).get("_precompute_engine")
            model = self._precompute_engine = engine or prepare_deepspeed(model, self.accelerator)
        parts: list[list[Tensor]] = [[] for _ in self.reference_columns]
        for inputs in self._get_dataloader(dataset, "Reference", batch_size):
            for part, values in zip(parts, self.compute_ref_log_probs(model, inputs), strict=True):
                if values is not None:
                    part.append(self.gathered(values, inputs).cpu())

        for column, part in zip(self.reference_columns, parts, strict=True):
            if part:
                dataset = dataset.add_column(column, torch.cat(part).numpy())
        return dataset


class PairTrainer(PreferenceTrainer, DPOTrainer):
    """Trains on rows of ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``."""

    reference_columns = ("ref_chosen_logps", "ref_rejected_logps")

    def counts(self, inputs: dict[str, Any]) -> dict[str, int]:
        """Return the number of pairs: a batch holds all chosen answers, then all rejected ones."""
        return {"all": len(inputs["input_ids"]) // 2}


class UnpairedTrainer(PreferenceTrainer, KTOTrainer):
    """Trains on rows of ``prompt_ids``, ``completion_ids`` and ``label``."""

    reference_columns = ("ref_logps", "ref_KL_logps")

    def counts(self, inputs: dict[str, Any]) -> dict[str, int]:
        """Return the numbers of good answers, of bad ones, and of both."""
        labels: Tensor = inputs["label"]
        good = int(labels.sum())
        return {"all": len(labels), "chosen": good, "rejected": len(labels) - good}

    def held_out_sums(self, inputs: dict[str, Any]) -> dict[str, tuple[Tensor | float, Tensor | float]]:
        """Return sums over the answers of a batch, and the loss of each, which depends on the others of its batch."""
        sums = super().held_out_sums(inputs)
        return sums | {"loss": (self._row_losses, torch.ones_like(self._row_losses))}

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """Return TRL's loss, and add the accuracy, which TRL measures on pairs only."""
        if "ref_KL_logps" in inputs:
            inputs = {**inputs, "ref_KL_logps": self.accelerator.gather(inputs["ref_KL_logps"])}
        with caught_scores(self.accelerator.unwrap_model(self.model)) as scores:
            loss = super()._compute_loss(model, inputs, return_outputs)
        # The forward for the divergence comes before that for the answers, with the model as with the reference.
        policy = scores[int(self.calculate_KL)].sum(-1)
        reference = inputs["ref_logps"] if "ref_logps" in inputs else scores[-1].sum(-1)
        metrics = self._metrics["train" if self.model.training else "eval"]
        beyond = policy.detach() - reference - metrics["kl"][-1]
        good = inputs["label"].bool()
        right = torch.where(good, beyond > 0, beyond < 0)
        weights = torch.where(good, self.desirable_weight, self.undesirable_weight)
        self._row_losses = weights * torch.sigmoid(-self.beta * torch.where(good, beyond, -beyond))
        metrics["rewards/accuracies"].append(self.accelerator.gather_for_metrics(right.float()).mean().item())
        return loss

    def _compute_kl_logps(self, model: Any, batch: dict[str, Any]) -> Tensor | None:
        # Of the rows of all processes, as TRL takes the mean of the means of all.
        values = super()._compute_kl_logps(model, batch)
        return None if values is None else self.accelerator.gather(values)

    def _prepare_dataset(
        self, dataset: datasets.Dataset, processing_class: Any, args: trl.KTOConfig, *_: Any
    ) -> datasets.Dataset:
        del processing_class
        # KTO estimates the divergence from the reference on answers to other prompts: each prompt takes the answer
        # of the previous row of its batch, which is that of all processes.
        if not self.calculate_KL:
            return dataset

        def shift_answers(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
            answers = rows["completion_ids"]
            return {"KL_completion_ids": [answers[-1], *answers[:-1]]}

        return dataset.map(shift_answers, batched=True, batch_size=args.per_device_train_batch_size * world_size())


@contextmanager
def caught_scores(model: torch.nn.Module) -> Iterator[list[Tensor]]:
    """Collect the log-probabilities, ``(B, L - 1)`` each, of a model's forwards within the block."""
    scores: list[Tensor] = []
    hook = model.register_forward_hook(lambda _, __, output: scores.append(output.log_probs))
    try:
        yield scores
    finally:
        hook.remove()


@contextmanager
def quiet_trl() -> Iterator[None]:
    """Hide the deprecation warnings that TRL's own code causes."""
    with warnings.catch_warnings():
        # TRL uses names that transformers has deprecated.
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
