"""Many texts written at once: each goes its own way, ends when it is done, and makes room for the next."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hymba_tune.errors import CheckpointError
from hymba_tune.model.cache import CACHE_NAME, HymbaCache


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    Attributes:
        temperature: 0 takes the likeliest.
        top_p: From the likeliest tokens that together have this probability.
        seed: The same one chooses the same tokens, whatever is written beside; None draws it from torch's own.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


@dataclass(frozen=True)
class TokenScore:
    """A token's log-probability behind all before it, nats, and the likeliest tokens there, likeliest first."""

    token: int
    log_prob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False)
class Writing:
    """A text that is being written.

    Attributes:
        prompt: Token ids that it goes on from, at least one.
        max_new_tokens: Tokens it may have.
        sampling: How they are chosen.
        stop: It ends before the first of these that it comes to.
        goes_on: Whether its text begins as a continuation of the prompt's, with the space between the two, and not as
            a text of its own.
        top: How many of the likeliest tokens to note with each; None notes nothing, not even the token's own.
        number: Its user's number for it.
        ids: Tokens written so far, the one that ends it included.
        scores: What was noted with each.
        ended: Why it ended: at the end token or a stop string, or for want of tokens.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    goes_on: bool = False
    top: int | None = None
    number: int = 0
    ids: list[int] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    ended: Literal["stop", "length"] | None = None

    def text(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """What is written so far, up to a stop string."""
        text = self.whole(tokenizer)
        return text[: min((place for stop in self.stop if (place := text.find(stop)) >= 0), default=len(text))]

    def whole(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """What is written so far, with the stop string that it may have come to."""
        before = list(self.prompt[-CONTEXT:]) if self.goes_on else []
        skip = len(tokenizer.decode(before, skip_special_tokens=True)) if before else 0
        return str(tokenizer.decode(before + self.ids, skip_special_tokens=True))[skip:]


CONTEXT = 8
"""Tokens of a prompt that are decoded with what goes on from it."""


class Decoder:
    """Writes texts side by side, a token each at a step.

    Args:
        model: In evaluation mode.
        tokenizer: Whose end token ends a text.

    Raises:
        CheckpointError: If no cache fits the model.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        if model.config.rope_type == "dynamic_ntk":
            raise CheckpointError(
                "rope_type dynamic_ntk turns all keys anew as a text grows: several texts cannot be written at once.",
                expected="a model with another rope_type, as the released ones",
            )
        self._model, self._tokenizer = model, tokenizer
        self._cache: HymbaCache | None = None
        self._generators: dict[Writing, torch.Generator] = {}
        self.texts: list[Writing] = []
        """Those that are not done yet."""

    @torch.inference_mode()
    def add(self, texts: Sequence[Writing]) -> None:
        """Read the prompts of further texts, and write the first token of each."""
        longest = max(len(text.prompt) for text in texts)
        padded = [[0] * (longest - len(text.prompt)) + list(text.prompt) for text in texts]
        ids = torch.tensor(padded, device=self._model.device)
        sizes = torch.tensor([len(text.prompt) for text in texts], device=ids.device)
        mask = torch.arange(longest, device=ids.device) >= longest - sizes[:, None]
        output = self._model(ids, attention_mask=mask.long(), use_cache=True, logits_to_keep=1)
        if self._cache is None:
            self._cache = output[CACHE_NAME]
        else:
            self._cache.join(output[CACHE_NAME])
        self.texts += texts
        self._write(texts, output.logits[:, -1])

    @torch.inference_mode()
    def step(self) -> None:
        """Write a token of each text; those that are done leave."""
        last = torch.tensor([[text.ids[-1]] for text in self.texts], device=self._model.device)
        output = self._model(last, cache=self._cache, use_cache=True)
        self._write(self.texts, output.logits[:, -1])

    def drop(self, text: Writing) -> None:
        """Let a text go before it is done."""
        if text in self.texts:
            text.ended = "length"
            self._leave()

    def _write(self, texts: Sequence[Writing], logits: Tensor) -> None:
        likeliest = logits.argmax(-1).tolist()
        for text, row, token in zip(texts, logits, likeliest, strict=True):
            chosen = token if text.sampling.temperature == 0 else self._draw(text, row)
            text.ids.append(chosen)
            if text.top is not None:
                text.scores.append(token_score(row.log_softmax(-1), chosen, text.top))
            if chosen == self._tokenizer.eos_token_id or self._stopped(text):
                text.ended = "stop"
            elif len(text.ids) >= text.max_new_tokens:
                text.ended = "length"
        self._leave()

    def _draw(self, text: Writing, logits: Tensor) -> int:
        generator = self._generators.get(text)
        if generator is None:
            generator = self._generators[text] = torch.Generator(logits.device)
            seed = text.sampling.seed
            generator.manual_seed(int(torch.randint(2**62, ())) if seed is None else seed)
        probabilities, tokens = (logits / text.sampling.temperature).softmax(-1).sort(descending=True)
        before = probabilities.cumsum(-1) - probabilities
        kept = probabilities.where(before < text.sampling.top_p, 0.0)
        return int(tokens[torch.multinomial(kept, 1, generator=generator)])

    def _stopped(self, text: Writing) -> bool:
        whole = text.whole(self._tokenizer) if text.stop else ""
        return any(stop in whole for stop in text.stop)

    def _leave(self) -> None:
        stay = [row for row, text in enumerate(self.texts) if text.ended is None]
        if len(stay) == len(self.texts):
            return
        self.texts = [self.texts[row] for row in stay]
        self._generators = {text: made for text, made in self._generators.items() if text.ended is None}
        if not stay:
            self._cache = None
        elif self._cache is not None:
            self._cache.batch_select_indices(torch.tensor(stay))


def token_score(log_probs: Tensor, token: int, top: int) -> TokenScore:
    """What is noted of a token.

    Args:
        log_probs: ``(V,)``.
        token: The one that stands there.
        top: How many of the likeliest to note.
    """
    best = log_probs.topk(top)
    return TokenScore(
        token, float(log_probs[token]), tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    )


def write_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Iterable[Writing], *, batch_size: int
) -> Iterator[Writing]:
    """Write texts, up to ``batch_size`` side by side; each is given back when it is done, whichever is first.

    Args:
        model: In evaluation mode.
        tokenizer: Whose end token ends a text.
        texts: Taken as there is room.
        batch_size: Texts at a time.
    """
    decoder, waiting = Decoder(model, tokenizer), iter(texts)
    underway: list[Writing] = []
    while True:
        if new := list(islice(waiting, batch_size - len(underway))):
            decoder.add(new)
            underway += new
        elif underway:
            decoder.step()
        else:
            return
        yield from (text for text in underway if text.ended)
        underway = [text for text in underway if not text.ended]
