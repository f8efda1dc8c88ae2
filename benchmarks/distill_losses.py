"""What each way of distilling teaches: the student's rows with a teacher's targets, made once and kept on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from distill_teachers import LONGEST, NANO, groups, side_of
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from hymba_tune.data import IGNORED, Conversation, Message, encode_prompt
from hymba_tune.data.formats import Example
from hymba_tune.distill.alignment import Alignment, align_rows
from hymba_tune.distill.outputs import HeadOutputs
from hymba_tune.distill.pair import TokenizedRow, Unaligned, make_pair, tokenize_examples
from hymba_tune.distill.projection import Places, ProjectedTarget, Projection, SparseTarget, find_places
from hymba_tune.distill.tables import Tables, build_tables, count_first_tokens
from hymba_tune.distill.target_maker import TargetMaker
from hymba_tune.distill.targets import Targets
from hymba_tune.distill.teacher import ModelTeacher, find_teacher

KEPT = 64
"""Pieces kept of a target, at most; a run may use fewer."""


@dataclass(frozen=True)
class Setting:
    """How targets are made.

    Attributes:
        twin: Whether the teacher is the one with the student's tokenizer.
        in_context: Whether first pieces are counted in the student's own rows, beside those of tokens alone.
        second_cover: Whether the mass of tokens that go on is given back.
        bucket: Whether tokens that end where a piece begins stay one outcome.
        temperature: Of the teacher's probabilities.
    """

    twin: bool = False
    in_context: bool = True
    second_cover: bool = True
    bucket: bool = True
    temperature: float = 1.0


@dataclass(frozen=True, slots=True)
class Lesson:
    """A row of the student's with what a teacher says of it.

    Attributes:
        ids: ``(T,)`` int64.
        labels: ``(T,)`` int64: the ids that are learned, else -100.
        targets: None where there is no teacher.
        begins: ``(M,)`` int64: tokens that begin where one of the teacher's does.
        hidden: ``(M, d)`` bfloat16: the teacher's hidden states that predict its tokens there.
    """

    ids: Tensor
    labels: Tensor
    targets: Targets | None = None
    begins: Tensor | None = None
    hidden: Tensor | None = None


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A trained teacher."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), PreTrainedTokenizerFast.from_pretrained(folder)


def plain_lessons(examples: Sequence[Example]) -> list[Lesson]:
    """Rows without a teacher."""
    side = side_of(PreTrainedTokenizerFast.from_pretrained(NANO))
    return [lesson for row in tokenize_examples(examples, side) if (lesson := _lesson(row)) is not None]


def _lesson(row: TokenizedRow | Unaligned) -> Lesson | None:
    if isinstance(row, Unaligned) or len(row.ids) > LONGEST:
        return None
    ids = torch.tensor(row.ids)
    labels = torch.full_like(ids, IGNORED)
    for begin, end, _ in row.answers:
        labels[max(begin, 1) : end] = ids[max(begin, 1) : end]
    return Lesson(ids, labels)


@torch.no_grad()
def taught_lessons(examples: Sequence[Example], folder: Path, setting: Setting) -> list[Lesson]:
    """The same rows, with the targets of the teacher in a folder where the sides can be aligned."""
    teacher = _Watched(find_teacher(str(folder)).load(torch.device("cpu"), torch.float32))
    pair = make_pair(PreTrainedTokenizerFast.from_pretrained(NANO), teacher.tokenizer)
    students, teachers = tokenize_examples(examples, pair.student), tokenize_examples(examples, pair.teacher)
    both = zip(map(_lesson, students), align_rows(students, teachers, pair), strict=True)
    aligned = [(lesson, row) for lesson, row in both if lesson and _fits(row)]
    plain, rows = zip(*aligned, strict=True)
    tables = build_tables(pair)
    make = Projection if setting.bucket else WithoutBucket
    projection = make(
        tables, count_first_tokens(rows) if setting.in_context else None, vocabulary=len(pair.student.spelling)
    )
    find = find_places if setting.second_cover else _find_without_cover
    maker = TargetMaker(teacher, tables, projection, KEPT, setting.temperature, find)
    signals = list(plain)
    for index, taught in maker(rows):
        row = rows[index]
        begins = row.spelled == 0
        signals[index] = replace(
            signals[index],
            targets=taught.targets,
            begins=torch.from_numpy(row.student[begins]),
            hidden=teacher.hidden[row.teacher[begins] - 1].to(torch.bfloat16),
        )
    return signals


def _fits(row: Alignment | Unaligned) -> bool:
    return isinstance(row, Alignment) and len(row.teacher_ids) <= LONGEST


class _Watched:
    """A teacher whose hidden states of the row it is asked about can be seen."""

    def __init__(self, teacher: ModelTeacher) -> None:
        self.name, self.tokenizer, self._teacher = teacher.name, teacher.tokenizer, teacher

    def outputs(self, rows: Sequence[Sequence[int]]) -> Iterator[tuple[int, HeadOutputs]]:
        """See `ModelTeacher`."""
        for index, outputs in self._teacher.outputs(rows):
            self.hidden = outputs.head.hidden
            yield index, outputs


class WithoutBucket(Projection):
    """A projection whose targets have no bucket but what is cut off later."""

    def __call__(self, probs: Tensor, places: Places, cut: Tensor | None = None) -> ProjectedTarget:
        """See `Projection`."""
        target = super().__call__(probs, places, cut)
        left = target.probs.sum(-1)
        known = target.known & (left > 0)
        scaled = target.probs / torch.where(known, left, 1)[:, None]
        return replace(target, probs=scaled, rest_mass=torch.zeros_like(target.rest_mass), known=known)


def _find_without_cover(row: Alignment, tables: Tables) -> Places:
    places = find_places(row, tables)
    return replace(places, before=torch.full_like(places.before, -1))


def fewer(targets: Targets, k: int) -> Targets:
    """Only the k likeliest pieces; the others join the bucket."""
    student_tokens, log_probs, rest_mass = targets.top
    rest = torch.cat([log_probs[:, k:], rest_mass[:, None]], 1).logsumexp(1)
    return replace(targets, top=SparseTarget(student_tokens[:, :k], log_probs[:, :k], rest))


@torch.inference_mode()
def rewritten(examples: Sequence[Example], teacher: Path, tokens: int) -> list[Example]:
    """The examples with their answers written by the teacher, of so many of its tokens at most."""
    model, tokenizer = load(teacher)
    torch.manual_seed(0)
    written = []
    for some in groups(sorted(examples, key=lambda example: len(example.messages[-1].content)), 64):
        asked = [example.messages[:-1] for example in some]
        prompts = [encode_prompt(Conversation(messages), tokenizer) for messages in asked]
        answers = write(model, tokenizer, prompts, tokens, sample=True)
        pairs = zip(asked, answers, strict=True)
        written += [Conversation((*m, Message("assistant", said.strip()))) for m, said in pairs if said.strip()]
    return written


def write(
    model: Any, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[list[int]], tokens: int, *, sample: bool
) -> list[str]:
    """Go on after some prompts, all at once."""
    longest = max(map(len, prompts))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.autocast("cpu", torch.bfloat16):
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=sample,
            top_k=0 if sample else None,
            max_new_tokens=tokens,
            pad_token_id=pad,
            eos_token_id=tokenizer.eos_token_id,
        )
    return tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
