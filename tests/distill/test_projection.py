"""The projected target against the formula enumerated, on small random tokenizers; and what it must keep."""

from __future__ import annotations

from collections import Counter

import torch
from hypothesis import assume, given, settings
from torch import Tensor

from hymba_tune.data import Conversation, Message, Text
from hymba_tune.distill.alignment import Alignment, align
from hymba_tune.distill.pair import Pair
from hymba_tune.distill.projection import Projection, find_places
from hymba_tune.distill.spelling import END
from hymba_tune.distill.tables import build_tables, count_first_pieces
from tests.distill.random_pairs import Drawn, drawn
from tests.reference import naive_projection as naive
from tests.tolerances import FLOAT64


def aligned(texts: list[str], pair: Pair) -> list[Alignment]:
    talks = [Conversation((Message("user", "a"), Message("assistant", text))) for text in texts]
    rows = align([*map(Text, texts), *talks], pair)
    assert all(isinstance(row, Alignment) for row in rows), rows
    return [row for row in rows if isinstance(row, Alignment)]


def random_probs(rows: int, vocabulary: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, vocabulary, dtype=torch.float64).mul(2).softmax(-1).to(dtype)


def naive_first(pair: Pair, rows: list[Alignment], segment: naive.Segment) -> naive.Callable[[int], dict[int, float]]:
    """Shares of first pieces: once alone, and as often as the rows have them."""
    seen: dict[int, Counter[int]] = {}
    for row in rows:
        for student, teacher, spelled in zip(row.student, row.teacher, row.spelled, strict=True):
            if not spelled:
                seen.setdefault(row.teacher_ids[teacher], Counter())[row.student_ids[student]] += 1
    special = set(pair.teacher.tokenizer.all_special_ids)

    def first(token: int) -> dict[int, float]:
        spelled, counts = pair.teacher.spelling.tokens[token], Counter(seen.get(token, {}))
        if spelled == END:
            counts[pair.student.tokenizer.eos_token_id] += 1
        elif token not in special and (pieces := segment(spelled)):
            counts[pieces[0]] += 1
        return {piece: count / counts.total() for piece, count in counts.items()}

    return first


def segment_of(one: Drawn) -> naive.Segment:
    """The twin's segmentation, blind to what ends a turn and to the names of special tokens."""
    names = {one.pair.teacher.spelling.tokens[token] for token in one.pair.teacher.tokenizer.all_special_ids}
    return lambda spelled: None if spelled in names else one.segment(spelled)


@settings(max_examples=60, deadline=None)
@given(one=drawn())
def test_mass_is_the_enumerated_formula(one: Drawn) -> None:
    assume(one.pair.student.spelling != one.pair.teacher.spelling)  # then special tokens count as well
    rows, tables = aligned(one.texts, one.pair), build_tables(one.pair)
    vocabulary, segment = len(one.pair.student.spelling), segment_of(one)
    projection = Projection(tables, count_first_pieces(rows), vocabulary=vocabulary, dtype=torch.float64)
    first = naive_first(one.pair, rows, segment)
    teacher, spell = one.pair.teacher.spelling.tokens, one.pair.student.spelling.tokens.__getitem__
    for row in rows:
        probs = random_probs(len(row.teacher_ids), len(teacher))
        target = projection(probs, find_places(row, tables))
        assert len(target.mass) == len(row.student)
        for place, (at, spelled) in enumerate(zip(row.teacher.tolist(), row.spelled.tolist(), strict=True)):
            before = None if row.first[place] or at < 2 else probs[at - 2].tolist()
            u, previous = teacher[row.teacher_ids[at]][:spelled], row.teacher_ids[at - 1]
            mass, bucket = naive.mass(teacher, probs[at - 1].tolist(), before, previous, u, first, segment, spell)
            expected = torch.zeros(vocabulary, dtype=torch.float64)
            expected[list(mass)] = torch.tensor(list(mass.values()), dtype=torch.float64)
            total = sum(mass.values()) + bucket
            FLOAT64.check(target.mass[place], torch.tensor(total, dtype=torch.float64), "mass")
            piece = row.student_ids[row.student[place]]
            assert target.known[place] == (total > 1e-6 and (mass.get(piece, 0) > 0 or not row.crossing[place]))
            if total:
                FLOAT64.check(target.probs[place], expected / total, "probabilities")
                FLOAT64.check(target.bucket[place], torch.tensor(bucket / total, dtype=torch.float64), "bucket")
