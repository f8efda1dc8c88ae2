"""The tests of other libraries that do not hold for Hymba, and why. Every other test has to pass."""

from __future__ import annotations

import re
from typing import NamedTuple

ATTENTION = "own attention"
CACHE = "own cache"
PACKED = "packed layout"
UPSTREAM = "upstream"
KINDS = {
    ATTENTION: "Hymba computes attention by its own kernels, which hold no attention weights",
    CACHE: "Hymba has its own cache, and no keys in front of a text other than those of its meta tokens",
    PACKED: "Hymba packs the texts of a batch into one sequence of rows",
    UPSTREAM: "the test fails on Llama as well",
}


class NotApplicable(NamedTuple):
    """Tests that fail.

    Attributes:
        group: The class of the tests.
        names: A regular expression that the names of the tests match in full.
        kind: One of `KINDS`.
        reason: What the tests need.
    """

    group: str
    names: str
    kind: str
    reason: str

    def covers(self, group: str, name: str) -> bool:
        """Return whether a test is one of these."""
        return group == self.group and re.fullmatch(self.names, name) is not None


TABLE = [
    NotApplicable(
        "PeersModelTest",
        "test_config_attn_implementation_setter|test_can_set_attention_dynamically",
        ATTENTION,
        "attn_implementation selects the attention; here use_kernels(attention=...) does, and a request is warned of",
    ),
]
"""All tests that fail on a small Hymba."""
