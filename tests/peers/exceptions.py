"""The tests of other libraries that do not hold for Hymba, and why. Every other test has to pass."""

from __future__ import annotations

import re
from typing import NamedTuple

from tests.peers.suite import Result

ATTENTION = "Hymba has its own attention"
CACHE = "Hymba has its own cache"
PACKED = "Hymba packs the texts of a batch into one sequence of rows"


class NotApplicable(NamedTuple):
    """Tests that fail.

    Attributes:
        why: The property of Hymba that they do not expect.
        what: What does not work, and what to use.
        names: A regular expression that the names of the tests match from their beginning.
        methods: A regular expression that the methods of PEFT that they are about match in full.
        error: A regular expression that is found in their errors.
    """

    why: str
    what: str
    names: str
    methods: str
    error: str

    def covers(self, name: str, result: Result) -> bool:
        """Return whether a test that failed is one of these."""
        return bool(
            re.match(self.names, name)
            and re.fullmatch(self.methods, result.method)
            and re.search(self.error, result.reason)
        )


REFUSED = "a PEFT adapter cannot compute the hidden states of Hymba"
TABLE = [
    NotApplicable(
        ATTENTION,
        "`attn_implementation` has no effect, and a request is warned of; use `use_kernels(attention=...)`",
        "test_config_attn_implementation_setter|test_can_set_attention_dynamically",
        "",
        "Unexpected attn_implementation|False is not true",
    ),
    NotApplicable(
        CACHE,
        "prefix tuning is refused; train the meta tokens, or use prompt tuning",
        "test_",
        "prefix_tuning",
        "prefix tuning and cartridges do not work with Hymba",
    ),
    NotApplicable(PACKED, "activated LoRA is refused", "test_", "lora, activated", REFUSED),
    NotApplicable(PACKED, "ShadowPEFT is refused", "test_", "shadow", REFUSED),
    NotApplicable(
        PACKED,
        "an adapter for each row of a batch (`adapter_names`) is refused; run one batch for each adapter",
        "test_(generate_with_)?mixed_adapter_batches",
        "lora.*",
        REFUSED,
    ),
]
"""All tests that fail on a small Hymba."""
