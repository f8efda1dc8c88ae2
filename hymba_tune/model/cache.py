"""What generation keeps of the texts it goes on with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .configuration_hymba import HymbaConfig
from .documents import Documents


class HymbaCache(Cache):
    """Keys and values, convolution inputs and SSM states of S texts, each of its own length.

    Layers that make keys and values keep those of their texts, windowed ones only the last window; layers that reuse
    another's keep none. Keys and values of the meta tokens are kept once for all texts. Keys lie flush at the right:
    the last column holds the newest token of every text.

    Attributes:
        lengths: ``(S,)`` tokens of each text so far, padding not counted; None before the first pass.
        meta: Keys ``(M, G, a)`` and values ``(M, G, v)`` of the meta tokens, by layer.
        keys: Keys ``(S, K, G, a)``, by layer.
        values: Values ``(S, K, G, v)``, by layer.
        tails: Last inputs of the convolutions ``(S, width - 1, E)``, by layer.
        states: SSM states ``(S, E, N)`` in float32, by layer.
    """

    is_compileable = False

    def __init__(self, config: HymbaConfig) -> None:
        super().__init__(layers=[])
        self.lengths: Tensor | None = None
        self.meta: dict[int, tuple[Tensor, Tensor]] = {}
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.tails: dict[int, Tensor] = {}
        self.states: dict[int, Tensor] = {}
        self._columns = 0
        self._window = config.sliding_window
        # A windowed layer whose keys a global one reuses has to keep them all.
        layers = range(config.num_hidden_layers)
        self._unbounded = {config.kv_source(layer) for layer in layers if config.is_global(layer)}

    def store_meta(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Keep the meta tokens' keys ``(M, G, a)`` and values ``(M, G, v)``."""
        self.meta[layer] = key.clone(), value.clone()

    def extend(self, layer: int, key: Tensor, value: Tensor, documents: Documents) -> tuple[Tensor, Tensor]:
        """Add the new tokens' keys ``(T, G, a)`` and values ``(T, G, v)``.

        Returns:
            All that the new tokens may look at, ``(S, K, G, a)`` and ``(S, K, G, v)``, flush at the right.
        """
        key = self._append(self.keys.get(layer), key, documents)
        value = self._append(self.values.get(layer), value, documents)
        columns = slice(None) if layer in self._unbounded else slice(-(self._window or 0), None)
        for held, seen in ((self.keys, key), (self.values, value)):
            kept = seen[:, columns]
            # What a first pass makes are views of a whole projection, which must not live on with them.
            held[layer] = kept.clone() if documents.past is None else kept
        return key, value

    def advance(self, documents: Documents) -> None:
        """Count the new tokens, after every layer has kept its part of them."""
        new = documents.cu_seqlens.diff()
        self.lengths = new if documents.past is None else documents.past + new
        self._columns += documents.shape[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 (every layer has seen the same)
        """Columns of input seen so far, padding counted, as `generate` counts them."""
        return self._columns

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i go on with the text that was row ``beam_idx[i]``."""
        self._map_texts(lambda held: held.index_select(0, beam_idx.to(held.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows only."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Hold every text ``repeats`` times, copies side by side."""
        self._map_texts(lambda held: held.repeat_interleave(repeats, 0))

    def reset(self) -> None:
        """Forget every text."""
        self.lengths, self._columns = None, 0
        for held in (self.meta, self.keys, self.values, self.tails, self.states):
            held.clear()

    def crop(self, max_length: int) -> None:
        """Refused: an SSM state cannot be taken back to an earlier token.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"HymbaCache cannot be cropped to {max_length} tokens: its SSM states are those of the last token. "
            "Assisted decoding needs this and does not work with Hymba."
        )

    def _append(self, held: Tensor | None, new: Tensor, documents: Documents) -> Tensor:
        grid = documents.to_grid(new)
        if held is None:
            return grid
        joined = torch.cat([held, grid], 1)
        if len(set(documents.lengths)) == 1:
            return joined
        # Shorter texts have a gap between what was held and what is new: move what was held over it.
        gaps = grid.shape[1] - documents.cu_seqlens.diff()[:, None]
        columns = torch.arange(joined.shape[1], device=joined.device)
        moved = torch.where(columns >= held.shape[1] + gaps, columns, (columns - gaps).clamp(min=0))
        return joined.gather(1, moved[..., None, None].expand_as(joined))

    def _map_texts(self, move: Callable[[Tensor], Tensor]) -> None:
        for held in (self.keys, self.values, self.tails, self.states):
            held.update({layer: move(tensor) for layer, tensor in held.items()})
        if self.lengths is not None:
            self.lengths = move(self.lengths)


def visible_keys(documents: Documents, columns: int, window: int | None) -> Tensor:
    """Which of the keys that `HymbaCache.extend` returned each new token sees.

    Args:
        documents: Texts that a cache goes on with.
        columns: K, the number of keys a text.
        window: Tokens a query looks back, or None for the whole text.

    Returns:
        ``(S, max length, K)`` bool.
    """
    assert documents.past is not None  # only continued texts are asked about
    lengths = (documents.past + documents.cu_seqlens.diff())[:, None, None]
    longest = max(documents.lengths)
    device = lengths.device
    queries = lengths - longest + torch.arange(longest, device=device)[:, None]
    keys = lengths - columns + torch.arange(columns, device=device)
    visible = (keys >= 0) & (keys <= queries)
    return visible if window is None else visible & (queries - keys <= window)
