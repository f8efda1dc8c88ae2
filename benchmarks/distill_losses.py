"""The student's training rows with a teacher's targets, computed once and stored on disk."""

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

TOP_K = 64
"""Maximum number of student tokens stored per target; a run may use fewer."""


@dataclass(frozen=True)
class Setting:
    """How targets are computed.

    Attributes:
        twin: Whether the teacher is the one with the student's tokenizer.
        in_context: Whether first student tokens are also counted in the student's rows, not only for single tokens.
        second_cover: Whether the mass of teacher tokens that extend past a boundary is restored.
        rest_mass: Whether the mass outside the stored student tokens is one outcome of the target.
        temperature: Temperature of the teacher's probabilities.
    """

    twin: bool = False
    in_context: bool = True
    second_cover: bool = True
    rest_mass: bool = True
    temperature: float = 1.0


@dataclass(frozen=True, slots=True)
class StudentRow:
    """A training row of the student with a teacher's targets.

    Attributes:
        ids: ``(T,)`` int64, the token ids.
        labels: ``(T,)`` int64, the ids in the loss; -100 elsewhere.
        targets: The teacher's targets; None without a teacher.
        begins: ``(M,)`` int64, the student tokens that begin where a teacher token begins.
        hidden: ``(M, d)`` bfloat16, the teacher's hidden states that predict its tokens there.
    """

    ids: Tensor
    labels: Tensor
    targets: Targets | None = None
    begins: Tensor | None = None
    hidden: Tensor | None = None


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load a trained teacher."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), PreTrainedTokenizerFast.from_pretrained(folder)


def plain_rows(examples: Sequence[Example]) -> list[StudentRow]:
    """Rows without targets of a teacher."""
    side = side_of(PreTrainedTokenizerFast.from_pretrained(NANO))
    return [one for row in tokenize_examples(examples, side) if (one := _student_row(row)) is not None]


def _student_row(row: TokenizedRow | Unaligned) -> StudentRow | None:
    if isinstance(row, Unaligned) or len(row.ids) > LONGEST:
        return None
    ids = torch.tensor(row.ids)
    labels = torch.full_like(ids, IGNORED)
    for begin, end, _ in row.answers:
        labels[max(begin, 1) : end] = ids[max(begin, 1) : end]
    return StudentRow(ids, labels)


@torch.no_grad()
def rows_with_targets(examples: Sequence[Example], folder: Path, setting: Setting) -> list[StudentRow]:
    """The same rows, with the targets of the teacher in ``folder`` for those that can be aligned."""
    teacher = _HiddenStateRecorder(find_teacher(str(folder)).load(torch.device("cpu"), torch.float32))
    pair = make_pair(PreTrainedTokenizerFast.from_pretrained(NANO), teacher.tokenizer)
    students, teachers = tokenize_examples(examples, pair.student), tokenize_examples(examples, pair.teacher)
    both = zip(map(_student_row, students), align_rows(students, teachers, pair), strict=True)
    aligned = [(one, row) for one, row in both if one and _fits(row)]
    plain, rows = zip(*aligned, strict=True)
    tables = build_tables(pair)
    projection_class = Projection if setting.rest_mass else WithoutRestMass
    projection = projection_class(
        tables, count_first_tokens(rows) if setting.in_context else None, vocabulary=len(pair.student.spelling)
    )
    find = find_places if setting.second_cover else _find_without_cover
    maker = TargetMaker(teacher, tables, projection, TOP_K, setting.temperature, find)
    result = list(plain)
    for index, batch in maker(rows):
        row = rows[index]
        begins = row.spelled == 0
        result[index] = replace(
            result[index],
            targets=batch.targets,
            begins=torch.from_numpy(row.student[begins]),
            hidden=teacher.hidden.pop(index)[row.teacher[begins] - 1].to(torch.bfloat16),
        )
    return result


def _fits(row: Alignment | Unaligned) -> bool:
    return isinstance(row, Alignment) and len(row.teacher_ids) <= LONGEST


class _HiddenStateRecorder:
    """A teacher that also provides the hidden states of each row."""

    def __init__(self, teacher: ModelTeacher) -> None:
        self.name = teacher.name
        self.tokenizer = teacher.tokenizer
        self._teacher = teacher
        self.hidden: dict[int, Tensor] = {}

    def outputs(self, rows: Sequence[Sequence[int]]) -> Iterator[tuple[int, HeadOutputs]]:
        """See `ModelTeacher`."""
        for index, outputs in self._teacher.outputs(rows):
            self.hidden[index] = outputs.head.hidden
            yield index, outputs


class WithoutRestMass(Projection):
    """A projection whose targets have no rest mass, except for tokens cut off later."""

    def __call__(self, probs: Tensor, places: Places, cut: Tensor | None = None) -> ProjectedTarget:
        """See `Projection`."""
        target = super().__call__(probs, places, cut)
        mass = target.probs.sum(-1)
        known = target.known & (mass > 0)
        scaled = target.probs / torch.where(known, mass, 1)[:, None]
        return replace(target, probs=scaled, rest_mass=torch.zeros_like(target.rest_mass), known=known)


def _find_without_cover(row: Alignment, tables: Tables) -> Places:
    places = find_places(row, tables)
    return replace(places, before=torch.full_like(places.before, -1))


def fewer(targets: Targets, k: int) -> Targets:
    """Only the k likeliest student tokens; the others are added to the rest mass."""
    student_tokens, log_probs, rest_mass = targets.top
    rest = torch.cat([log_probs[:, k:], rest_mass[:, None]], 1).logsumexp(1)
    return replace(targets, top=SparseTarget(student_tokens[:, :k], log_probs[:, :k], rest))


@torch.inference_mode()
def with_teacher_answers(examples: Sequence[Example], teacher: Path, tokens: int) -> list[Example]:
    """The examples with answers generated by the teacher, each of at most ``tokens`` teacher tokens."""
    model, tokenizer = load(teacher)
    torch.manual_seed(0)
    result: list[Example] = []
    for group in groups(sorted(examples, key=lambda example: len(example.messages[-1].content)), 64):
        questions = [example.messages[:-1] for example in group]
        prompts = [encode_prompt(Conversation(messages), tokenizer) for messages in questions]
        answers = generate(model, tokenizer, prompts, tokens, sample=True)
        pairs = zip(questions, answers, strict=True)
        result += [Conversation((*m, Message("assistant", text.strip()))) for m, text in pairs if text.strip()]
    return result


def generate(
    model: Any, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[list[int]], tokens: int, *, sample: bool
) -> list[str]:
    """Generate continuations of several prompts in one batch."""
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
