"""Questions with known answers: generating answers and comparing them by exact match."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hymba_tune.data import Conversation, Source, encode_prompt, sample_prompts
from hymba_tune.errors import DataError
from hymba_tune.generate import Generation, generate_texts

NUMBER = r"[-$]{0,2}\d[\d,]*(?:\.\d+)?"
# A letter by itself, which is no word of a sentence: "B", "(B)", "The answer is B because".
CHOICE = r"(?<![\w'])([A-J])(?![\w'])(?!\s+(?!as\b|because\b|is\b|since\b)[a-z])"
PATTERNS = {
    "gsm8k": rf"####\s*({NUMBER})",
    "number": NUMBER,
    "exact": r"(?s)\A\s*(.*?)\s*\Z",
    "choice": CHOICE,
}
"""The patterns that extract the compared part of an answer, by the values of ``--answers`` and ``--reward``."""


@dataclass(frozen=True)
class Question:
    """A conversation up to the answer, and the known answer."""

    prompt: Conversation
    reference: str


@dataclass(frozen=True)
class AnsweredQuestion:
    """A question and a model's answer; ``extracted`` and ``expected`` are the compared parts, None if not found."""

    question: Question
    answer: str
    extracted: str | None
    expected: str | None

    @property
    def correct(self) -> bool:
        """Whether the compared parts are equal."""
        return self.extracted is not None and self.extracted == self.expected


@dataclass(frozen=True)
class AnswerScore:
    """Counts of answers.

    Attributes:
        questions: Number of questions.
        correct: Number of answers that match the known answer.
        extracted: Number of answers that contain a part to compare.
    """

    questions: int
    correct: int
    extracted: int

    @property
    def exact_match(self) -> float:
        """Share of correct answers."""
        return self.correct / self.questions

    @property
    def standard_error(self) -> float:
        """Standard error of `exact_match`."""
        share = self.exact_match
        return math.sqrt(share * (1 - share) / max(self.questions - 1, 1))


class Extraction:
    """Extracts the part of an answer that is compared.

    Args:
        way: A key of `PATTERNS`.
        pattern: A regular expression that replaces it.
    """

    def __init__(self, way: str | None, pattern: str | None) -> None:
        self.pattern = pattern or PATTERNS[way or "exact"]
        self._compiled = re.compile(self.pattern)

    def __call__(self, text: str) -> str | None:
        """The last match, or its first group, stripped; numbers are normalized, such as ``1,000.0`` to 1000."""
        matches = list(self._compiled.finditer(text))
        if not matches:
            return None
        last = matches[-1]
        part = (last[1] if self._compiled.groups and last[1] is not None else last[0]).strip()
        return _normalized_number(part) if re.fullmatch(NUMBER, part) else part


def _normalized_number(text: str) -> str:
    digits = text.replace(",", "").replace("$", "")
    return digits.rstrip("0").rstrip(".") if "." in digits else digits


def read_questions(
    sources: Sequence[Source], extract: Extraction, *, max_rows: int | None, mapping: Mapping[str, str]
) -> list[Question]:
    """Read the conversations of the sources, each up to its last answer.

    Raises:
        DataError: If there are none, or no known answer contains a part to compare.
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
        raise DataError(f"There are no questions in {names}.", expected="rows with a prompt and an answer")
    if all(extract(question.reference) is None for question in questions):
        raise DataError(
            f"No answer in {names} contains a part to compare. The first is {questions[0].reference[:200]!r}.",
            expected=f"a match of {extract.pattern}",
            fix="--answers exact, or --extract with another regular expression",
        )


def answer_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    extract: Extraction,
    *,
    max_new_tokens: int,
    batch_size: int,
    cuda_graphs: bool = False,
    progress: Callable[[int], None],
) -> list[AnsweredQuestion]:
    """Generate a model's answers by greedy decoding.

    Args:
        model: A model in evaluation mode.
        tokenizer: A tokenizer with a chat template.
        questions: The questions.
        extract: Extracts the part of an answer that is compared.
        max_new_tokens: Maximum number of tokens of an answer.
        batch_size: Number of questions in a batch.
        cuda_graphs: Whether steps are replayed as CUDA graphs.
        progress: Called with the number of finished answers.
    """

    def generations() -> Iterator[Generation]:
        for number, question in enumerate(questions):
            yield Generation(encode_prompt(question.prompt, tokenizer), max_new_tokens, number=number)

    answers = [""] * len(questions)
    finished = generate_texts(model, tokenizer, generations(), batch_size=batch_size, cuda_graphs=cuda_graphs)
    for done, generation in enumerate(finished, start=1):
        answers[generation.number] = generation.text(tokenizer).strip()
        progress(done)
    return [
        AnsweredQuestion(question, answer, extract(answer), extract(question.reference))
        for question, answer in zip(questions, answers, strict=True)
    ]


def score_answers(answered: Sequence[AnsweredQuestion]) -> AnswerScore:
    """Count the answers, the correct ones, and those with a part to compare."""
    extracted = sum(one.extracted is not None for one in answered)
    return AnswerScore(len(answered), sum(one.correct for one in answered), extracted)
