"""From a conversation to token ids and labels: what the model reads, and which of it is learned.

Every answer and the end-of-sequence token after it are learned, whatever the chat template. The template renders the
conversation once; each answer is found in that text by rendering the messages before it, and tokens are matched to
answers by character offsets. The text is tokenized whole: tokenized in parts, SentencePiece would start each part with
a space of its own.
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
from hymba_tune.errors import DataError

if TYPE_CHECKING:  # importing transformers imports torch
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a token that is read but not learned: the value that PyTorch's cross-entropy leaves out."""

PLACEHOLDER = "\ue000answer\ue000"


@dataclass(frozen=True, slots=True)
class Rendered:
    """An example as text.

    Attributes:
        text: As the model reads it, but for a beginning-of-sequence token that the tokenizer itself adds.
        learned: Ascending spans of ``text``, ``[start, end)`` in characters.
        weights: How much a token of each span counts in the loss; where none are given, 1.
        plain: Whether it is plain text, which may go on in a further row where a conversation would be cut.
    """

    text: str
    learned: tuple[tuple[int, int], ...]
    weights: tuple[float, ...] = ()
    plain: bool = False


@dataclass(frozen=True, slots=True)
class Encoded:
    """A row to train on: ids, and as many labels, each the id itself or `IGNORED`.

    The first label is always `IGNORED`: nothing comes before it to predict it from. ``begin`` is where the row begins
    in the text that it is a part of, in tokens; ``spans`` are the learned spans of a whole text, ``[start, end)`` in
    tokens. ``loss_weights`` say how much each label counts; None for 1 each.
    """

    input_ids: list[int]
    labels: list[int]
    begin: int = 0
    spans: tuple[tuple[int, int], ...] = ()
    loss_weights: list[float] | None = None

    @property
    def learned(self) -> int:
        """How many tokens are learned."""
        return len(self.labels) - self.labels.count(IGNORED)


def encode(example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Encoded]:
    """Encode an example on its own: `render`, `tokenize` and `fit` in one.

    Raises:
        DataError: If the tokenizer's chat template cannot be used for it.
    """
    rendered = render(example, tokenizer)
    (whole,) = tokenize([rendered], tokenizer)
    return fit(whole, max_length, split=rendered.plain)


def render(example: Example, tokenizer: PreTrainedTokenizerBase, learn: Learn = Learn.all) -> Rendered:
    """Write an example as text and mark what is learned of it: a text whole, of a conversation the answers.

    Args:
        example: Its answers are learned as their messages say.
        tokenizer: With a chat template.
        learn: Which of them: all, or at most the last.

    Raises:
        DataError: If the tokenizer has no end-of-sequence token, or its chat template refuses the conversation or
            writes it so that answers cannot be told from the rest.
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
    """Write a conversation up to where the assistant answers, exactly as training shows it to the model.

    Args:
        prompt: Its last message is not from the assistant. Earlier answers end as they do in training.
        tokenizer: With a chat template.

    Raises:
        DataError: As `render`.
    """
    prompt = _without_ends(prompt, _eos_token(tokenizer))
    asked, header = _openings(prompt, len(prompt.messages), tokenizer)
    # What a template writes when asked to let the model go on may lack the header of an answer, but for white space,
    # which belongs to the answer's first token.
    source = asked if header.startswith(asked) and not header[len(asked) :].strip() else header
    return _mark_answers(source, prompt, tokenizer).text


def encode_prompt(prompt: Conversation, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of `render_prompt`, beginning-of-sequence token included."""
    return tokenize([Rendered(render_prompt(prompt, tokenizer), ())], tokenizer)[0].input_ids


def _without_ends(conversation: Conversation, eos: str) -> Conversation:
    """The conversation without end-of-sequence tokens that its answers bring along, so that none is doubled."""

    def bare(message: Message) -> Message:
        content = message.content.rstrip()
        if message.role == "assistant" and content.endswith(eos):
            return replace(message, content=content.removesuffix(eos))
        return message

    return replace(conversation, messages=tuple(bare(message) for message in conversation.messages))


def _with_last_learned(conversation: Conversation) -> Conversation:
    """The conversation with no answer but the last to be learned.

    Raises:
        DataError: If that one is not.
    """
    last = max(index for index, message in enumerate(conversation.messages) if message.role == "assistant")
    if not conversation.messages[last].learned:
        raise DataError("its last answer has weight 0", expected="an answer to learn", fix="--learn all")
    return replace(
        conversation,
        messages=tuple(
            message if message.role != "assistant" or index == last else replace(message, weight=0.0)
            for index, message in enumerate(conversation.messages)
        ),
    )


def _mark_answers(source: str, conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """Find the conversation's answers in what the template wrote of it, and end each with the end-of-sequence token.

    Those that are only read end with it as well.
    """
    eos = _eos_token(tokenizer)
    text, copied = "", 0  # what is written so far, and how much of `source` that is
    learned, weights = [], []
    for index, message in enumerate(conversation.messages):
        if message.role != "assistant":
            continue
        start, end = _find_answer(source, conversation, index, tokenizer)
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


def _find_answer(
    source: str, conversation: Conversation, index: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, int]:
    """The span of an answer in ``source``, with the white space that the model has to write before it."""
    answer = conversation.messages[index].content.strip()
    for opening in _openings(conversation, index, tokenizer):
        start = len(source) - len(source[len(opening) :].lstrip())
        if source.startswith(opening) and source.startswith(answer, start):
            return len(opening), start + len(answer)
    raise DataError(
        f"the chat template rewrites the conversation around message {index + 1}, an answer",
        expected="a chat_template that writes answers unchanged, and nothing earlier in another way afterwards",
        fix="take chat_template out of the tokenizer to use Hymba's",
    )


def _openings(conversation: Conversation, index: int, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """What the template writes before an answer at ``index``: as a generation prompt, and before a known answer."""
    messages = conversation.messages[:index]
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
    """Messages as the tokenizer's template writes them, beside the conversation's tools and contexts."""
    try:
        text: str = tokenizer.apply_chat_template(
            [{"role": message.role, "content": message.content} for message in messages],
            tools=list(conversation.tools) or None,
            contexts=list(conversation.contexts) or None,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )
    except (TemplateError, TypeError) as error:  # a template that adds a number to a text
        raise DataError(
            f"the chat template refuses the conversation ({error})",
            expected="roles in the order that the tokenizer's chat_template allows",
            fix="reorder the messages, or take chat_template out of the tokenizer to use Hymba's",
        ) from error
    return text


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
    """Token ids and labels of rendered examples, at any length.

    The text begins with the beginning-of-sequence token exactly once, where the tokenizer uses one.

    Args:
        rendered: Tokenized together, which is faster than one by one.
        tokenizer: A fast one: it must know which characters a token stands for.
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
    """The beginning-of-sequence token where the tokenizer puts it before every text by itself, else nothing."""
    ids: list[int] = tokenizer("a")["input_ids"][:1]
    return ids if ids == [tokenizer.bos_token_id] else []


def _spans(
    offsets: list[tuple[int, int]], learned: Sequence[tuple[int, int]], begin: int
) -> tuple[tuple[int, int], ...]:
    """The tokens that share a character with each learned span, counted from ``begin``.

    Offsets ascend, so bisection finds them.
    """
    return tuple(
        (begin + bisect_right(offsets, start, key=itemgetter(1)), begin + bisect_left(offsets, end, key=itemgetter(0)))
        for start, end in learned
    )


def _loss_weights(example: Rendered, spans: Sequence[tuple[int, int]], size: int) -> list[float] | None:
    """How much each of so many tokens counts, where the spans' weights differ."""
    if not example.weights:
        return None
    counted = [1.0] * size
    for (start, end), weight in zip(spans, example.weights, strict=True):
        counted[start:end] = [weight] * (end - start)
    return counted


def fit(encoded: Encoded, max_length: int, *, split: bool) -> list[Encoded]:
    """Bring an encoded example to at most ``max_length`` tokens a row.

    Args:
        encoded: Of any length.
        max_length: Tokens a row may have, at least 2.
        split: Whether what is too long goes on in further rows, no token lost, or is cut off.

    Returns:
        The rows; none if what is left has nothing to learn.
    """
    size = len(encoded.input_ids)
    cuts = [*range(0, size, max_length), size]
    if len(cuts) > 2 and cuts[-1] - cuts[-2] == 1:
        cuts[-2] -= 1  # a row of one token would have nothing to predict it from
    rows = []
    for start, end in pairwise(cuts if split else [0, min(size, max_length)]):
        labels = [IGNORED, *encoded.labels[start + 1 : end]]
        weights = encoded.loss_weights and encoded.loss_weights[start:end]
        rows.append(Encoded(encoded.input_ids[start:end], labels, start, loss_weights=weights))
    return [row for row in rows if row.learned]
