"""Encodes conversations and texts as token ids and labels.

The loss covers every answer and the end-of-sequence token after it, with any chat template. The template renders the
conversation once; each answer is located in that text by rendering the messages before it, and character offsets match
tokens to answers. The text is tokenized whole, because SentencePiece would start each separate part with a space.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from operator import itemgetter
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from hymba_tune.config import Learn
from hymba_tune.data.formats import Conversation, Example
from hymba_tune.data.messages import Message
from hymba_tune.data.rendering import apply_template
from hymba_tune.errors import DataError

if TYPE_CHECKING:  # importing transformers imports torch
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a token without loss: the default ``ignore_index`` of PyTorch's cross-entropy."""

PLACEHOLDER = "\ue000answer\ue000"
OTHER_TEMPLATE = "--chat-template hymba or alpaca (of a teacher: --teacher-chat-template), or a file of your own"


@dataclass(frozen=True, slots=True)
class Rendered:
    """An example as text.

    Attributes:
        text: The text as the model reads it, without a beginning-of-sequence token that the tokenizer adds itself.
        learned: Ascending spans of ``text`` with loss, ``[start, end)`` in characters.
        weights: Loss weight of the tokens of each span; empty if all are 1.
        plain: Whether the example is plain text, which continues in further rows where a conversation would be cut.
    """

    text: str
    learned: tuple[tuple[int, int], ...]
    weights: tuple[float, ...] = ()
    plain: bool = False


@dataclass(frozen=True, slots=True)
class Encoded:
    """A row to train on.

    Attributes:
        input_ids: Token ids.
        labels: One label a token: the token id itself or `IGNORED`. The first is always `IGNORED`, since no token
            comes before it to predict it from.
        begin: Position of the row's first token in the text that it is a part of.
        spans: Spans with loss of a whole text, ``[start, end)`` in tokens.
        loss_weights: Loss weight of each label; `None` if all are 1.
    """

    input_ids: list[int]
    labels: list[int]
    begin: int = 0
    spans: tuple[tuple[int, int], ...] = ()
    loss_weights: list[float] | None = None

    @property
    def learned(self) -> int:
        """The number of tokens with loss."""
        return len(self.labels) - self.labels.count(IGNORED)


def encode(example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Encoded]:
    """Encode one example: `render`, `tokenize` and `fit` in one.

    Raises:
        DataError: If the tokenizer's chat template cannot render the example.
    """
    rendered = render(example, tokenizer)
    (encoded,) = tokenize([rendered], tokenizer)
    return fit(encoded, max_length, split=rendered.plain)


def render(example: Example, tokenizer: PreTrainedTokenizerBase, learn: Learn = Learn.all) -> Rendered:
    """Render an example as text and mark the spans with loss: a whole text, or the answers of a conversation.

    Args:
        example: The example; the weights of its messages apply.
        tokenizer: A tokenizer with a chat template.
        learn: Whether the loss covers all answers, or at most the last.

    Raises:
        DataError: If the tokenizer has no end-of-sequence token, or its chat template refuses the conversation or
            renders it so that answers cannot be located.
    """
    eos = _eos_token(tokenizer)
    if isinstance(example, Conversation):
        example = _without_ends(example, eos)
        if learn is Learn.last:
            example = _with_last_learned(example)
        return _mark_answers(_apply_template(example, example.messages, tokenizer), example, tokenizer)
    text = example.text.removesuffix(eos) + eos
    return Rendered(text, ((0, len(text)),), plain=True)


def render_prompt(prompt: Conversation, tokenizer: PreTrainedTokenizerBase) -> str:
    """Render a conversation up to the start of the next answer, exactly as in training.

    Args:
        prompt: A conversation whose last message is not from the assistant. Earlier answers end as in training; a
            template may change them, as those that leave out earlier reasoning do.
        tokenizer: A tokenizer with a chat template.

    Raises:
        DataError: If `render` would raise it.
    """
    prompt = _as_context(_without_ends(prompt, _eos_token(tokenizer)))
    generation, header = _openings(prompt, len(prompt.messages), tokenizer)
    # A template's generation prompt may lack the header of an answer. White space alone is no such header: it belongs
    # to the answer's first token.
    source = generation if header.startswith(generation) and not header[len(generation) :].strip() else header
    last = prompt.messages[-1]
    if last.role == "user" and last.content.strip() not in source:
        raise DataError(
            f"the chat template leaves out message {len(prompt.messages)}, the question",
            expected="a chat template that shows every message",
            fix=OTHER_TEMPLATE,
        )
    return _mark_answers(source, prompt, tokenizer).text


def encode_prompt(prompt: Conversation, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids of `render_prompt`, beginning-of-sequence token included."""
    return tokenize([Rendered(render_prompt(prompt, tokenizer), ())], tokenizer)[0].input_ids


def _without_ends(conversation: Conversation, eos: str) -> Conversation:
    """Remove end-of-sequence tokens that answers already end with, so that none is doubled."""

    def bare(message: Message) -> Message:
        content = message.content.rstrip()
        if message.role == "assistant" and content.endswith(eos):
            return replace(message, content=content.removesuffix(eos))
        return message

    return replace(conversation, messages=tuple(bare(message) for message in conversation.messages))


def _as_context(conversation: Conversation) -> Conversation:
    """Set the weight of every answer to 0."""
    return replace(conversation, messages=tuple(replace(message, weight=0.0) for message in conversation.messages))


def _with_last_learned(conversation: Conversation) -> Conversation:
    """Set the weight of every answer but the last to 0.

    Raises:
        DataError: If the last answer has weight 0 itself.
    """
    last = max(index for index, message in enumerate(conversation.messages) if message.role == "assistant")
    if not conversation.messages[last].learned:
        raise DataError("its last answer has weight 0", expected="an answer to train on", fix="--learn all")
    return replace(
        conversation,
        messages=tuple(
            message if message.role != "assistant" or index == last else replace(message, weight=0.0)
            for index, message in enumerate(conversation.messages)
        ),
    )


def _mark_answers(source: str, conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """Locate the answers in a rendered conversation, and end each with the end-of-sequence token.

    Answers without loss end with it as well, unless the template changes them: then they are as it writes them.
    """
    eos = _eos_token(tokenizer)
    text = ""
    copied = 0  # characters of `source` that `text` already contains
    learned, weights = [], []
    context = _find_context(source, conversation, tokenizer)
    for index, message in enumerate(conversation.messages):
        if message.role != "assistant":
            continue

        span = _find_answer(source, conversation, index, tokenizer) if context is None else context.get(index)
        if span is None and not message.learned:
            continue
        if span is None:
            raise _changed_answer(conversation, index)
        start, end = span
        after = source[end:].lstrip()
        if after.startswith(eos):  # the template's own, perhaps after a space
            end = len(source) - len(after) + len(eos)
        start += len(text) - copied
        text += source[copied:end] + ("" if after.startswith(eos) else eos)
        if message.learned:
            learned.append((start, len(text)))
            weights.append(message.weight)
        copied = end

    return Rendered(text + source[copied:], tuple(learned), tuple(weights) if min(weights, default=1) < 1 else ())


def _find_context(
    source: str, conversation: Conversation, tokenizer: PreTrainedTokenizerBase
) -> dict[int, tuple[int, int]] | None:
    """Locate all answers of a conversation without loss in one rendering, where `_find_answer` needs two for each.

    Only the ends of such answers matter, so it is not needed where exactly they begin.

    Returns:
        The spans by index, without answers that the template changes; `None` if an answer has loss, or if the rest of
        ``source`` depends on what the answers are.
    """
    if any(message.role == "assistant" and message.learned for message in conversation.messages):
        return None
    answers = {index: one.content for index, one in enumerate(conversation.messages) if one.role == "assistant"}
    if not answers:
        return {}
    messages = list(conversation.messages)
    for index, content in answers.items():
        hidden = content.replace(content.strip(), PLACEHOLDER, 1) if content.strip() else content + PLACEHOLDER
        messages[index] = replace(messages[index], content=hidden)
    between = _apply_template(conversation, messages, tokenizer, add_generation_prompt=True).split(PLACEHOLDER)
    if len(between) != len(answers) + 1 or not source.startswith(between[0]):
        return None

    spans = {}
    end = len(between[0])
    for (index, content), following in zip(answers.items(), between[1:], strict=True):
        start, answer = end, content.strip()
        if source.startswith(answer + following, start):
            spans[index] = (start, start + len(answer))
            end = start + len(answer) + len(following)
        elif following and (place := source.find(following, start)) >= 0:  # the template changes this answer
            end = place + len(following)
        else:
            return None
    return spans


def _find_answer(
    source: str, conversation: Conversation, index: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, int] | None:
    """Return the span of an answer in ``source``, with the white space that the model must generate before it.

    `None` if the template changes the answer, or the text before it.
    """
    answer = conversation.messages[index].content.strip()
    for opening in _openings(conversation, index, tokenizer):
        start = len(source) - len(source[len(opening) :].lstrip())
        if source.startswith(opening) and source.startswith(answer, start):
            return len(opening), start + len(answer)
    return None


def _changed_answer(conversation: Conversation, index: int) -> DataError:
    """Build the error of an answer with loss that the template does not write as it is."""
    is_last = not any(message.role == "assistant" for message in conversation.messages[index + 1 :])
    return DataError(
        f"the chat template rewrites the conversation around message {index + 1}, an answer",
        expected="a chat template that keeps answers unchanged, and earlier messages as they were",
        fix=OTHER_TEMPLATE if is_last else f"--learn last, if it only changes earlier answers; or {OTHER_TEMPLATE}",
    )


def _openings(conversation: Conversation, index: int, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yield the text before an answer at ``index``: as a generation prompt, and as the text before a known answer."""
    messages = conversation.messages[:index]
    if messages:  # transformers renders no empty conversation
        yield _apply_template(conversation, messages, tokenizer, add_generation_prompt=True)
    placeholder = Message("assistant", PLACEHOLDER)
    yield _apply_template(conversation, (*messages, placeholder), tokenizer).rpartition(PLACEHOLDER)[0]


def _apply_template(
    conversation: Conversation,
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    *,
    add_generation_prompt: bool = False,
) -> str:
    """Render messages with the tokenizer's template, and with the tools and contexts of the conversation."""
    try:
        return apply_template(
            tokenizer,
            [{"role": message.role, "content": message.content} for message in messages],
            tools=list(conversation.tools) or None,
            contexts=list(conversation.contexts) or None,
            add_generation_prompt=add_generation_prompt,
        )
    except TemplateError as error:
        raise DataError(
            f"the chat template refuses the conversation ({error})",
            expected="roles in the order that the chat template allows",
            fix=f"reorder the messages, or {OTHER_TEMPLATE}",
        ) from error


def _eos_token(tokenizer: PreTrainedTokenizerBase) -> str:
    eos: str | None = tokenizer.eos_token
    if not eos:
        raise DataError(
            "the tokenizer has no end-of-sequence token",
            expected="one, for answers to end with",
            fix="set eos_token in its tokenizer_config.json",
        )
    return eos


def tokenize(rendered: Sequence[Rendered], tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    """Tokenize rendered examples and label them, at any length.

    The text begins with exactly one beginning-of-sequence token if the tokenizer uses one.

    Args:
        rendered: The examples, tokenized together, which is faster than one by one.
        tokenizer: A fast tokenizer, since the offsets of tokens in the text are needed.
    """
    batch = tokenizer(
        [example.text for example in rendered],
        add_special_tokens=False,  # some tokenizers would also end every text with a second end-of-sequence token
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    bos_token, bos = tokenizer.bos_token, _added_bos(tokenizer)
    encoded = []
    for example, ids, offsets in zip(rendered, batch["input_ids"], batch["offset_mapping"], strict=True):
        head = [] if bos_token and example.text.startswith(bos_token) else bos
        spans = _spans(offsets, example.learned, len(head))
        ids = head + ids

        labels = [IGNORED] * len(ids)
        for start, end in spans:
            labels[start:end] = ids[start:end]
        labels[:1] = [IGNORED]
        encoded.append(Encoded(ids, labels, spans=spans, loss_weights=_loss_weights(example, spans, len(ids))))
    return encoded


def _added_bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the beginning-of-sequence token if the tokenizer adds it to every text, else nothing."""
    ids: list[int] = tokenizer("a")["input_ids"][:1]
    return ids if ids == [tokenizer.bos_token_id] else []


def _spans(
    offsets: list[tuple[int, int]], learned: Sequence[tuple[int, int]], begin: int
) -> tuple[tuple[int, int], ...]:
    """Return the span of tokens that overlap each span of characters, counted from ``begin``.

    Offsets ascend, so bisection finds them.
    """
    return tuple(
        (begin + bisect_right(offsets, start, key=itemgetter(1)), begin + bisect_left(offsets, end, key=itemgetter(0)))
        for start, end in learned
    )


def _loss_weights(example: Rendered, spans: Sequence[tuple[int, int]], size: int) -> list[float] | None:
    """Return the loss weight of each of ``size`` tokens; `None` if all are 1."""
    if not example.weights:
        return None
    weights = [1.0] * size
    for (start, end), weight in zip(spans, example.weights, strict=True):
        weights[start:end] = [weight] * (end - start)
    return weights


def fit(encoded: Encoded, max_length: int, *, split: bool) -> list[Encoded]:
    """Bring an encoded example to at most ``max_length`` tokens per row.

    Args:
        encoded: An encoded example of any length.
        max_length: Maximum tokens of a row, at least 2.
        split: Whether a longer example continues in further rows without losing a token, or is cut.

    Returns:
        The rows that have tokens with loss.
    """
    size = len(encoded.input_ids)
    cuts = [*range(0, size, max_length), size]
    if len(cuts) > 2 and cuts[-1] - cuts[-2] == 1:
        cuts[-2] -= 1  # in a row of one token, there is nothing to predict it from
    rows = []
    for start, end in pairwise(cuts if split else [0, min(size, max_length)]):
        labels = [IGNORED, *encoded.labels[start + 1 : end]]
        weights = encoded.loss_weights and encoded.loss_weights[start:end]
        rows.append(Encoded(encoded.input_ids[start:end], labels, start, loss_weights=weights))
    return [row for row in rows if row.learned]
