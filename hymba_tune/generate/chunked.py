"""Batched generation for a server: prompts are computed in chunks between the steps, and prefixes are reused."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hymba_tune.generate.choosing import Chooser
from hymba_tune.generate.decoding import Decoder
from hymba_tune.generate.generation import Generation
from hymba_tune.generate.prefixes import Prefix, PrefixStore
from hymba_tune.model.cache import CACHE_NAME, HymbaCache


@dataclass(eq=False)
class _Prompt:
    """A prompt that is being computed.

    Attributes:
        generation: The generation that it belongs to.
        ends: Where its chunks end, ascending; they depend on nothing but the prompt.
        kept: The ends of prefixes to keep.
        prefix: What is computed so far; None before the first chunk.
    """

    generation: Generation
    ends: tuple[int, ...]
    kept: set[int] = field(default_factory=set)
    prefix: Prefix | None = None

    @property
    def chunk(self) -> Sequence[int]:
        """The tokens of the next chunk."""
        begin = self.prefix.length if self.prefix else 0
        end = next(end for end in self.ends if end > begin)
        return self.generation.prompt[begin:end]

    @property
    def done(self) -> bool:
        """Whether the whole prompt is computed."""
        return self.prefix is not None and self.prefix.length == len(self.generation.prompt)


class ChunkedDecoder(Decoder):
    """A decoder that never computes more than a chunk of prompts between two steps.

    Where chunks end depends on the prompt alone, and a kept prefix is the state at such an end. Continuing from it
    hence computes what would be computed without it, to the bit, as long as the same prompts share a chunk.

    Args:
        model: A model in evaluation mode.
        tokenizer: Its end token ends a sequence.
        chunk: Maximum number of prompt tokens to compute in one step.
        prefix_bytes: Maximum bytes of the prefixes that are kept; 0 keeps none.
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
        chunk: int = 128,
        prefix_bytes: int = 0,
        cuda_graphs: bool = False,
        cache_bytes: int = sys.maxsize,
    ) -> None:
        super().__init__(model, tokenizer, cuda_graphs=cuda_graphs, cache_bytes=cache_bytes)
        self._chunk = chunk
        self._prompts: list[_Prompt] = []
        self._root = self._run_meta_tokens()
        self.prefixes = PrefixStore(prefix_bytes)

    @property
    def active(self) -> list[Generation]:
        """The sequences that are not finished, including those whose prompts are being computed."""
        return [*self._rows, *(one.generation for one in self._prompts)]

    def add(self, generations: Sequence[Generation]) -> None:
        """Queue further sequences; `step` computes their prompts in this order."""
        for one in generations:
            self._prompts.append(_Prompt(one, chunk_ends(len(one.prompt), one.cuts, self._chunk)))

    @torch.inference_mode()
    def step(self) -> None:
        """Compute one chunk of prompts, then generate one token for each sequence whose prompt is complete."""
        if chosen := self._next_prompts():
            self._compute(chosen)
        finished = [(one.generation, one.prefix) for one in self._prompts if one.done and one.prefix]
        self._prompts = [one for one in self._prompts if not one.done and one.generation.error is None]
        if finished:
            caches = [prefix.cache.text(0) for _, prefix in finished]  # copied: kept prefixes stay as they are
            self._join([one for one, _ in finished], caches, torch.stack([prefix.logits for _, prefix in finished]))
        if self._rows:
            super().step()

    def drop(self, generation: Generation) -> None:
        """Remove a sequence before it is finished."""
        if any(one.generation is generation for one in self._prompts):
            generation.finish_reason = "length"
            self._prompts = [one for one in self._prompts if one.generation is not generation]
        super().drop(generation)

    @property
    def nbytes(self) -> int:
        """The bytes of the cache of all sequences now, without kept prefixes that they continue."""
        prompts = sum(one.prefix.nbytes for one in self._prompts if one.prefix)
        return prompts + self._batch.nbytes

    def nbytes_of(self, generations: Sequence[Generation]) -> int:
        """Return the bytes of the cache of these sequences when they are longest."""
        longest = max((len(one.prompt) + one.max_new_tokens for one in generations), default=0)
        return self._batch.nbytes_of(self._root, len(generations), longest)

    def nbytes_of_text(self, length: int) -> int:
        """Return the bytes of the cache of one text of this many tokens."""
        return self._batch.nbytes_of(self._root, 1, length)

    def reset(self) -> None:
        """Forget all sequences and prefixes, after an error that left no memory."""
        self._batch.clear()
        self._chooser = Chooser()
        self._rows, self._prompts = [], []
        self.prefixes.clear()

    def _next_prompts(self) -> list[_Prompt]:
        """Choose the prompts of the next chunk: as many as it has room for, at least the first one."""
        chosen: list[_Prompt] = []
        tokens = 0
        unfinished: set[tuple[int, ...]] = set()
        for one in self._prompts:
            # Of equal prompts, the others wait for what the first one leaves.
            ids = tuple(one.generation.prompt)
            if self.prefixes.keeps and ids in unfinished:
                continue
            if one.prefix is None:
                self._begin(one)
            if one.done:
                continue

            unfinished.add(ids)
            if chosen and tokens + len(one.chunk) > self._chunk:
                break
            chosen.append(one)
            tokens += len(one.chunk)
        return chosen

    def _begin(self, one: _Prompt) -> None:
        """Continue from a kept prefix, if there is one, and decide which ones to keep of this prompt."""
        prompt, cuts = one.generation.prompt, one.generation.cuts
        one.prefix = self.prefixes.find(prompt, one.ends)
        one.generation.reused = one.prefix.length if one.prefix else 0
        if self.prefixes.keeps:
            shared = self.prefixes.shared_with_recent(prompt)
            # The next turn of a chat continues the whole prompt, other chats its system prompt.
            one.kept = {len(prompt), *cuts[:1], *[end for end in one.ends if end <= shared][-1:]}

    def _compute(self, prompts: list[_Prompt]) -> None:
        """Compute the next chunk of some prompts. One that fails ends with the error; the others continue."""
        try:
            self._compute_together(prompts)
        except Exception as error:
            if len(prompts) == 1:
                prompts[0].generation.fail(error)
                return
            for one in prompts:  # one long prompt may need more memory than there is, where the others fit
                self._compute([one])

    def _compute_together(self, prompts: list[_Prompt]) -> None:
        caches = [one.prefix.cache if one.prefix else self._root for one in prompts]
        cache = caches[0].text(0)  # copied: kept prefixes stay as they are
        for other in caches[1:]:
            cache.join(other)

        chunks = [list(one.chunk) for one in prompts]
        longest = max(map(len, chunks))
        ids = torch.tensor([[0] * (longest - len(chunk)) + chunk for chunk in chunks], device=self._model.device)
        sizes = torch.tensor([len(chunk) for chunk in chunks], device=ids.device)
        mask = torch.arange(longest, device=ids.device) >= longest - sizes[:, None]
        output = self._model(ids, attention_mask=mask.long(), cache=cache, use_cache=True, logits_to_keep=1)

        for row, (one, chunk) in enumerate(zip(prompts, chunks, strict=True)):
            length = (one.prefix.length if one.prefix else 0) + len(chunk)
            one.prefix = Prefix(length, output[CACHE_NAME].text(row), output.logits[row, -1].clone())
            if length in one.kept:
                self.prefixes.keep(one.generation.prompt, one.prefix)

    @torch.inference_mode()
    def _run_meta_tokens(self) -> HymbaCache:
        """The cache of a text without tokens, from which all prompts continue."""
        ids = torch.zeros(2, 1, dtype=torch.long, device=self._model.device)
        mask = torch.tensor([[1], [0]], device=ids.device)
        output = self._model(ids, attention_mask=mask, use_cache=True, logits_to_keep=1)
        cache: HymbaCache = output[CACHE_NAME].text(1)
        return cache


def chunk_ends(length: int, cuts: Sequence[int], chunk: int) -> tuple[int, ...]:
    """Where the chunks of a prompt end: at every cut, at its end, and after every ``chunk`` tokens in between.

    The ends inside a beginning do not depend on what follows it.

    Args:
        length: The number of tokens of the prompt.
        cuts: Where it is cut, ascending.
        chunk: Maximum number of tokens of a chunk.
    """

    def ends() -> Iterator[int]:
        for begin, end in pairwise([0, *(cut for cut in cuts if 0 < cut < length), length]):
            yield from range(begin + chunk, end, chunk)
            yield end

    return tuple(ends())
