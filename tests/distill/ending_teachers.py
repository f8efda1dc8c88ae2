"""Tokenizers and chat templates whose answers end with another token than the end-of-sequence token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hymba_tune.distill.outputs import TokenDistribution
from tests.data.small_tokenizers import CHATML, MISTRAL, byte_level, sentencepiece_like, without_markers

TURN = "{% for m in messages %}"
GEMMA = (
    "{{ bos_token }}" + TURN + "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' "
    "+ m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI = (
    TURN + "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
NOWHERE = TURN + "{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
NEXT_TURN = TURN + "{{ '<|im_start|>' + m.role + '\n' + m.content }}{% endfor %}"
TWO_ENDS = (
    TURN + "{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|im_end|>' }}{% endfor %}"
)


def gemma() -> PreTrainedTokenizerBase:
    """Its line breaks are added tokens too."""
    tokenizer = byte_level(GEMMA, ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], "<eos>", "<bos>")
    tokenizer.add_tokens(["\n\n"])
    return tokenizer


def phi() -> PreTrainedTokenizerBase:
    """Its marks take the white space after them along."""
    tokenizer = sentencepiece_like(PHI, add_bos=False)
    names = ["<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"]
    tokenizer.add_tokens([AddedToken(name, special=True, rstrip=True, normalized=False) for name in names])
    tokenizer.eos_token = "<|endoftext|>"
    return tokenizer


def qwen_base(template: str = without_markers(CHATML)) -> PreTrainedTokenizerBase:
    return byte_level(template, ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|return|>"], "<|endoftext|>")


ENDS = {
    "gemma": (gemma(), "<end_of_turn>"),
    "phi": (phi(), "<|end|>"),
    "qwen base": (qwen_base(), "<|im_end|>"),
    "a space before its end": (sentencepiece_like(MISTRAL.replace("+ eos_token", "+ ' ' + eos_token")), "</s>"),
}
"""Tokenizers, and the token with which each one's template ends an answer."""


@dataclass
class Knowing:
    """A teacher that gives 0.99 to what its template writes, as it writes it, and the rest to all other tokens.

    Attributes:
        tokenizer: With a chat template.
        messages: The conversation that it knows.
    """

    tokenizer: PreTrainedTokenizerBase
    messages: Sequence[dict[str, str]]
    name: str = "knowing"

    def outputs(self, rows: Sequence[Sequence[int]]) -> Iterator[tuple[int, Saying]]:
        text = self.tokenizer.apply_chat_template(list(self.messages), tokenize=False)
        known = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        for index, row in enumerate(rows):
            probs = torch.full((len(row), 1 + max(self.tokenizer.get_vocab().values())), 0.01 / len(self.tokenizer))
            for place in range(len(row)):
                follows = known[place + 1 : place + 2] if list(row[: place + 1]) == known[: place + 1] else []
                probs[place, follows] = 0.99
            yield index, Saying(probs, torch.tensor(row))


@dataclass
class Saying:
    """What it says of a row."""

    probs: Tensor
    row: Tensor

    def __len__(self) -> int:
        return len(self.row)

    @classmethod
    def joined(cls, rows: Sequence[Saying]) -> Saying:
        return cls(torch.cat([row.probs for row in rows]), torch.cat([row.row for row in rows]))

    def probabilities(self, rows: Tensor, temperature: float) -> TokenDistribution:
        del temperature
        return TokenDistribution(self.probs[rows], self.probs[rows, self.row[rows + 1]].log())
