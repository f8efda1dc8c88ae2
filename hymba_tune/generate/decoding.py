"""Batched generation: sequences join and leave the batch independently, each with its own sampling and stop strings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hymba_tune.errors import CheckpointError
from hymba_tune.generate.constraints import Constraint
from hymba_tune.generate.sampling import Sampling, TokenScore, penalized_logits, sampling_probabilities, token_score
from hymba_tune.model.cache import CACHE_NAME, HymbaCache


@dataclass(eq=False)
class Generation:
    """A prompt and the tokens generated for it so far.

    Attributes:
        prompt: The prompt's token ids, at least one.
        max_new_tokens: Maximum number of new tokens.
        sampling: How the next token is chosen.
        stop: Stop strings; generation ends before the first one that appears.
        stop_ids: Tokens that end the text as the end token does.
        constraint: What the text must be, such as JSON of a schema; None for any text.
        continues_prompt: Whether the text continues the prompt's text, including the space between the two. False
            decodes it as a text of its own.
        top: How many of the likeliest tokens to record at each position. None records no scores at all.
        cuts: Where prompts with the same beginning may differ, in tokens: the end of a system prompt, the beginnings
            of earlier answers. See `ChunkedDecoder`.
        number: The caller's index for this generation.
        reused: The number of prompt tokens whose state was reused.
        ids: The generated token ids, including the end token.
        scores: The recorded score of each generated token.
        finish_reason: "stop" after the end token or a stop string, "length" at ``max_new_tokens``, "error" after an
            error, None until then.
        error: The error that ended this generation; the others of its batch continue.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    constraint: Constraint | None = None
    continues_prompt: bool = False
    top: int | None = None
    cuts: tuple[int, ...] = ()
    number: int = 0
    reused: int = 0
    ids: list[int] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    finish_reason: Literal["stop", "length", "error"] | None = None
    error: Exception | None = None

    def fail(self, error: Exception) -> None:
        """End this generation with an error."""
        self.error = error
        self.finish_reason = "error"

    def text(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The generated text so far, cut before the first stop string."""
        text = self.full_text(tokenizer)
        return text[: min((place for stop in self.stop if (place := text.find(stop)) >= 0), default=len(text))]

    def full_text(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The generated text so far, including any stop string."""
        prefix = list(self.prompt[-CONTEXT:]) if self.continues_prompt else []
        skip = len(tokenizer.decode(prefix, skip_special_tokens=True)) if prefix else 0
        ids = self.ids[:-1] if self.ids and self.ids[-1] in self.stop_ids else self.ids
        return str(tokenizer.decode(prefix + ids, skip_special_tokens=True))[skip:]


CONTEXT = 8
"""Number of prompt tokens that are decoded together with a continuation."""


class Decoder:
    """Generates for a batch of sequences, one token each per step.

    Args:
        model: A model in evaluation mode.
        tokenizer: Its end token ends a sequence.

    Raises:
        CheckpointError: If no cache fits the model.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        if model.config.rope_type == "dynamic_ntk":
            raise CheckpointError(
                "rope_type dynamic_ntk rotates all keys again as a sequence grows, so sequences cannot be batched.",
                expected="a model with another rope_type, such as the released ones",
            )
        self._model = model
        self._tokenizer = tokenizer
        self._cache: HymbaCache | None = None
        self._generators: dict[Generation, torch.Generator] = {}
        self._rows: list[Generation] = []
        """The sequences of the cache, in its order."""

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

        self._join(generations, output[CACHE_NAME], output.logits[:, -1])

    def _join(self, generations: Sequence[Generation], cache: HymbaCache, logits: Tensor) -> None:
        """Add sequences to the batch, and generate the first token of each from its ``(S, V)`` logits."""
        if self._cache is None:
            self._cache = cache
        else:
            self._cache.join(cache)
        self._rows = [*self._rows, *generations]
        self._append_tokens(generations, logits)

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
        last = torch.tensor([[one.ids[-1]] for one in self._rows], device=self._model.device)
        output = self._model(last, cache=self._cache, use_cache=True)
        self._append_tokens(self._rows, output.logits[:, -1])

    def drop(self, generation: Generation) -> None:
        """Remove a sequence before it is finished."""
        if generation in self._rows:
            generation.finish_reason = "length"
            self._remove_finished()

    def _append_tokens(self, generations: Sequence[Generation], logits: Tensor) -> None:
        likeliest = logits.argmax(-1).tolist()
        finite = logits.amax(-1).isfinite().tolist()
        for one, row, greedy, is_finite in zip(generations, logits, likeliest, finite, strict=True):
            try:
                if not is_finite:
                    raise CheckpointError(
                        f"The model's logits are NaN or infinite after {len(one.prompt) + len(one.ids):,} tokens.",
                        expected="finite numbers",
                        fix="--dtype float32, or another checkpoint",
                    )
                self._append(one, row, greedy)
            except Exception as error:  # the other texts of the batch continue
                one.fail(error)
        self._remove_finished()

    def _append(self, one: Generation, logits: Tensor, greedy: int) -> None:
        """Choose the next token of one sequence from its logits ``(V,)``."""
        wanted = logits
        if one.sampling.changes_logits:
            wanted = penalized_logits(wanted, one.sampling, one.prompt, one.ids)
        if one.constraint:
            wanted = one.constraint.masked(wanted)
        if wanted is not logits:
            greedy = int(wanted.argmax())
        token = greedy if one.sampling.temperature == 0 else self._sample(one, wanted)

        one.ids.append(token)
        if one.top is not None:
            one.scores.append(token_score(logits.log_softmax(-1), token, one.top))
        if one.constraint:
            one.constraint.accept(token)

        if self._is_complete(one):
            one.finish_reason = "stop"
        elif len(one.ids) >= one.max_new_tokens:
            one.finish_reason = "length"

    def _sample(self, generation: Generation, logits: Tensor) -> int:
        generator = self._generators.get(generation)
        if generator is None:
            generator = self._generators[generation] = torch.Generator(logits.device)
            seed = generation.sampling.seed
            generator.manual_seed(int(torch.randint(2**62, ())) if seed is None else seed)

        probabilities, tokens = sampling_probabilities(logits, generation.sampling)
        return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])

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
        self._rows = [self._rows[row] for row in rows]
        self._generators = {one: own for one, own in self._generators.items() if one.finish_reason is None}
        if not rows:
            self._cache = None
        elif self._cache is not None:
            self._cache.batch_select_indices(torch.tensor(rows))


def generate_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, generations: Iterable[Generation], *, batch_size: int
) -> Iterator[Generation]:
    """Generate texts in batches of up to ``batch_size``, and yield each one as soon as it is finished.

    The first text that fails ends the iteration with its error.

    Args:
        model: A model in evaluation mode.
        tokenizer: Its end token ends a text.
        generations: What to generate; read as the batch has room.
        batch_size: Maximum number of sequences in the batch.
    """
    decoder = Decoder(model, tokenizer)
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
