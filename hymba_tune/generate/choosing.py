"""The next tokens of a batch, chosen on the model's device; the CPU waits for them once a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hymba_tune.generate.generation import Generation
from hymba_tune.generate.sampling import TokenScore, penalized_logits, sampling_probabilities, sampling_rows

ALL = 0xFF
"""A byte of the bits of `Constraint.allowed` for tokens that can come next."""


class Needs(NamedTuple):
    """What some text of a step needs; what no text needs is not computed.

    Attributes:
        penalties: Whether penalties or biases change logits.
        sampling: Whether a text is sampled.
        constraints: Whether a text has a constraint.
        top: The largest number of likeliest tokens to record; None if no scores are.
    """

    penalties: bool
    sampling: bool
    constraints: bool
    top: int | None

    @classmethod
    def of(cls, generations: Sequence[Generation]) -> Needs:
        """Return what these texts need."""
        return cls(
            any(one.sampling.changes_logits for one in generations),
            any(one.sampling.temperature > 0 for one in generations),
            any(one.constraint is not None for one in generations),
            max((one.top for one in generations if one.top is not None), default=None),
        )


class ChosenToken(NamedTuple):
    """The next token of a text, whether its logits are finite, and its score if some text of the batch wants one."""

    token: int
    is_finite: bool
    score: TokenScore | None


class _Penalties(NamedTuple):
    """The buffers ``(S, V)`` of `penalized_logits`."""

    in_prompt: Tensor
    counts: Tensor
    bias: Tensor


class Chooser:
    """Chooses the next token of each text of a batch.

    What a choice depends on is in buffers on the device, with one row for each text, in the order of the batch. Their
    addresses change only in `join`, and only if the rows do not suffice.
    """

    def __init__(self) -> None:
        self._generators: list[torch.Generator | None] = []
        self._rows: Tensor | None = None
        self._last: Tensor | None = None
        self._noise: Tensor | None = None
        self._bits: Tensor | None = None
        self._penalties: _Penalties | None = None

    def join(self, generations: Sequence[Generation], logits: Tensor, rows: int) -> None:
        """Add texts to the batch.

        Args:
            generations: The texts, which have no token yet.
            logits: Logits ``(..., V)``, whose device, dtype and vocabulary the buffers have.
            rows: The least number of rows to keep.
        """
        self._make_room(logits, rows)
        assert self._rows is not None
        first = len(self._generators)
        samplings = sampling_rows([one.sampling for one in generations])
        self._rows[first : first + len(generations)] = _on_device(samplings, self._rows)
        self._generators += [_generator(one, logits.device) for one in generations]
        if Needs.of(generations).penalties:
            self._join_penalties(generations, first)

    def keep(self, rows: Sequence[int]) -> None:
        """Keep the texts of these rows, in this order."""
        self._generators = [self._generators[row] for row in rows]
        moves = [(to, row) for to, row in enumerate(rows) if to != row]
        if not moves or self._rows is None or self._last is None:
            return
        places, sources = torch.tensor(moves).T.to(self._rows.device, non_blocking=True)
        for buffer in (self._rows, self._last, *(self._penalties or ())):
            buffer[places] = buffer[sources]

    def last(self, rows: int) -> Tensor:
        """Return the last tokens of the first rows, ``(rows, 1)``."""
        assert self._last is not None
        return self._last[:rows, None]

    def prepare(self, generations: Sequence[Generation], first: int = 0) -> Needs:
        """Draw the noise and read the constraints of the next choice. One that fails ends its text with the error.

        Args:
            generations: The texts, from row ``first``.
            first: The first row.

        Returns:
            What the texts need.
        """
        assert self._noise is not None
        assert self._bits is not None
        needs = Needs.of(generations)
        for noise, generator in zip(self._noise[first:], self._generators[first:], strict=False):
            if generator is not None:
                noise.exponential_(generator=generator)
        if needs.constraints:
            allowed = torch.stack([_allowed(one, self._bits.shape[1]) for one in generations])
            self._bits[first : first + len(generations)] = _on_device(allowed, self._bits)
        return needs

    def choose(self, logits: Tensor, needs: Needs, first: int = 0) -> Tensor:
        """Choose a token for each row, without waiting for the device.

        Args:
            logits: ``(S, V)``, of the rows from ``first``.
            needs: What the texts need.
            first: The first row.

        Returns:
            The choices for `read`, one row each.
        """
        assert self._rows is not None
        assert self._last is not None
        assert self._noise is not None
        assert self._bits is not None
        here = slice(first, first + len(logits))
        wanted = logits
        if needs.penalties and self._penalties is not None:
            wanted = penalized_logits(wanted, self._rows[here], *(buffer[here] for buffer in self._penalties))
        if needs.constraints:
            wanted = wanted.masked_fill(~_unpacked(self._bits[here], wanted.shape[-1]), float("-inf"))

        tokens = wanted.argmax(-1, keepdim=True)
        if needs.sampling:
            probabilities, order = sampling_probabilities(wanted, self._rows[here])
            # The largest quotient by exponential noise is a sample, and the one that torch.multinomial draws.
            sampled = order.gather(1, (probabilities / self._noise[here]).argmax(-1, keepdim=True))
            tokens = torch.where(self._rows[here, :1] > 0, sampled, tokens)

        self._last[here] = tokens[:, 0]
        if needs.penalties and self._penalties is not None:
            counts = self._penalties.counts[here]
            counts[torch.arange(len(counts), device=counts.device), tokens[:, 0]] += 1
        return _packed(logits, tokens, needs.top)

    def read(self, choices: Tensor, generations: Sequence[Generation], needs: Needs) -> list[ChosenToken]:
        """Wait for the choices of these texts, in one copy from the device."""
        assert self._noise is not None
        numbers = choices.cpu()[: len(generations)]
        rows = numbers.tolist()
        if needs.top is None:
            return [ChosenToken(token, bool(is_finite), None) for token, is_finite in rows]

        top = needs.top
        floats = numbers[:, 2:].contiguous().view(self._noise.dtype).tolist()
        scored = []
        for one, (token, is_finite, *tokens), log_probs in zip(generations, rows, floats, strict=True):
            best = zip(tokens[1 : 1 + (one.top or 0)], log_probs[1 + top :], strict=False)
            scored.append(ChosenToken(token, bool(is_finite), TokenScore(token, log_probs[0], tuple(best))))
        return scored

    def _make_room(self, logits: Tensor, rows: int) -> None:
        if self._rows is not None and len(self._rows) >= rows:
            return
        wide = torch.promote_types(logits.dtype, torch.float32)
        vocabulary = logits.shape[-1]
        self._noise = logits.new_ones(rows, vocabulary, dtype=wide)
        self._bits = logits.new_full((rows, -(-vocabulary // 8)), ALL, dtype=torch.uint8)
        empty = (logits.new_zeros(rows, 7, dtype=wide), logits.new_zeros(rows, dtype=torch.int64))
        self._rows, self._last = (_enlarged(new, old) for new, old in zip(empty, (self._rows, self._last), strict=True))
        if self._penalties is not None:
            self._penalties = _Penalties(*map(_enlarged, self._no_penalties(), self._penalties))

    def _join_penalties(self, generations: Sequence[Generation], first: int) -> None:
        if self._penalties is None:
            self._penalties = self._no_penalties()
        in_prompt, counts, bias = self._penalties
        for row, one in enumerate(generations, first):
            if not one.sampling.changes_logits:
                continue
            for buffer in self._penalties:
                buffer[row].zero_()
            in_prompt[row, _index(one.prompt, counts)] = True
            if one.sampling.logit_bias:
                tokens, values = one.sampling.logit_bias.keys(), one.sampling.logit_bias.values()
                bias[row, _index([*tokens], counts)] = _on_device(torch.tensor([*values]), bias)

    def _no_penalties(self) -> _Penalties:
        assert self._noise is not None
        empty = torch.zeros_like(self._noise)
        return _Penalties(empty.bool(), empty.int(), empty)


def _generator(generation: Generation, device: torch.device) -> torch.Generator | None:
    """The generator of a text's own, seeded, or None for greedy decoding."""
    if generation.sampling.temperature == 0:
        return None
    seed = generation.sampling.seed
    return torch.Generator(device).manual_seed(int(torch.randint(2**62, ())) if seed is None else seed)


def _allowed(generation: Generation, size: int) -> Tensor:
    """The bits ``(size,)`` of the tokens that can come next; all of them after an error, which ends the text."""
    bits = b""
    try:
        if generation.constraint is not None:
            bits = generation.constraint.allowed()
    except Exception as error:  # the other texts of the batch continue
        generation.fail(error)
    # A model may have logits for more tokens than its tokenizer has.
    allowed = torch.zeros(size, dtype=torch.uint8) if bits else torch.full((size,), ALL, dtype=torch.uint8)
    known = torch.frombuffer(bytearray(bits[:size]), dtype=torch.uint8) if bits else allowed
    allowed[: len(known)] = known
    return allowed


def _unpacked(bits: Tensor, size: int) -> Tensor:
    """The bits ``(S, bytes)`` as ``(S, size)`` bool."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[..., None] >> places) & 1).flatten(1)[:, :size].bool()


def _packed(logits: Tensor, tokens: Tensor, top: int | None) -> Tensor:
    """The choices as one tensor of integers, with log-probabilities bit for bit, so that one copy brings all."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    integers = torch.int64 if wide.dtype == torch.float64 else torch.int32
    columns = [tokens, wide.amax(-1, keepdim=True).isfinite()]
    scores = []
    if top is not None:
        log_probs = wide.log_softmax(-1)
        best = log_probs.topk(top)
        scores = [log_probs.gather(1, tokens).view(integers), best.indices, best.values.view(integers)]
    return torch.cat([column.to(integers) for column in (*columns, *scores)], 1)


def _enlarged(new: Tensor, old: Tensor | None) -> Tensor:
    """Copy the old rows into a buffer of more rows."""
    if old is not None:
        new[: len(old)] = old
    return new


def _index(tokens: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(tokens).to(like.device, non_blocking=True)


def _on_device(rows: Tensor, like: Tensor) -> Tensor:
    """A tensor of the CPU in the dtype and on the device of a buffer, without waiting for what the device computes."""
    return rows.to(like.dtype).to(like.device, non_blocking=True)
