"""What a teacher says of a row it has read: at each token, how likely every next one is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hymba_tune.distill.chunks import Head


class TokenDistribution(NamedTuple):
    """A teacher's next-token distributions after n of a row's tokens.

    Attributes:
        probs: ``(n, V)`` float32, at the temperature asked for.
        own: ``(n,)`` float32: log-likelihoods of the row's own next tokens, at temperature 1.
        cut: ``(n,)`` float32: probability of the tokens that ``probs`` has at zero because nobody told; None if all
            was told.
    """

    probs: Tensor
    own: Tensor
    cut: Tensor | None = None


class Outputs(Protocol):
    """A row that a teacher has read."""

    def probabilities(self, rows: Tensor, temperature: float) -> TokenDistribution:
        """Its distributions after some of the row's tokens, none of which is the last.

        Args:
            rows: ``(n,)`` int64.
            temperature: Above 0.
        """


class Teacher(Protocol):
    """A teacher that is ready to compute.

    Attributes:
        name: The name that messages use.
        tokenizer: The teacher's tokenizer.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase

    def outputs(self, rows: Sequence[Sequence[int]]) -> Iterator[tuple[int, Outputs]]:
        """Read rows of token ids.

        Returns:
            The index of each row and the teacher's outputs for it, in whatever order is fastest.
        """

    def full_vocabulary(self, rows: Sequence[Sequence[int]]) -> list[HeadOutputs]:
        """Read rows of token ids, and return distributions over the whole vocabulary, in the order of the rows.

        Raises:
            ConfigError: If this teacher gives its most likely tokens only.
        """

    def hidden_states(self, rows: Sequence[Sequence[int]], at: Sequence[Tensor]) -> list[Tensor]:
        """Compute the hidden states at some tokens of some rows.

        Args:
            rows: Token ids, read in one batch.
            at: For each row, an int64 tensor with the positions of the tokens.

        Returns:
            ``(N, d)`` for the embeddings and after each layer, with the tokens of all rows concatenated.

        Raises:
            ConfigError: If this teacher does not give its hidden states.
        """

    def generate(
        self,
        prompts: Sequence[list[int]],
        *,
        ends: Sequence[int],
        max_new_tokens: int,
        temperature: float,
        seed: int,
        decode: Callable[[list[int]], str | None],
    ) -> list[str | None]:
        """Write an answer to each prompt.

        Args:
            prompts: Token ids.
            ends: The tokens that end an answer.
            max_new_tokens: The maximum length of an answer.
            temperature: The sampling temperature; 0 decodes greedily.
            seed: The seed of the sampling.
            decode: Turns the tokens of an answer into its text, or into None if they are not a finished text. A
                teacher that returns text itself does not call it.

        Returns:
            The text of each answer; None where an answer did not end or is not a text.
        """


class TeacherSpec(Protocol):
    """Who is to teach, before the weights are loaded."""

    @property
    def name(self) -> str:
        """What people call it."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its own."""

    @property
    def context(self) -> int | None:
        """The most tokens of a row; None if that is not known."""

    @property
    def parameters(self) -> int | None:
        """How many it has; None if that is not known."""

    @property
    def config(self) -> Any:
        """Its configuration; None if that is not known."""

    @property
    def quantize(self) -> str | None:
        """How its weights are quantized, if they are."""

    @property
    def is_here(self) -> bool:
        """Whether it can teach without a download."""

    @property
    def fingerprint(self) -> str:
        """By which its targets are told from another's."""

    @property
    def bias(self) -> str:
        """What is to be known of its targets, if they are not all that they could be."""

    def load(self, device: torch.device, dtype: torch.dtype) -> Teacher:
        """Have it teach."""


@dataclass(frozen=True, slots=True)
class HeadOutputs:
    """What a model says that is at hand.

    Attributes:
        head: Its hidden states after each of the row's L tokens, and its output layer.
        ids: ``(L,)``: the row.
    """

    head: Head
    ids: Tensor

    def probabilities(self, rows: Tensor, temperature: float) -> TokenDistribution:
        """See `Outputs`."""
        logits = self.head.logits(rows)
        log_probs = logits.log_softmax(-1)
        own = log_probs.gather(1, self.ids[rows + 1, None]).squeeze(1)
        return TokenDistribution(log_probs.exp_() if temperature == 1 else (logits / temperature).softmax(-1), own)
