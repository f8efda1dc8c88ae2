"""The interfaces of teachers, and their outputs for a row: next-token distributions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from hymba_tune.distill.chunks import Head


class TokenDistribution(NamedTuple):
    """A teacher's next-token distributions after n of a row's tokens.

    Attributes:
        probs: ``(n, V)`` float32, at the requested temperature.
        own: ``(n,)`` float32: the log-likelihoods of the row's actual next tokens, at temperature 1.
        cut: ``(n,)`` float32: the probability mass outside the server's top-k, where ``probs`` is zero; None if
            ``probs`` is complete.
    """

    probs: Tensor
    own: Tensor
    cut: Tensor | None = None


class Outputs(Protocol):
    """A teacher's outputs for a row, or for several joined ones."""

    def __len__(self) -> int:
        """Return the number of outputs."""

    @classmethod
    def joined(cls, rows: Sequence[Self]) -> Self:
        """Join the outputs of rows, one row after the other."""

    def probabilities(self, rows: Tensor, temperature: float) -> TokenDistribution:
        """Return the next-token distributions after some of the row's tokens.

        Args:
            rows: ``(n,)`` int64: the positions of these tokens, without the last one of the row.
            temperature: The softmax temperature, above 0.
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
    """A teacher before its weights are loaded."""

    @property
    def name(self) -> str:
        """The name that messages use."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The teacher's tokenizer."""

    @property
    def context(self) -> int | None:
        """The maximum number of tokens in a row; None if unknown."""

    @property
    def parameters(self) -> int | None:
        """The number of parameters; None if unknown."""

    @property
    def config(self) -> Any:
        """The model's configuration; None if unknown."""

    @property
    def quantize(self) -> str | None:
        """The quantization scheme of the weights, if any."""

    @property
    def is_here(self) -> bool:
        """Whether it can be loaded without a download."""

    @property
    def fingerprint(self) -> str:
        """An identifier that differs between teachers with different targets."""

    @property
    def bias(self) -> str:
        """A warning about a bias of its targets; empty if there is none."""

    def load(self, device: torch.device, dtype: torch.dtype) -> Teacher:
        """Load the teacher."""


@dataclass(frozen=True, slots=True)
class HeadOutputs:
    """A loaded model's outputs; see `Outputs`.

    Attributes:
        head: The hidden states after each of L tokens, and the output layer.
        ids: ``(L,)``: the tokens.
        vocabulary: The size of the tokenizer's vocabulary. Tokens without a row of the output layer get no probability.
    """

    head: Head
    ids: Tensor
    vocabulary: int

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def joined(cls, rows: Sequence[Self]) -> Self:
        """Join rows of one teacher; see `Outputs`."""
        head = Head(torch.cat([row.head.hidden for row in rows]), rows[0].head.weight)
        return cls(head, torch.cat([row.ids for row in rows]), rows[0].vocabulary)

    def probabilities(self, rows: Tensor, temperature: float) -> TokenDistribution:
        """Return next-token distributions; see `Outputs`."""
        logits = self.head.logits(rows)
        log_probs = logits.log_softmax(-1)
        own = log_probs.gather(1, self.ids[rows + 1, None]).squeeze(1)
        probs = log_probs.exp_() if temperature == 1 else (logits / temperature).softmax(-1)
        without = self.vocabulary - probs.shape[1]
        return TokenDistribution(pad(probs, (0, without)) if without else probs, own)
