"""Batched generation: sequences join and leave the batch independently, each with its own sampling and stop strings."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hymba_tune.errors import CheckpointError
from hymba_tune.generate.batches import GraphBatch, GrowingBatch
from hymba_tune.generate.choosing import Chooser, ChosenToken, Needs
from hymba_tune.generate.generation import Generation
from hymba_tune.model.cache import CACHE_NAME, HymbaCache


class Decoder:
    """Generates for a batch of sequences, one token each per step.

    Args:
        model: A model in evaluation mode.
        tokenizer: Its end token ends a sequence.
        cuda_graphs: Whether steps are replayed as CUDA graphs; see `GraphBatch`.
        cache_bytes: The memory for the cache, with CUDA graphs.

    Raises:
        CheckpointError: If no cache fits the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        cuda_graphs: bool = False,
        cache_bytes: int = sys.maxsize,
    ) -> None:
        if model.config.rope_type == "dynamic_ntk":
            raise CheckpointError(
                "rope_type dynamic_ntk rotates all keys again as a sequence grows, so sequences cannot be batched.",
                expected="a model with another rope_type, such as the released ones",
            )
        self._model = model
        self._tokenizer = tokenizer
        self._batch = GraphBatch(model.config, cache_bytes) if cuda_graphs else GrowingBatch()
        self._chooser = Chooser()
        self._rows: list[Generation] = []
        """The sequences of the batch, in its order."""

    @property
    def active(self) -> list[Generation]:
        """The sequences that are not finished."""
        return self._rows

    @torch.inference_mode()
    def add(self, generations: Sequence[Generation]) -> None:
        """Prefill the prompts of further sequences, and generate the first token of each.

        A sequence whose prefill fails ends with the error; the others continue.
        """
        try:
            output = self._prefill(generations)
        except Exception as error:
            if len(generations) == 1:
                generations[0].fail(error)
                return
            for one in generations:  # one long prompt may need more memory than there is, where the others fit
                self.add([one])
            return

        self._join(generations, [output[CACHE_NAME]], output.logits[:, -1])

    def _join(self, generations: Sequence[Generation], caches: Sequence[HymbaCache], logits: Tensor) -> None:
        """Add sequences to the batch, and generate the first token of each from its ``(S, V)`` logits."""
        first = len(self._rows)
        rows = [*self._rows, *generations]
        reserved = self._batch.join(caches, len(rows), max(len(one.prompt) + one.max_new_tokens for one in rows))
        self._rows = rows
        self._chooser.join(generations, logits, reserved)
        needs = self._chooser.prepare(generations, first)
        self._append_tokens(generations, self._chooser.choose(logits, needs, first), needs)

    def _prefill(self, generations: Sequence[Generation]) -> Any:
        """Run the model on the prompts; the output has their cache and their last logits."""
        longest = max(len(one.prompt) for one in generations)
        padded = [[0] * (longest - len(one.prompt)) + list(one.prompt) for one in generations]
        ids = torch.tensor(padded, device=self._model.device)
        sizes = torch.tensor([len(one.prompt) for one in generations], device=ids.device)
        mask = torch.arange(longest, device=ids.device) >= longest - sizes[:, None]

        return self._model(ids, attention_mask=mask.long(), use_cache=True, logits_to_keep=1)

    @torch.inference_mode()
    def step(self) -> None:
        """Generate one token for each sequence; finished ones leave the batch."""
        needs = self._chooser.prepare(self._rows)

        def compute(cache: HymbaCache, rows: int) -> Tensor:
            output = self._model(self._chooser.last(rows), cache=cache, use_cache=True)
            return self._chooser.choose(output.logits[:, -1], needs)

        self._append_tokens(self._rows, self._batch.run(compute, len(self._rows), needs), needs)

    @torch.inference_mode()
    def drop(self, generation: Generation) -> None:
        """Remove a sequence before it is finished."""
        if generation in self._rows:
            generation.finish_reason = "length"
            self._remove_finished()

    def _append_tokens(self, generations: Sequence[Generation], choices: Tensor, needs: Needs) -> None:
        for one, choice in zip(generations, self._chooser.read(choices, generations, needs), strict=True):
            try:
                if one.error is None:
                    self._append(one, choice)
            except Exception as error:  # the other texts of the batch continue
                one.fail(error)
        self._remove_finished()

    def _append(self, one: Generation, choice: ChosenToken) -> None:
        """Add the chosen token to a sequence."""
        if not choice.is_finite:
            raise CheckpointError(
                f"The model's logits are NaN or infinite after {len(one.prompt) + len(one.ids):,} tokens.",
                expected="finite numbers",
                fix="--dtype float32, or another checkpoint",
            )
        one.ids.append(choice.token)
        if one.top is not None and choice.score is not None:
            one.scores.append(choice.score)
        if one.constraint:
            one.constraint.accept(choice.token)

        if self._is_complete(one):
            one.finish_reason = "stop"
        elif len(one.ids) >= one.max_new_tokens:
            one.finish_reason = "length"

    def _is_complete(self, generation: Generation) -> bool:
        """Whether a text ends with its last token: an end token, a stop string, or the end of its grammar."""
        if generation.ids[-1] in (self._tokenizer.eos_token_id, *generation.stop_ids):
            return True
        if generation.constraint and generation.constraint.complete:
            return True
        text = generation.full_text(self._tokenizer) if generation.stop else ""
        return any(stop in text for stop in generation.stop)

    def _remove_finished(self) -> None:
        rows = [row for row, one in enumerate(self._rows) if one.finish_reason is None]
        if len(rows) == len(self._rows):
            return
        order = self._batch.order(rows)
        self._rows = [self._rows[row] for row in order]
        self._chooser.keep(order)
        self._batch.keep(order)


def generate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    generations: Iterable[Generation],
    *,
    batch_size: int,
    cuda_graphs: bool = False,
) -> Iterator[Generation]:
    """Generate texts in batches of up to ``batch_size``, and yield each one as soon as it is finished.

    The first text that fails ends the iteration with its error.

    Args:
        model: A model in evaluation mode.
        tokenizer: Its end token ends a text.
        generations: What to generate; read as the batch has room.
        batch_size: Maximum number of sequences in the batch.
        cuda_graphs: Whether steps are replayed as CUDA graphs.
    """
    decoder = Decoder(model, tokenizer, cuda_graphs=cuda_graphs)
    waiting = iter(generations)
    active: list[Generation] = []
    while True:
        if new := list(islice(waiting, batch_size - len(active))):
            decoder.add(new)
            active += new
        elif active:
            decoder.step()
        else:
            return
        for one in active:
            if one.error:
                raise one.error
            if one.finish_reason:
                yield one
        active = [one for one in active if not one.finish_reason]
