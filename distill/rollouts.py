"""Answers that the student writes itself while it learns, made into rows that the teacher can judge."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from hymba_tune.data import IGNORED
from hymba_tune.distill.alignment import Alignment, align_rows
from hymba_tune.distill.pair import Answer, TokenizedRow, TokenizerPair, Unaligned
from hymba_tune.distill.rows import alignment, cut
from hymba_tune.distill.segments import tokenizer_within
from hymba_tune.generate import write


class _Asked(NamedTuple):
    """A row of the data whose first answer is to be written anew.

    Attributes:
        number: Of its text in the batch.
        prompt: The student's tokens before that answer.
        teacher_prompt: The teacher's.
        lead: What the teacher's first token spells before the answer: white space.
    """

    number: int
    prompt: list[int]
    teacher_prompt: list[int]
    lead: str


@dataclass(frozen=True)
class RolloutGenerator:
    """Writes them.

    Attributes:
        pair: The two sides.
        rows: All rows of the data.
        max_length: Tokens that a row may have.
        answer_tokens: Tokens that an answer may have.
        temperature: At which they are sampled.
        seed: Of the choice of rows, and of the sampling.
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
        self, model: PreTrainedModel, examples: Sequence[dict[str, Any]], share: float, moment: int, written: int
    ) -> tuple[list[dict[str, Any]], list[Alignment]]:
        """Put answers of the student's in the place of the data's.

        A row keeps the data's answer where it has no prompt, or what the student wrote is no text that the teacher can
        read: half a character, or nothing.

        Args:
            model: The student.
            examples: Of a batch, as its collator took them.
            share: Of them that are to be written anew.
            moment: Number of the batch in the run: the same one gives the same answers.
            written: How many answers there are in the step already.

        Returns:
            The batch's examples, and the alignments of the new ones, whose numbers go down from -1 - ``written``.
        """
        draw = random.Random(f"{self.seed} {moment}")
        chosen = [number for number in range(len(examples)) if draw.random() < share]
        asked = [row for row in (self._ask(number, examples[number]) for number in chosen) if row]
        if not asked:
            return list(examples), []
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(draw.getrandbits(62))
            answers = write(
                model,
                [row.prompt for row in asked],
                ends=self.pair.student.ends,
                max_new_tokens=self.answer_tokens,
                temperature=self.temperature,
            )
        texts, fresh = list(examples), list[Alignment]()
        for row, answer in zip(asked, answers, strict=True):
            found = self._align(row, answer)
            if found is not None:
                number = -1 - written - len(fresh)
                fresh.append(found)
                ids = found.student_ids
                labels = [IGNORED] * len(row.prompt) + ids[len(row.prompt) :]
                texts[row.number] = {"input_ids": ids, "labels": labels, "row": [number] * len(ids)}
        return texts, fresh

    def _ask(self, number: int, example: dict[str, Any]) -> _Asked | None:
        row = alignment(self.rows[example["row"][0]])
        first = next((at for at, label in enumerate(example["labels"]) if label != IGNORED), 0)
        if row.plain or first + 1 >= self.max_length or row.student[0] != first:
            return None
        begin, lead = int(row.teacher[0]), int(row.spelled[0])
        spelled = self.pair.teacher.spelling.tokens[row.teacher_ids[begin]]
        return _Asked(number, example["input_ids"][:first], row.teacher_ids[:begin], spelled[:lead].decode())

    def _align(self, row: _Asked, answer: list[int]) -> Alignment | None:
        ours, theirs = self.pair.student.end, self.pair.teacher.end
        ended = answer[-1] == ours
        said = self.pair.student.spelling.spell(answer[:-1] if ended else answer).strip()
        try:
            text = said.decode()
        except UnicodeDecodeError:
            return None
        if not text:
            return None
        read: list[int] = self._reader.encode(row.lead + text).ids
        ids, teacher_ids = [*row.prompt, *answer, *([] if ended else [ours])], [*row.teacher_prompt, *read, theirs]
        (found,) = align_rows(
            [TokenizedRow(ids, [Answer(len(row.prompt), len(ids), said)])],
            [TokenizedRow(teacher_ids, [Answer(len(row.teacher_prompt), len(teacher_ids), said)])],
            self.pair,
        )
        if isinstance(found, Unaligned):
            return None
        return cut(found, 0, min(len(row.prompt) + len(answer), self.max_length))
