"""The cache of a batch: one that grows and shrinks with its texts, or one of fixed size for CUDA graphs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hymba_tune.errors import ConfigError
from hymba_tune.generate.choosing import Needs
from hymba_tune.model.cache import HymbaCache
from hymba_tune.model.fixed_cache import FixedCache
from hymba_tune.model.step_graphs import CaptureError, StepGraphs

Step = Callable[[HymbaCache, int], Tensor]
"""Computes a step of the texts of a cache, of which there are so many."""
SHORTEST = 256
"""The least number of tokens that a slot has room for."""
CHOICE_BYTES = 48
"""Bytes for each slot and token of the vocabulary: logits, noise, penalties, and what sorting needs."""


def sizes(count: int, length: int) -> tuple[int, int]:
    """Return the number of slots for so many texts, and the tokens of a slot for texts up to a length."""
    return bucket(count), max(SHORTEST, bucket(length))


def bucket(count: int) -> int:
    """Return the number of slots of a step of so many texts: the next power of two."""
    return 1 << (count - 1).bit_length()


class GrowingBatch:
    """A cache that grows and shrinks with the texts of a batch."""

    def __init__(self) -> None:
        self.cache: HymbaCache | None = None

    @property
    def nbytes(self) -> int:
        """The bytes of the cache now."""
        return 0 if self.cache is None else self.cache.nbytes

    def nbytes_of(self, like: HymbaCache, count: int, length: int) -> int:
        """Return the bytes of the cache of so many texts when the longest has a number of tokens."""
        return like.nbytes_of(count, length)

    def join(self, caches: Sequence[HymbaCache], count: int, length: int) -> int:
        """Add the texts of other caches, which may become this one.

        Args:
            caches: The other caches.
            count: The number of texts, these included.
            length: The largest number of tokens that one of them can have.

        Returns:
            The number of rows to reserve for what else a step reads.
        """
        del length
        for cache in caches:
            if self.cache is None:
                self.cache = cache
            else:
                self.cache.join(cache)
        return bucket(count)

    def order(self, rows: list[int]) -> list[int]:
        """Return the order in which the texts of these rows, ascending, stay."""
        return rows

    def keep(self, rows: list[int]) -> None:
        """Keep the texts of these rows, in an order from `order`."""
        if not rows:
            self.cache = None
        elif self.cache is not None:
            self.cache.batch_select_indices(torch.tensor(rows))

    def run(self, step: Step, count: int, needs: Needs) -> Tensor:
        """Run a step of all texts."""
        del needs
        assert self.cache is not None
        return step(self.cache, count)

    def clear(self) -> None:
        """Forget all texts."""
        self.cache = None


class GraphBatch:
    """A cache of fixed size, whose steps are replayed as CUDA graphs.

    It gets larger when a text joins that does not fit, and all steps are then captured again. Sizes are powers of two,
    so that this is rare.

    Args:
        config: The configuration of the model.
        limit: The most bytes that are used beyond what the texts need, so that the sizes change less often.
    """

    def __init__(self, config: Any, limit: int = sys.maxsize) -> None:
        self.cache: FixedCache | None = None
        self._config = config
        self._limit = limit
        self._graphs = StepGraphs()
        self._views: dict[int, FixedCache] = {}

    @property
    def nbytes(self) -> int:
        """The bytes of the cache now, and of what else a step needs."""
        return 0 if self.cache is None else self.cache.nbytes + self.cache.slots * self._choice_bytes

    def nbytes_of(self, like: HymbaCache, count: int, length: int) -> int:
        """Return the bytes for so many texts when the longest has a number of tokens."""
        if not count:
            return 0
        slots, length = sizes(count, length)
        return like.nbytes_of(slots, length) + slots * self._choice_bytes

    def join(self, caches: Sequence[HymbaCache], count: int, length: int) -> int:
        """Write the texts of other caches into free slots; see `GrowingBatch.join`."""
        cache = self._with_room(caches[0], *sizes(count, length))
        for other in caches:
            cache.join(other)
        return cache.slots

    def order(self, rows: list[int]) -> list[int]:
        """Fill the slots of the texts that leave with the last ones, so that few texts move."""
        stay = [row for row in rows if row < len(rows)]
        moved = iter(rows[len(stay) :])
        kept = set(stay)
        return [row if row in kept else next(moved) for row in range(len(rows))]

    def keep(self, rows: list[int]) -> None:
        """Keep the texts of these rows, in an order from `order`; the buffers and the graphs stay."""
        if self.cache is not None:
            self.cache.batch_select_indices(torch.tensor(rows, dtype=torch.int64))

    def run(self, step: Step, count: int, needs: Needs) -> Tensor:
        """Run a step of the first slots, as many as the bucket of all texts has.

        Raises:
            ConfigError: If the step cannot be captured.
        """
        assert self.cache is not None
        slots = bucket(count)
        if slots not in self._views:
            self._views[slots] = self.cache.first(slots)
        view = self._views[slots]
        try:
            return self._graphs.run((slots, needs), lambda: step(view, slots))
        except CaptureError as error:
            raise ConfigError(
                f"--cuda-graphs: a step of generation cannot be captured: {error}.",
                expected="kernels that do not wait for the GPU",
                fix="leave out --cuda-graphs",
            ) from error

    def clear(self) -> None:
        """Forget all texts and graphs."""
        self._graphs.clear()
        self._views.clear()
        self.cache = None

    @property
    def _choice_bytes(self) -> int:
        return int(self._config.vocab_size) * CHOICE_BYTES

    def _with_room(self, like: HymbaCache, slots: int, length: int) -> FixedCache:
        """Return the cache, replaced by a larger one if it has fewer slots or shorter ones."""
        old = self.cache
        if old is not None and old.slots >= slots and old.length >= length:
            return old
        if old is not None:
            both = max(slots, old.slots), max(length, old.length)
            if self.nbytes_of(like, *both) <= self._limit:
                slots, length = both
        self.clear()
        if old is not None and not old.count:
            old = None  # its memory is free for the new one
        self.cache = FixedCache(self._config, like, slots, length)
        if old is not None:
            self.cache.join(old)
        return self.cache
