"""Answers from a model: one conversation, streamed, or several prompts in one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import BaseStreamer, LogitsProcessor, LogitsProcessorList

from hymba_tune.data import Conversation, encode_prompt
from hymba_tune.generate.decoding import Decoder
from hymba_tune.generate.generation import Generation
from hymba_tune.generate.sampling import Sampling, relative_logits


class _TextStreamer(BaseStreamer):
    """Passes every finished part of the text to a callback."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> None:
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._ids: list[int] | None = None
        self._sent = 0

    def put(self, value: Tensor) -> None:
        """Receive the prompt, which comes first, or a token."""
        if self._ids is None:
            self._ids = []
            return
        self._ids += value.tolist()
        # Trailing white space may be the answer's end, and the bytes of a character may not be complete yet.
        self._send(_decode(self._tokenizer, self._ids).rstrip("\ufffd").rstrip())

    def end(self) -> None:
        """Send the rest of the text."""
        self._send(_decode(self._tokenizer, self._ids or []))

    def _send(self, text: str) -> None:
        if new := text[self._sent :]:
            self._on_text(new)
            self._sent = len(text)


class _Temperature(LogitsProcessor):
    """A sampling temperature that may be arbitrarily small; that of transformers divides logits to infinity."""

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature

    def __call__(self, _: Tensor, scores: Tensor) -> Tensor:
        """Divide the logits ``(S, V)`` of the next tokens."""
        return relative_logits(scores, self._temperature)


class _OwnSampling(LogitsProcessor):
    """Samples each row with a generator of its own, so that its tokens do not depend on the rest of the batch."""

    def __init__(self, temperature: float, seeds: Sequence[int], device: torch.device) -> None:
        self._temperature = temperature
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, _: Tensor, scores: Tensor) -> Tensor:
        """Leave one token of each row of the logits ``(S, V)``."""
        probabilities = relative_logits(scores, self._temperature).softmax(-1)
        rows = zip(probabilities, self._generators, strict=True)
        tokens = torch.stack([torch.multinomial(row, 1, generator=generator) for row, generator in rows])
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens, 0.0)


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Decode a whole answer at once: each part decoded alone would lose its leading space."""
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversation: Conversation,
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    cuda_graphs: bool = False,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """Generate the assistant's next answer.

    Args:
        model: A model in training or evaluation mode; the mode does not change.
        tokenizer: A tokenizer with a chat template.
        conversation: A conversation whose last message is not the assistant's.
        max_new_tokens: Maximum number of tokens of the answer.
        temperature: Sampling temperature; 0 is greedy decoding.
        top_p: Nucleus sampling: only the likeliest tokens with this total probability are sampled from.
        cuda_graphs: Whether steps are replayed as CUDA graphs; sampled tokens are then others with the same seed.
        on_text: Called with each new part of the answer.

    Returns:
        The answer, without its end token.
    """
    prompt = encode_prompt(conversation, tokenizer)
    streamer = _TextStreamer(tokenizer, on_text) if on_text else None
    if cuda_graphs:
        generation = Generation(prompt, max_new_tokens, Sampling(temperature, top_p))
        return _decode(tokenizer, _by_graphs(model, tokenizer, generation, streamer))
    ids = torch.tensor([prompt], device=model.device)
    tokens = _generate(
        model,
        ids,
        torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        streamer=streamer,
    )
    return _decode(tokenizer, tokens[0].tolist())


def write(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    ends: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    seeds: Sequence[int] | None = None,
) -> list[list[int]]:
    """Generate the continuations of several prompts in one batch.

    Args:
        model: A model in training or evaluation mode; the mode does not change.
        prompts: The token ids of each prompt.
        ends: The end tokens, at least one.
        max_new_tokens: Maximum number of new tokens for each prompt.
        temperature: Sampling temperature; 0 is greedy decoding.
        seeds: The seed of each prompt, with which its continuation does not depend on the others. By default, torch's
            global generator samples all of them.

    Returns:
        The new tokens of each prompt; the last one is an end token, unless ``max_new_tokens`` was reached.
    """
    width = max(map(len, prompts))
    padded = torch.tensor([[ends[0]] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    tokens = _generate(
        model,
        padded,
        mask,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seeds=seeds,
        eos_token_id=list(ends),
        pad_token_id=ends[0],
    )
    return [_up_to(ends, ids) for ids in tokens.tolist()]


def _generate(
    model: PreTrainedModel,
    ids: Tensor,
    mask: Tensor,
    *,
    temperature: float,
    top_p: float = 1.0,
    seeds: Sequence[int] | None = None,
    **settings: Any,
) -> Tensor:
    """The new tokens of `generate` for prompts of one length; the model's mode does not change."""
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature and seeds is not None:
        sampling["logits_processor"] = LogitsProcessorList([_OwnSampling(temperature, seeds, ids.device)])
    elif temperature:
        # By default, transformers samples from the 50 likeliest tokens only.
        sampling = {"do_sample": True, "temperature": 1.0, "top_p": top_p, "top_k": 0}
        sampling["logits_processor"] = LogitsProcessorList([_Temperature(temperature)])
    # Not inference mode: tensors that the model caches for its next pass could not be used in training.
    with evaluating(model), torch.no_grad():
        tokens: Tensor = model.generate(input_ids=ids, attention_mask=mask, **sampling, **settings)
    return tokens[:, ids.shape[1] :]


def _by_graphs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    generation: Generation,
    streamer: _TextStreamer | None,
) -> list[int]:
    """The new tokens of one text, whose steps are replayed as CUDA graphs."""
    if streamer:
        streamer.put(torch.tensor(generation.prompt))
    sent = 0
    with evaluating(model):
        decoder = Decoder(model, tokenizer, cuda_graphs=True)
        decoder.add([generation])
        while True:
            if generation.error:
                raise generation.error
            if streamer:
                streamer.put(torch.tensor(generation.ids[sent:]))
                sent = len(generation.ids)
            if generation.finish_reason:
                break
            decoder.step()
    if streamer:
        streamer.end()
    return generation.ids


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Put a model into evaluation mode, and back into its own mode afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _up_to(ends: Sequence[int], ids: list[int]) -> list[int]:
    first = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    return ids[: first + 1]
