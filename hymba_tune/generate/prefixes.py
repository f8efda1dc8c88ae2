"""Beginnings of prompts that are kept, so that other prompts continue from them."""

from __future__ import annotations

from array import array
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from hymba_tune.model.cache import HymbaCache

RECENT = 64
"""Number of prompts that a new one is compared with."""


class Prefix(NamedTuple):
    """The result of a beginning of a prompt.

    Attributes:
        length: The number of its tokens.
        cache: The cache after its last token; it is shared, so it may not be changed.
        logits: The logits ``(V,)`` of its last token.
    """

    length: int
    cache: HymbaCache
    logits: Tensor

    @property
    def nbytes(self) -> int:
        """The bytes of its tensors."""
        return self.cache.nbytes + self.logits.nbytes


class PrefixStore:
    """Keeps prefixes within a budget; those that were not used for the longest time go first.

    A prefix with an SSM state continues from its very end only, so it matters which ones are kept: those that the
    caller knows to return, and those where a prompt turns out to differ from a recent one.

    Args:
        budget: Maximum number of bytes; 0 keeps nothing.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._kept: OrderedDict[bytes, Prefix] = OrderedDict()
        self._recent: deque[np.ndarray] = deque(maxlen=RECENT)
        self.nbytes = 0
        """The bytes of all prefixes."""

    @property
    def keeps(self) -> bool:
        """Whether anything can be kept."""
        return self._budget > 0

    def find(self, prompt: Sequence[int], ends: Sequence[int]) -> Prefix | None:
        """Return the longest kept prefix of a prompt, among those that end at ``ends`` (ascending)."""
        if not self._kept:
            return None
        ids = array("q", prompt).tobytes()
        for end in reversed(ends):
            if (found := self._kept.get(ids[: 8 * end])) is not None:
                self._kept.move_to_end(ids[: 8 * end])
                return found
        return None

    def shared_with_recent(self, prompt: Sequence[int]) -> int:
        """Return how many tokens a prompt has in common with a recent one, at most; it counts as recent afterwards."""
        ids = np.array(prompt)
        longest = 0
        for other in self._recent:
            size = min(len(ids), len(other))
            differs = ids[:size] != other[:size]
            longest = max(longest, int(differs.argmax()) if differs.any() else size)
        self._recent.append(ids)
        return longest

    def keep(self, prompt: Sequence[int], prefix: Prefix) -> None:
        """Keep a prefix of a prompt, unless it is larger than the budget."""
        ids = array("q", prompt[: prefix.length]).tobytes()
        if prefix.nbytes > self._budget or ids in self._kept:
            return
        self._kept[ids] = prefix
        self.nbytes += prefix.nbytes
        while self.nbytes > self._budget:
            _, oldest = self._kept.popitem(last=False)
            self.nbytes -= oldest.nbytes

    def clear(self) -> None:
        """Forget all prefixes."""
        self._kept.clear()
        self._recent.clear()
        self.nbytes = 0
