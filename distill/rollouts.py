"""Answers that the student generates during training, as rows that the teacher can read."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from datasets import Dataset
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from hymba_tune.data import IGNORED
from hymba_tune.distill.alignment import Alignment, align_rows
from hymba_tune.distill.pair import Answer, TokenizedRow, TokenizerPair, Unaligned
from hymba_tune.distill.rows import alignment, cut
from hymba_tune.distill.segments import tokenizer_within
from hymba_tune.generate import write


class _Prompt(NamedTuple):
    """A row of the data whose first answer is generated again.

    Attributes:
        number: The number of the row in the batch.
        prompt: The student's tokens before that answer.
        teacher_prompt: The teacher's tokens before it.
        lead: The white space that the teacher's first token spells before the answer.
    """

    number: int
    prompt: list[int]
    teacher_prompt: list[int]
    lead: str


@dataclass(frozen=True)
class RolloutGenerator:
    """Generates rollouts of the student.

    Attributes:
        pair: The two tokenizers.
        rows: All rows of the data.
        max_length: The maximum number of tokens in a row.
        answer_tokens: The maximum number of tokens in an answer.
        temperature: The sampling temperature.
        seed: The seed of the choice of rows and of the sampling.
    """

    pair: TokenizerPair
    rows: Dataset
    max_length: int
    answer_tokens: int
    temperature: float
    seed: int

    @cached_property
    def _reader(self) -> Tokenizer:
        return tokenizer_within(self.pair.teacher)

    def rewrite(
        self, model: PreTrainedModel, examples: Sequence[dict[str, Any]], share: float, step: int, written: int
    ) -> tuple[list[dict[str, Any]], list[Alignment]]:
        """Replace answers of the data by answers of the student.

        A row keeps the answer of the data if it has no prompt, or if the student's answer is not a text that the
        teacher can read: half a character, or nothing. What becomes of a row in a step depends on the row alone, not on
        the batch or the process that it is in.

        Args:
            model: The student.
            examples: The examples of a batch, as its collator received them.
            share: The share of the examples to replace.
            step: The number of the step in the run.
            written: The number of rollouts in the step so far.

        Returns:
            The batch's examples, and the alignments of the rollouts, whose numbers descend from -1 - ``written``.
        """
        draws = [random.Random(f"{self.seed} {step} {example['row'][0]}") for example in examples]
        chosen = [number for number, draw in enumerate(draws) if draw.random() < share]
        prompts = [row for row in (self._prompt(number, examples[number]) for number in chosen) if row]
        if not prompts:
            return list(examples), []
        answers = write(
            model,
            [row.prompt for row in prompts],
            ends=self.pair.student.ends,
            max_new_tokens=self.answer_tokens,
            temperature=self.temperature,
            seeds=[draws[row.number].getrandbits(62) for row in prompts],
        )
        texts = list(examples)
        rollouts: list[Alignment] = []
        for row, answer in zip(prompts, answers, strict=True):
            aligned = self._align(row, answer)
            if aligned is not None:
                number = -1 - written - len(rollouts)
                rollouts.append(aligned)
                ids = aligned.student_ids
                labels = [IGNORED] * len(row.prompt) + ids[len(row.prompt) :]
                texts[row.number] = {"input_ids": ids, "labels": labels, "row": [number] * len(ids)}
        return texts, rollouts

    def _prompt(self, number: int, example: dict[str, Any]) -> _Prompt | None:
        row = alignment(self.rows[example["row"][0]])
        first = next((at for at, label in enumerate(example["labels"]) if label != IGNORED), 0)
        if row.plain or first + 1 >= self.max_length or row.student[0] != first:
            return None
        begin, lead = int(row.teacher[0]), int(row.spelled[0])
        spelled = self.pair.teacher.spelling.tokens[row.teacher_ids[begin]]
        return _Prompt(number, example["input_ids"][:first], row.teacher_ids[:begin], spelled[:lead].decode())

    def _align(self, row: _Prompt, answer: list[int]) -> Alignment | None:
        ours, theirs = self.pair.student.end, self.pair.teacher.end
        ended = answer[-1] == ours
        content = self.pair.student.spelling.spell(answer[:-1] if ended else answer).strip()
        try:
            text = content.decode()
        except UnicodeDecodeError:
            return None
        if not text:
            return None
        read: list[int] = self._reader.encode(row.lead + text).ids
        ids, teacher_ids = [*row.prompt, *answer, *([] if ended else [ours])], [*row.teacher_prompt, *read, theirs]
        (aligned,) = align_rows(
            [TokenizedRow(ids, [Answer(len(row.prompt), len(ids), content)])],
            [TokenizedRow(teacher_ids, [Answer(len(row.teacher_prompt), len(teacher_ids), content)])],
            self.pair,
        )
        if isinstance(aligned, Unaligned):
            return None
        return cut(aligned, 0, min(len(row.prompt) + len(answer), self.max_length))
