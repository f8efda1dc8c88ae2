"""Checks for inputs that Hymba does not read: ignored if they have no effect, else warned of or refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from inspect import signature
from typing import Any

from transformers.utils import logging

logger = logging.get_logger(__name__)

IGNORED = frozenset(
    {
        # position_ids and cu_seq_lens_q already describe the packed rows.
        *("cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "cache_position"),
        # Some tokenizers return segment ids with every batch; Hymba has no segments.
        "token_type_ids",
        # Trainers pass these inputs of the loss and the head to the layers as well.
        *("labels", "logits_to_keep", "num_items_in_batch"),
    }
)
"""Inputs that libraries pass to every model and that Hymba does not need."""
SWITCHES = frozenset({"output_attentions", "output_router_logits"})
"""Switches for outputs that Hymba does not have, which are valid if they are off."""


def check_unread(forward: Callable[..., Any], inputs: Mapping[str, Any], *, output_attentions: bool = False) -> None:
    """Warn once of each input that a forward does not read, and refuse those that would change the result.

    Args:
        forward: The function that received the inputs; the warnings suggest its parameters.
        inputs: The inputs that are not parameters of the function.
        output_attentions: The setting of the configuration, which applies if the inputs do not contain it.

    Raises:
        ValueError: If attention weights or bidirectional attention are requested.
    """
    switch = inputs.get("output_attentions")
    if output_attentions if switch is None else switch:
        raise ValueError(
            "output_attentions=True: Hymba's kernels never hold attention weights, so they cannot be returned; "
            "leave it out"
        )
    if inputs.get("is_causal") is False:
        raise ValueError("is_causal=False: Hymba reads texts from left to right only; leave it out")

    for name, value in inputs.items():
        if value is None or name in IGNORED or name == "is_causal" or (name in SWITCHES and not value):
            continue
        close = get_close_matches(name, signature(forward).parameters, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        logger.warning_once(f"Hymba does not read the input {name!r}{hint}")
