"""The trainer of students: sft's trainer with the distillation loss on hidden states."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import trl
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from hymba_tune.config.distill import Stage
from hymba_tune.data import IGNORED
from hymba_tune.distill.alignment import Alignment
from hymba_tune.distill.batches import COLUMNS, Numbered, examples_of
from hymba_tune.distill.chunks import Head, expand
from hymba_tune.distill.matching import HiddenStateLoss
from hymba_tune.distill.objective import Losses, SpanTerm, TokenTerm, distillation_loss
from hymba_tune.distill.rollouts import RolloutGenerator
from hymba_tune.distill.teacher_signals import RowSpan, TeacherSignals
from hymba_tune.distributed.processes import sums
from hymba_tune.distributed.sharding import whole_weights
from hymba_tune.model.head import HymbaHead
from hymba_tune.train.callbacks import MORE
from hymba_tune.train.even_batches import FillerBatch
from hymba_tune.train.trainer import HymbaTrainer

PARTS = {"ce": "cross_entropy", "kd": "distillation", "alm": "chunk_likelihood", "hidden": "hidden_states"}
"""The parts of the loss, and the columns of the log."""
PROJECTIONS = "projections_of_hidden_states"
"""The name of the hidden-state projections in the model that is trained."""


class DistillTrainer(HymbaTrainer):
    """Trains on rows of ``input_ids``, ``labels`` and ``row``, their number at each of their tokens.

    Args:
        signals: The source of the teacher's terms of the loss.
        stages: The stages of the run, whose shares sum to 1.
        token_bytes: ``(V,)``: the number of text bytes of each student token.
        rollouts: Generates the student's rollouts, if a stage has any.
        hidden_loss: The hidden-state loss, whose projections are trained with the student; None for none.
        kwargs: The arguments of `HymbaTrainer`.
    """

    def __init__(
        self,
        *,
        signals: TeacherSignals,
        stages: Sequence[Stage],
        token_bytes: Tensor,
        rollouts: RolloutGenerator | None = None,
        hidden_loss: HiddenStateLoss | None = None,
        **kwargs: Any,
    ) -> None:
        self._signals = signals
        self._stages = stages
        self._token_bytes = token_bytes
        self._rollouts = rollouts
        self._own: list[Alignment] = []
        self._hidden_loss = hidden_loss
        self._match = hidden_loss.match if hidden_loss else None
        self._sums: dict[str, Tensor | float] = defaultdict(float)
        super().__init__(**kwargs)
        if self._match is not None:
            self._match.to(self.args.device)
        self.data_collator: Any = Numbered(self.data_collator)

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
        """Return a step's batches, with a share of their answers replaced by rollouts of the current student."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        self._own.clear()
        if not self.stage.on_policy or self._rollouts is None:
            return batches, items
        student = self.accelerator.unwrap_model(self.model)
        mixed: list[dict[str, Any]] = []
        with whole_weights(self.model):  # each process writes as many tokens as its own answers take
            for batch in batches:
                if isinstance(batch, FillerBatch):
                    mixed.append(batch)
                    continue
                examples, own = self._rollouts.rewrite(
                    student, examples_of(batch), self.stage.on_policy, self.state.global_step, len(self._own)
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
        """Return the mean loss over learned tokens, and add its parts to the sums for the log."""
        del return_outputs
        losses = self._losses(model, inputs)
        for name, part in losses.parts.items():
            self._sums[name] += part.detach()
        self._sums["tokens"] += losses.tokens
        if num_items_in_batch is None:
            return losses.total / max(1, losses.tokens)
        # The items are those of all processes, and the gradients of these are averaged.
        return losses.total * self.accelerator.num_processes / num_items_in_batch

    def _losses(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Losses:
        read = {name: value for name, value in inputs.items() if name not in ("labels", "rows")}
        student = base_model(self.accelerator.unwrap_model(model))
        with losses_within(student, partial(self._losses_of, student, inputs)) as found:
            model(**read, skip_logits=True, output_hidden_states=self._hidden_loss is not None)
        return found[-1]

    def _losses_of(self, student: Any, inputs: dict[str, Any], outputs: BaseModelOutputWithPast) -> Losses:
        """Compute the losses from the outputs of the student's layers."""
        places = [RowSpan(row, offset) for row, offset in inputs["rows"].tolist()]
        if isinstance(inputs, FillerBatch):
            places = []
        found: list[Losses] = []

        def loss(hidden: Tensor, weight: Tensor) -> Tensor:
            found.append(self._losses_of_tokens(Head(hidden, weight), inputs["labels"].flatten(), places))
            return found[-1].total

        # A state predicts the token after it. The first token of a text has no label, because no state predicts it.
        hidden = outputs.last_hidden_state.flatten(0, 1).roll(1, 0)
        head = student.get_output_embeddings()
        total = head(hidden, loss) if isinstance(head, HymbaHead) else loss(hidden, head.weight)
        losses = replace(found[-1], total=total)
        if self._hidden_loss is None:
            return losses
        distance = self._hidden_loss(outputs.hidden_states, places, self._own)
        total = losses.total + self._hidden_loss.weight * distance
        return Losses(total, losses.tokens, losses.parts | {"hidden": distance.detach().double()})

    def _losses_of_tokens(self, student: Head, labels: Tensor, places: Sequence[RowSpan]) -> Losses:
        stage, ends = self.stage, [*(place.offset for place in places[1:]), len(labels)]
        own = torch.zeros_like(labels, dtype=torch.bool)
        for place, end in zip(places, ends, strict=False):
            own[place.offset : end] = place.row < 0
        of_data = [place for place in places if place.row >= 0]
        losses = self._teaching(student, labels.masked_fill(own, IGNORED), of_data, stage)
        if own.any():
            # Rollouts are not examples to imitate: only the teacher's loss applies to them, where it covers them.
            rollouts = [place for place in places if place.row < 0]
            on_policy = self._teaching(student, labels.masked_fill(~own, IGNORED), rollouts, replace(stage, alpha=1.0))
            losses = _sum(losses, on_policy)
        return losses

    def _teaching(self, student: Head, labels: Tensor, places: Sequence[RowSpan], stage: Stage) -> Losses:
        tokens, spans = self._signals.terms(places, stage, self._own)
        if places and places[0].row < 0:
            labels = labels.masked_fill(~_covered_by(labels, tokens, spans), IGNORED)
        has_terms = tokens is not None or spans is not None
        return distillation_loss(student, labels, alpha=stage.alpha if has_terms else 0.0, tokens=tokens, spans=spans)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; the hidden-state projections are a part of the model meanwhile, so that what wraps it wraps them."""
        if self._match is None:
            return super().train(*args, **kwargs)
        self.model.add_module(PROJECTIONS, self._match)
        try:
            return super().train(*args, **kwargs)
        finally:
            delattr(self.model, PROJECTIONS)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the groups of the student's parameters, then that of the hidden-state projections."""
        if self._match is None:
            return super().parameter_groups()
        with self._projections_aside():
            groups = super().parameter_groups()
        rate = self.rates.base if self.rates else self.args.learning_rate
        new = {"name": "projections of hidden states", "params": list(self._match.parameters())}
        return [*groups, {**new, "lr": rate, "weight_decay": 0.0}]

    @contextmanager
    def _projections_aside(self) -> Iterator[None]:
        """Leave the projections out of the model."""
        match = self.model._modules.pop(PROJECTIONS, None)
        try:
            yield
        finally:
            if match is not None:
                self.model.add_module(PROJECTIONS, match)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self._match is None:
            super()._save(output_dir, state_dict)
            return
        begin = f"{PROJECTIONS}."
        weights = {name: weight for name, weight in (state_dict or {}).items() if name.startswith(begin)}
        if state_dict is not None:
            state_dict = {name: weight for name, weight in state_dict.items() if name not in weights}
        with self._projections_aside():
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            whole = {name.removeprefix(begin): weight for name, weight in weights.items()}
            self._match.save(Path(output_dir or self.args.output_dir), whole or None)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        with self._projections_aside():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._match is not None:
            self._match.load(Path(resume_from_checkpoint))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log TRL's values, with the parts of the loss since the last row."""
        if "loss" in logs:
            logs |= self._means(sums({name: float(part) for name, part in self._sums.items()}))
            self._sums.clear()
        super().log(logs, start_time)

    def held_out_sums(self, inputs: dict[str, Any]) -> dict[str, tuple[Tensor | float, Tensor | float]]:
        """Return cross-entropy on the data as the loss, the other parts of what is minimized, and bits per byte."""
        losses, labels = self._losses(self.model, inputs), inputs["labels"]
        size = self._token_bytes.to(labels.device)[labels[labels != IGNORED]].sum()
        cross_entropy = losses.parts["ce"]
        parts = {f"{MORE}{PARTS[name]}": (part, losses.tokens) for name, part in losses.parts.items() if name != "ce"}
        bits = {f"{MORE}bits_per_byte": (cross_entropy / math.log(2), size)} if size else {}
        return {"loss": (cross_entropy, losses.tokens), **parts, **bits}

    def _means(self, total: dict[str, float]) -> dict[str, float]:
        columns = {name: column for name, column in PARTS.items() if name in total and total["tokens"]}
        return {f"{MORE}{column}": total[name] / total["tokens"] for name, column in columns.items()}

    def _prepare_dataset(
        self, dataset: datasets.Dataset, processing_class: Any, args: Any, packing: bool, *_: Any
    ) -> datasets.Dataset:
        # The rows are encoded and truncated already; TRL's own packing would drop their numbers.
        del processing_class
        dataset = dataset.select_columns(COLUMNS)
        return trl.pack_dataset(dataset, args.max_length, args.packing_strategy) if packing else dataset

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [*COLUMNS, "seq_lengths"]


def _covered_by(labels: Tensor, tokens: TokenTerm | None, spans: SpanTerm | None) -> Tensor:
    """Return ``(T,)`` bool: the tokens that a teacher's term covers."""
    covered = torch.zeros_like(labels, dtype=torch.bool)
    if tokens is not None:
        covered[tokens.at] = True
    if spans is not None:
        covered[expand(spans.spans[:, 0], spans.spans[:, 1])[1]] = True
    return covered


def _sum(one: Losses, other: Losses) -> Losses:
    parts = dict(one.parts)
    for name, part in other.parts.items():
        parts[name] = parts[name] + part if name in parts else part
    return Losses(one.total + other.total, one.tokens + other.tokens, parts)


def base_model(model: PreTrainedModel | PeftModel) -> Any:
    """Return the model without its adapter."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


@contextmanager
def losses_within(
    student: PreTrainedModel, losses_of: Callable[[BaseModelOutputWithPast], Losses]
) -> Iterator[list[Losses]]:
    """Compute losses within each forward of a model, which goes through all of its wrappers and computes no logits.

    Only there does each process have the whole of the weights, where processes share them.

    Args:
        student: The model without its adapter and wrappers.
        losses_of: Computes the losses from the outputs of the layers.

    Yields:
        The losses of the forwards so far.
    """
    found: list[Losses] = []

    def compute(_: Any, __: Any, outputs: BaseModelOutputWithPast) -> None:
        with torch.autocast(outputs.last_hidden_state.device.type, enabled=False):
            found.append(losses_of(outputs))

    def add(_: Any, __: Any, outputs: CausalLMOutputWithPast) -> CausalLMOutputWithPast:
        outputs.loss = found[-1].total  # what wraps the model prepares the backward from its outputs
        return outputs

    hooks = [
        student.base_model.register_forward_hook(compute),
        student.register_forward_hook(add, prepend=True),
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
