"""The trainer of students: sft's, with a loss of its own on the model's hidden states."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import datasets
import torch
import trl
from peft import PeftModel
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.trainer_utils import EvalLoopOutput

from hymba_tune.config.distill import Stage
from hymba_tune.data import IGNORED
from hymba_tune.distill.alignment import Alignment
from hymba_tune.distill.chunks import Head, expand
from hymba_tune.distill.lessons import Lessons, Place
from hymba_tune.distill.objective import Losses, SpanTerm, TokenTerm, distillation_loss
from hymba_tune.distill.own_answers import OwnAnswers
from hymba_tune.train.callbacks import MORE
from hymba_tune.train.trainer import HymbaTrainer

COLUMNS = ["input_ids", "labels", "row"]
PARTS = {"ce": "cross_entropy", "kd": "distillation", "alm": "chunk_likelihood"}
"""The parts of the loss, and the columns that they are logged as."""


class DistillTrainer(HymbaTrainer):
    """Trains on rows of ``input_ids``, ``labels`` and ``row``, their number at each of their tokens.

    Args:
        lessons: What the teacher says of rows.
        stages: Of the run; their shares make 1.
        token_bytes: ``(V,)``: how many bytes of text each of the student's tokens spells.
        own_answers: Writes the student's own, if a stage wants such.
        kwargs: Of `HymbaTrainer`.
    """

    def __init__(
        self,
        *,
        lessons: Lessons,
        stages: Sequence[Stage],
        token_bytes: Tensor,
        own_answers: OwnAnswers | None = None,
        **kwargs: Any,
    ) -> None:
        self._lessons, self._stages, self._token_bytes = lessons, stages, token_bytes
        self._own_answers, self._own = own_answers, list[Alignment]()
        self._sums: dict[str, Tensor | float] = defaultdict(float)
        super().__init__(**kwargs)
        self.data_collator: Any = _Numbered(self.data_collator)

    @property
    def stage(self) -> Stage:
        """The stage that the next step belongs to."""
        done, before = self.state.global_step / max(1, self.args.max_steps), 0.0
        for stage in self._stages:
            before += stage.share
            if done < before - 1e-9:
                return stage
        return self._stages[-1]

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """A step's batches, a share of their answers written by the student as it is now."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        self._own.clear()
        if not self.stage.on_policy or self._own_answers is None:
            return batches, items
        student = self.accelerator.unwrap_model(self.model)
        mixed = []
        for number, batch in enumerate(batches):
            moment = self.state.global_step * self.args.gradient_accumulation_steps + number
            examples, own = self._own_answers.rewrite(
                student, _examples(batch), self.stage.on_policy, moment, len(self._own)
            )
            self._own += own
            mixed.append(self._prepare_inputs(self.data_collator(examples)))
        return mixed, self._get_num_items_in_batch(mixed, self.args.device)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The mean over learned tokens of what is minimised; its parts are remembered for the log."""
        del return_outputs
        losses = self._losses(model, inputs)
        for name, part in losses.parts.items():
            self._sums[name] += part.detach()
        self._sums["tokens"] += losses.tokens
        return losses.total / (max(1, losses.tokens) if num_items_in_batch is None else num_items_in_batch)

    def _losses(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Losses:
        labels = inputs["labels"].flatten()
        read = {name: value for name, value in inputs.items() if name not in ("labels", "rows")}
        base = base_model(self.accelerator.unwrap_model(model))
        with caught_states(base) as states:
            model(**read, skip_logits=True)
        # A state predicts the token after it; the first of a text, which none does, is never learned.
        student = Head(states[-1].flatten(0, 1).roll(1, 0), base.get_output_embeddings().weight)
        places = [Place(row, offset) for row, offset in inputs["rows"].tolist()]
        stage, ends = self.stage, [*(place.offset for place in places[1:]), len(labels)]
        own = torch.zeros_like(labels, dtype=torch.bool)
        for place, end in zip(places, ends, strict=True):
            own[place.offset : end] = place.row < 0
        data = self._taught(student, labels.masked_fill(own, IGNORED), [p for p in places if p.row >= 0], stage)
        if not own.any():
            return data
        # What the student wrote is no example to follow: the teacher alone judges it, as far as it can.
        judged = replace(stage, alpha=1.0)
        return _sum(
            data, self._taught(student, labels.masked_fill(~own, IGNORED), [p for p in places if p.row < 0], judged)
        )

    def _taught(self, student: Head, labels: Tensor, places: Sequence[Place], stage: Stage) -> Losses:
        tokens, spans = self._lessons.terms(places, stage, self._own)
        if places and places[0].row < 0:
            labels = labels.masked_fill(~_spoken_of(labels, tokens, spans), IGNORED)
        taught = tokens is not None or spans is not None
        return distillation_loss(student, labels, alpha=stage.alpha if taught else 0.0, tokens=tokens, spans=spans)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As TRL's, with the parts of the loss since the last row."""
        if "loss" in logs and self._sums["tokens"]:
            logs |= self._means(self._sums)
            self._sums.clear()
        super().log(logs, start_time)

    def evaluation_loop(
        self, dataloader: DataLoader[Any], description: str, *_: Any, metric_key_prefix: str = "eval", **__: Any
    ) -> EvalLoopOutput:
        """Means over all learned tokens: cross-entropy as the loss, the teacher's beside it, and bits per byte."""
        del description
        self.model.eval()
        names = ["tokens", "bytes", *PARTS]
        total = torch.zeros(len(names), dtype=torch.float64, device=self.args.device)
        for batch in dataloader:
            inputs = self._prepare_inputs(batch)
            with torch.no_grad(), self.compute_loss_context_manager():
                losses = self._losses(self.model, inputs)
            labels = inputs["labels"]
            size = self._token_bytes.to(labels.device)[labels[labels != IGNORED]].sum()
            known = {"tokens": losses.tokens, "bytes": size, **losses.parts}
            total += torch.stack([torch.as_tensor(known.get(name, 0.0)).to(total) for name in names])
        sums = dict(zip(names, self.accelerator.reduce(total, "sum").tolist(), strict=True))
        means = self._means({name: value for name, value in sums.items() if value}, f"{metric_key_prefix}_")
        metrics = {f"{metric_key_prefix}_loss": sums["ce"] / max(sums["tokens"], 1.0)} | means
        metrics.pop(f"{metric_key_prefix}_{MORE}{PARTS['ce']}", None)
        if sums["bytes"]:
            metrics[f"{metric_key_prefix}_{MORE}bits_per_byte"] = sums["ce"] / math.log(2) / sums["bytes"]
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(self.eval_dataset))

    def _means(self, sums: dict[str, Any], prefix: str = "") -> dict[str, float]:
        parts = {name: PARTS[name] for name in PARTS if name in sums}
        return {f"{prefix}{MORE}{column}": float(sums[name] / sums["tokens"]) for name, column in parts.items()}

    def _prepare_dataset(
        self, dataset: datasets.Dataset, processing_class: Any, args: Any, packing: bool, *_: Any
    ) -> datasets.Dataset:
        # Rows come encoded and cut; TRL's own packing leaves their numbers behind.
        del processing_class
        dataset = dataset.select_columns(COLUMNS)
        return trl.pack_dataset(dataset, args.max_length, args.packing_strategy) if packing else dataset

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [*COLUMNS, "seq_lengths"]


class _Numbered:
    """A collator whose batches say where which rows stand: ``rows``, ``(R, 2)`` int64, as `Place`."""

    def __init__(self, collator: Any) -> None:
        self._collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = self._collator(examples)
        width = batch["input_ids"].shape[1] if batch["input_ids"].shape[0] > 1 else 0
        places, end = [], 0
        for number, example in enumerate(examples):
            begin = number * width if width else end
            at = begin
            for length in example.get("seq_lengths", [len(example["input_ids"])]):
                places.append((example["row"][at - begin], at))
                at += length
            end = at
        return batch | {"rows": torch.tensor(places)}


def _examples(batch: dict[str, Any]) -> list[dict[str, Any]]:
    """What a padded batch was collated of."""
    examples = []
    for number, (row, _) in enumerate(batch["rows"].tolist()):
        read = batch["attention_mask"][number].bool()
        ids, labels = (batch[name][number][read].tolist() for name in ("input_ids", "labels"))
        examples.append({"input_ids": ids, "labels": labels, "row": [row] * len(ids)})
    return examples


def _spoken_of(labels: Tensor, tokens: TokenTerm | None, spans: SpanTerm | None) -> Tensor:
    """``(T,)`` bool: which tokens a teacher speaks of."""
    said = torch.zeros_like(labels, dtype=torch.bool)
    if tokens is not None:
        said[tokens.at] = True
    if spans is not None:
        said[expand(spans.spans[:, 0], spans.spans[:, 1])[1]] = True
    return said


def _sum(one: Losses, other: Losses) -> Losses:
    parts = dict(one.parts)
    for name, part in other.parts.items():
        parts[name] = parts[name] + part if name in parts else part
    return Losses(one.total + other.total, one.tokens + other.tokens, parts)


def base_model(model: PreTrainedModel | PeftModel) -> Any:
    """The model below an adapter, or itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


@contextmanager
def caught_states(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """The last hidden states ``(B, L, d)`` of whatever forwards a model goes through meanwhile.

    So the forward is that of the whole model, with what wraps it, and no logits are computed.
    """
    found: list[Tensor] = []
    hook = model.base_model.register_forward_hook(lambda _, __, output: found.append(output.last_hidden_state))
    try:
        yield found
    finally:
        hook.remove()
