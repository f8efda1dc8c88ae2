"""Questions whose answers are known: asked, and the answers compared."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hymba_tune.data import Conversation, Source, encode_prompt, sample_prompts
from hymba_tune.errors import DataError
from hymba_tune.generate import Writing, write_texts

NUMBER = r"[-$]{0,2}\d[\d,]*(?:\.\d+)?"
PATTERNS = {"gsm8k": rf"####\s*({NUMBER})", "number": NUMBER, "exact": r"(?s)\A\s*(.*?)\s*\Z"}
"""What is taken out of an answer, by the name of the way it is compared."""


@dataclass(frozen=True)
class Question:
    """A conversation up to where the model answers, and the answer that is known."""

    prompt: Conversation
    reference: str


@dataclass(frozen=True)
class AnsweredQuestion:
    """A question with what a model answered; what was taken out of both, None where there was nothing to take."""

    question: Question
    answer: str
    found: str | None
    expected: str | None

    @property
    def right(self) -> bool:
        """Whether both say the same."""
        return self.found is not None and self.found == self.expected


@dataclass(frozen=True)
class AnswerScore:
    """How many questions were answered right.

    Attributes:
        questions: All of them.
        right: Those whose answer says what is known.
        found: Those whose answer has what is compared at all.
    """

    questions: int
    right: int
    found: int

    @property
    def exact_match(self) -> float:
        """Share that was right."""
        return self.right / self.questions

    @property
    def standard_error(self) -> float:
        """Of that share."""
        share = self.exact_match
        return math.sqrt(share * (1 - share) / max(self.questions - 1, 1))


class Extraction:
    """How the part of an answer is found that is compared.

    Args:
        way: One of `PATTERNS`.
        pattern: A regular expression instead of it.
    """

    def __init__(self, way: str | None, pattern: str | None) -> None:
        self.pattern = pattern or PATTERNS[way or "exact"]
        self._compiled = re.compile(self.pattern)

    def __call__(self, text: str) -> str | None:
        """The last match, or its first group, without white space; a number written in one way: ``1,000.0`` as 1000."""
        matches = list(self._compiled.finditer(text))
        if not matches:
            return None
        last = matches[-1]
        taken = (last[1] if self._compiled.groups and last[1] is not None else last[0]).strip()
        return _plain_number(taken) if re.fullmatch(NUMBER, taken) else taken


def _plain_number(text: str) -> str:
    digits = text.replace(",", "").replace("$", "")
    return digits.rstrip("0").rstrip(".") if "." in digits else digits


def read_questions(
    sources: Sequence[Source], extract: Extraction, *, max_rows: int | None, mapping: Mapping[str, str]
) -> list[Question]:
    """The conversations of the sources, each up to its last answer.

    Raises:
        DataError: If there are none, or none of their answers has what is to be compared.
    """
    questions = [Question(prompt, reference) for prompt, reference in sample_prompts(sources, max_rows, mapping)]
    check_questions(questions, extract, sources)
    return questions


def check_questions(questions: Sequence[Question], extract: Extraction, sources: Sequence[Source]) -> None:
    """Check that answers to these questions can be compared.

    Raises:
        DataError: If there are no questions, or no reference answer has what is to be compared.
    """
    names = ", ".join(source.name for source in sources)
    if not questions:
        raise DataError(f"No questions in {names}.", expected="rows with a prompt and an answer")
    if all(extract(question.reference) is None for question in questions):
        raise DataError(
            f"No answer in {names} has what is to be compared. The first: {questions[0].reference[:200]!r}.",
            expected=f"something that {extract.pattern} finds",
            fix="--answers exact, or --extract with another expression",
        )


def answer_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    extract: Extraction,
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: Callable[[int], None],
) -> list[AnsweredQuestion]:
    """Let a model answer, by its likeliest tokens.

    Args:
        model: In evaluation mode.
        tokenizer: With a chat template.
        questions: Asked several at a time.
        extract: Finds what is compared.
        max_new_tokens: Tokens an answer may have.
        batch_size: Questions at a time.
        progress: Called with the number of answers.
    """

    def prompts() -> Iterator[Writing]:
        for number, question in enumerate(questions):
            yield Writing(encode_prompt(question.prompt, tokenizer), max_new_tokens, number=number)

    answers = [""] * len(questions)
    for done, written in enumerate(write_texts(model, tokenizer, prompts(), batch_size=batch_size), start=1):
        answers[written.number] = written.text(tokenizer).strip()
        progress(done)
    return [
        AnsweredQuestion(question, answer, extract(answer), extract(question.reference))
        for question, answer in zip(questions, answers, strict=True)
    ]


def judge_answers(answered: Sequence[AnsweredQuestion]) -> AnswerScore:
    """Count what was right."""
    found = sum(one.found is not None for one in answered)
    return AnswerScore(len(answered), sum(one.right for one in answered), found)
