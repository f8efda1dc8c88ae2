"""The packed layout: the meta tokens, then all texts of a batch one after the other, without padding.

The meta tokens are document zero. They are computed once, because they do not depend on a text, and every text
continues from them: it sees their keys and values, its convolution starts from their last inputs, and its SSM starts
from their last state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

NO_PREFIX = (
    "PEFT's prefix tuning and cartridges do not work with Hymba: train the meta tokens, which are a learned prefix of "
    "every text, or use prompt tuning"
)
"""What to tell users of methods that put keys and values in front of a text."""


def to_device(numbers: Sequence[int] | Tensor, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Return integers, or a tensor of the CPU, on a device without waiting for it, as ``torch.tensor`` would.

    Raises:
        RuntimeError: If a CUDA graph is captured: its replays would copy them from memory that is free by then.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("the layout of the texts is not on the device")
    on_host = numbers if isinstance(numbers, Tensor) else torch.tensor(numbers, dtype=dtype, device="cpu")
    return on_host.to(device, non_blocking=True)


@dataclass(frozen=True, eq=False)
class Documents:
    """The layout of the texts of one forward pass.

    The rows of the packed hidden states are the meta tokens (none if a cache holds them), then the T tokens of S texts.

    Attributes:
        shape: The shape ``(B, L)`` of the inputs.
        token_indices: ``(T,)``, the indices of the text tokens in the flattened inputs, or None if there is no padding.
        cu_seqlens: ``(S + 1,)`` int64, the offsets of the texts among the T tokens.
        lengths: The number of tokens of each text.
        num_meta: The number of rows of meta tokens in front of the texts.
        positions: ``(num_meta + T,)`` int64, the positions for RoPE; each text starts at the number of meta tokens.
        past: ``(S,)`` int64, the number of cached tokens of each text, or None without a cache.
    """

    shape: tuple[int, int]
    token_indices: Tensor | None
    cu_seqlens: Tensor
    lengths: tuple[int, ...]
    num_meta: int
    positions: Tensor
    past: Tensor | None = None

    def check_device(self, device: torch.device) -> None:
        """Check that a layer is on the device of the texts, which it is not where a model is divided among GPUs.

        Raises:
            ValueError: If it is on another one.
        """
        if self.cu_seqlens.device != device:
            raise ValueError(
                f"a layer is on {device} and the texts are on {self.cu_seqlens.device}: Hymba computes on one device; "
                'load it with device_map={"": 0}, or offload layers to the CPU or the disk'
            )

    @cached_property
    def ids(self) -> Tensor:
        """Return ``(T,)``: the index of the text that each token belongs to."""
        texts = torch.arange(len(self.lengths), device=self.cu_seqlens.device)
        if self.has_one_token_each:
            return texts
        return texts.repeat_interleave(self.cu_seqlens.diff(), output_size=self.starts[-1])

    @cached_property
    def has_one_token_each(self) -> bool:
        """Return whether every text has one token, as in a step of generation."""
        return all(length == 1 for length in self.lengths)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Return the index of the first token of each text among the T tokens, followed by T."""
        starts = [0]
        for length in self.lengths:
            starts.append(starts[-1] + length)
        return tuple(starts)

    @cached_property
    def slots(self) -> Tensor:
        """Return ``(T,)``: the index of each token in a flattened, left-padded ``(S, max length)`` grid."""
        longest = max(self.lengths)
        offsets = torch.arange(self.starts[-1], device=self.cu_seqlens.device) - self.cu_seqlens[1:][self.ids]
        return (self.ids + 1) * longest + offsets

    def to_grid(self, packed: Tensor) -> Tensor:
        """Arrange ``(T, ...)`` tokens as ``(S, max length, ...)``, with zeros in front of the shorter texts."""
        count, longest = len(self.lengths), max(self.lengths)
        if count * longest == packed.shape[0]:
            return packed.view(count, longest, *packed.shape[1:])
        grid = packed.new_zeros(count * longest, *packed.shape[1:])
        grid = grid.index_copy(0, self.slots, packed)
        return grid.view(count, longest, *packed.shape[1:])

    def from_grid(self, grid: Tensor) -> Tensor:
        """Undo `to_grid`."""
        flat = grid.flatten(0, 1)
        return flat if flat.shape[0] == self.starts[-1] else flat[self.slots]

    @cached_property
    def behind_meta(self) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        """Return the layout in which every text has its own copy of the meta tokens in front.

        Returns:
            The ``(S * M + T,)`` packed rows that form this layout; the ``(M + T,)`` index in it of each packed row,
            that of a meta token in front of the first text; and the ``S + 1`` offsets of its texts.
        """
        device = self.cu_seqlens.device
        meta, total = self.num_meta, self.starts[-1]
        offsets = tuple(start + meta * text for text, start in enumerate(self.starts))
        tokens = torch.arange(meta + total, device=device)
        places = torch.cat([tokens[:meta], tokens[:total] + (self.ids + 1) * meta])
        own = to_device(offsets[:-1], device)[:, None] + tokens[:meta]
        rows = tokens.new_empty(offsets[-1])
        rows[own] = tokens[:meta].expand_as(own)
        rows[places[meta:]] = tokens[meta:]
        return rows, places, offsets

    def pack(self, inputs: Tensor) -> Tensor:
        """Select the ``(T, ...)`` text tokens from ``(B, L, ...)`` inputs."""
        flat = inputs.flatten(0, 1)
        return flat if self.token_indices is None else flat[self.token_indices]

    def unpack(self, packed: Tensor) -> Tensor:
        """Arrange ``(T, ...)`` text tokens as ``(B, L, ...)``, with zeros at padding."""
        if self.token_indices is not None:
            empty = packed.new_zeros(self.shape[0] * self.shape[1], *packed.shape[1:])
            packed = empty.index_copy(0, self.token_indices, packed)
        return packed.view(*self.shape, *packed.shape[1:])

    def next_labels(self, labels: Tensor) -> Tensor:
        """Return the label that each text token predicts: that of the next token, and -100 at the end of a text.

        Args:
            labels: ``(B, L)``, -100 at tokens without loss.

        Returns:
            ``(T,)``.
        """
        successors = self.pack(labels).roll(-1)
        return successors.index_fill(0, self.cu_seqlens[1:] - 1, -100)

    def select(self, texts: list[int]) -> tuple[Documents, Tensor]:
        """Return the layout of some of the texts, and the ``(T',)`` indices of their tokens among the T tokens."""
        device = self.cu_seqlens.device
        tokens = torch.cat([torch.arange(self.starts[i], self.starts[i + 1], device=device) for i in texts])
        lengths = [self.lengths[i] for i in texts]
        return _layout(lengths, self.num_meta, (1, len(tokens)), None, device), tokens


def _layout(
    lengths: list[int], num_meta: int, shape: tuple[int, int], token_indices: Tensor | None, device: torch.device
) -> Documents:
    """Return the layout of texts of these lengths, in order, after ``num_meta`` meta tokens."""
    cu_seqlens = to_device([0, *lengths], device).cumsum(0)
    in_text = torch.arange(sum(lengths), device=device) - cu_seqlens[:-1].repeat_interleave(
        cu_seqlens.diff(), output_size=sum(lengths)
    )
    positions = torch.cat([torch.arange(num_meta, device=device), num_meta + in_text])
    return Documents(shape, token_indices, cu_seqlens, tuple(lengths), num_meta, positions)


def find_documents(
    shape: tuple[int, int],
    device: torch.device,
    *,
    num_meta: int,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    may_be_empty: bool = False,
) -> Documents:
    """Find the texts in a batch.

    Args:
        shape: The shape ``(B, L)`` of the inputs.
        device: The device of the inputs.
        num_meta: The number of meta tokens in front of every text.
        attention_mask: ``(B, L)``, 0 at padding, on either side. Without the arguments below, each row is one text.
        position_ids: ``(B, L)`` or ``(1, L)``; a text begins wherever the positions restart at 0.
        cu_seqlens: ``(S + 1,)`` offsets of the texts in the flattened inputs.
        may_be_empty: Whether a row may be all padding. With a cache, the tokens of such a text can follow later.

    Raises:
        ValueError: If a row is all padding without ``may_be_empty``, positions neither restart at 0 nor increase by
            one, or a shape is wrong.
    """
    batch, length = shape
    if batch * length == 0:
        raise ValueError(f"the inputs have shape {shape}; expected at least one token")

    token_indices = None
    row_lengths = [length] * batch
    if attention_mask is not None:
        if attention_mask.ndim == 2 and attention_mask.shape[1] > length:
            raise ValueError(
                f"attention_mask has {attention_mask.shape[1]} columns for {length} tokens; expected as many, since no "
                f"cache holds earlier tokens. {NO_PREFIX}"
            )
        mask = _checked_mask(attention_mask, (batch, length))
        row_lengths = mask.sum(1).tolist()
        if 0 in row_lengths and not (may_be_empty and any(row_lengths)):
            raise ValueError(
                f"row {row_lengths.index(0)} of attention_mask is all padding; expected at least one token"
            )
        if sum(row_lengths) < batch * length:
            token_indices = mask.flatten().nonzero().squeeze(1)

    lengths = row_lengths
    if cu_seqlens is not None:
        lengths = _lengths_from_offsets(cu_seqlens, sum(row_lengths))
    elif position_ids is not None:
        if tuple(position_ids.shape) not in ((batch, length), (1, length)):
            raise ValueError(
                f"position_ids has shape {tuple(position_ids.shape)}; expected {(batch, length)} or {(1, length)}"
            )
        positions = position_ids.cpu().expand(batch, length).flatten()
        lengths = _lengths_from_positions(positions if token_indices is None else positions[token_indices], row_lengths)
    token_indices = None if token_indices is None else to_device(token_indices, device)
    return _layout(lengths, num_meta, shape, token_indices, device)


def continue_documents(
    shape: tuple[int, int], past: Tensor, *, num_meta: int, attention_mask: Tensor | None = None
) -> Documents:
    """Find the new tokens of the texts in a cache: row i continues text i.

    Args:
        shape: The shape ``(B, L)`` of the new inputs.
        past: ``(B,)`` int64, the number of tokens of each text in the cache.
        num_meta: The number of meta tokens in front of every text, which are in the cache.
        attention_mask: ``(B, earlier columns + L)`` or ``(B, L)``, 0 at padding.

    Raises:
        ValueError: If the cache holds a different number of texts, or the mask has a wrong shape.
    """
    batch, length = shape
    if past.shape[0] != batch:
        raise ValueError(f"the cache holds {past.shape[0]} texts; expected {batch}, one for each row of the inputs")

    if length == 1 and attention_mask is None:
        # A step of generation, which is computed on the device alone: a CUDA graph replays it without the CPU.
        offsets = torch.arange(batch + 1, device=past.device)
        return Documents(shape, None, offsets, (1,) * batch, 0, num_meta + past, past)

    token_indices = None
    lengths = [length] * batch
    if attention_mask is not None:
        mask = _checked_mask(attention_mask[:, -length:], shape)
        lengths = mask.sum(1).tolist()
        if sum(lengths) < batch * length:
            token_indices = to_device(mask.flatten().nonzero().squeeze(1), past.device)

    # In text i, a new token comes after the meta tokens, the cached tokens of i, and the earlier new tokens of i.
    cu_seqlens = to_device([0, *lengths], past.device).cumsum(0)
    first = num_meta + past - cu_seqlens[:-1]
    total = sum(lengths)
    positions = torch.arange(total, device=past.device) + first.repeat_interleave(cu_seqlens.diff(), output_size=total)
    return Documents(shape, token_indices, cu_seqlens, tuple(lengths), 0, positions, past)


def _checked_mask(mask: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the mask on the CPU, which needs it for the lengths: each look at a mask on a GPU would wait for it."""
    if tuple(mask.shape) != shape:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; expected {shape}, 1 at tokens and 0 at padding"
        )
    return mask.bool().cpu()


def _lengths_from_offsets(cu_seqlens: Tensor, tokens: int) -> list[int]:
    offsets = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(offsets)]
    if offsets[0] != 0 or offsets[-1] != tokens or min(lengths) <= 0:
        raise ValueError(
            f"cu_seq_lens_q is {offsets}; expected offsets that rise from 0 to the {tokens} tokens of the batch"
        )
    return lengths


def _lengths_from_positions(positions: Tensor, row_lengths: list[int]) -> list[int]:
    """Return the lengths of the texts from ``(T,)`` positions on the CPU."""
    begins = positions == 0
    continues = positions == torch.cat([positions[:1], positions[:-1] + 1])
    row_starts = torch.tensor([0, *row_lengths], device="cpu").cumsum(0)
    continues[row_starts[:-1]] = False
    if not (begins | continues).all():
        wrong = int((~(begins | continues)).nonzero()[0])
        row = int(torch.searchsorted(row_starts, wrong, right=True)) - 1
        raise ValueError(
            f"position_ids of row {row} jump to {int(positions[wrong])} at its token {wrong - int(row_starts[row])}; "
            "expected them to start at 0, to increase by one, and to restart at 0 where another text begins"
        )
    offsets = [*begins.nonzero().squeeze(1).tolist(), len(positions)]
    return [end - start for start, end in pairwise(offsets)]
