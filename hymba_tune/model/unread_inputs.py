"""Inputs of a forward that Hymba does not read: passed over where that changes nothing, else warned of or refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from inspect import signature
from typing import Any

from transformers.utils import logging

logger = logging.get_logger(__name__)

PASSED_OVER = frozenset(
    {
        # How packed rows are laid out, which position_ids and cu_seq_lens_q say already.
        *("cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "cache_position"),
        # Some tokenizers return them with every batch; there are no segments here.
        "token_type_ids",
        # The loss's and the head's, of which trainers tell the layers too.
        *("labels", "logits_to_keep", "num_items_in_batch"),
    }
)
"""What the libraries pass to every model, and what Hymba can do without."""
SWITCHES = frozenset({"output_attentions", "output_router_logits"})
"""Outputs that Hymba does not have; switched off, they are not missed."""


def check_unread(forward: Callable[..., Any], given: Mapping[str, Any], *, output_attentions: bool = False) -> None:
    """Warn once of each input that a forward does not read, and refuse those without which the result is another one.

    Args:
        forward: What they were given to; its parameters are suggested instead.
        given: Inputs that are no parameters of it.
        output_attentions: What the configuration says, where they do not.

    Raises:
        ValueError: If attention weights or attention in both directions are requested.
    """
    switch = given.get("output_attentions")
    if output_attentions if switch is None else switch:
        raise ValueError(
            "output_attentions=True: Hymba's kernels never hold attention weights, so there are none to return; "
            "leave it out"
        )
    if given.get("is_causal") is False:
        raise ValueError("is_causal=False: Hymba reads texts from left to right only; leave it out")
    for name, value in given.items():
        if value is None or name in PASSED_OVER or name == "is_causal" or (name in SWITCHES and not value):
            continue
        close = get_close_matches(name, signature(forward).parameters, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        logger.warning_once(f"Hymba does not read the input {name!r}{hint}")
