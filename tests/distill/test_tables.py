"""Tables of two vocabularies: against the twin's segmentation, and cached on disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings

from hymba_tune.data import Text
from hymba_tune.distill import tables as module
from hymba_tune.distill.alignment import Alignment, align
from hymba_tune.distill.pair import make_pair
from hymba_tune.distill.segments import Segmenter
from hymba_tune.distill.tables import NOWHERE, Tables, build_tables, count_first_tokens, open_tables, pair_key
from tests.data.small_tokenizers import LLAMA3, LLAMA3_TOKENS, byte_level
from tests.distill.random_pairs import Drawn, drawn
from tests.distill.tokenizers import ALL

HYMBA_LLAMA = make_pair(ALL["hymba"], ALL["llama3"])


def same(one: Tables, other: Tables) -> bool:
    return all(np.array_equal(getattr(one, field.name), getattr(other, field.name)) for field in fields(Tables))


@settings(max_examples=40, deadline=None)
@given(one=drawn())
def test_tokens_are_segmented_as_the_student_does(one: Drawn) -> None:
    spelled = [token for token in one.pair.teacher.spelling.tokens if token]
    assert list(Segmenter(one.pair.student)(spelled)) == [one.segment(token) for token in spelled]


@pytest.mark.parametrize("name", ["hymba", "unigram", "llama3"])
def test_no_space_of_the_tokenizers_own(name: str) -> None:
    side = make_pair(ALL[name], ALL["llama3"]).student
    texts = [b"the", b" the", b"  the", b"42", "naïve".encode()]
    for text, student_tokens in zip(texts, Segmenter(side)(texts), strict=True):
        assert student_tokens is not None
        assert side.spelling.spell(student_tokens) == text
    (alone,) = Segmenter(side)([b" the"])
    in_text = side.tokenizer("x the", add_special_tokens=False)["input_ids"]
    assert alone is not None
    assert in_text[-len(alone) :] == alone


def test_bytes_that_are_no_text_become_byte_tokens() -> None:
    side = HYMBA_LLAMA.student
    (student_tokens,) = Segmenter(side)([b" \xf0\x9f"])
    assert side.tokenizer.convert_ids_to_tokens(student_tokens) == ["▁", "<0xF0>", "<0x9F>"]


def test_token_that_the_student_cannot_write_has_no_tokens() -> None:
    """Without tokens for bytes, and for nothing at all."""
    import copy

    side = copy.copy(HYMBA_LLAMA.student)
    segmenter = Segmenter(side)
    segmenter._vocabulary = {}
    assert list(segmenter([b"\xf0", b"", b"a"]))[:2] == [None, None]


def test_special_tokens_take_no_part_but_the_end() -> None:
    tables, teacher = build_tables(HYMBA_LLAMA), HYMBA_LLAMA.teacher.tokenizer
    assert tables.first[teacher.eos_token_id] == HYMBA_LLAMA.student.tokenizer.eos_token_id
    others = [token for token in teacher.all_special_ids if token != teacher.eos_token_id]
    assert others
    assert (tables.first[others] == NOWHERE).all()


def test_walks_lead_where_the_bytes_do() -> None:
    tables, spelled = build_tables(HYMBA_LLAMA), HYMBA_LLAMA.teacher.spelling.tokens
    nodes = {
        token[:size]: tables.prefix(np.array([index]), np.array([size]))[0]
        for index, token in enumerate(spelled)
        for size in range(len(token) + 1)
    }
    some = np.arange(260, len(spelled), 3)
    one, other = (side.ravel() for side in np.meshgrid(some, some))
    for cut in (1, 2):
        walked = tables.walk(tables.whole(one), other, np.minimum(cut, HYMBA_LLAMA.teacher.spelling.lengths[other]))
        expected = [nodes.get(spelled[a] + spelled[b][:cut], NOWHERE) for a, b in zip(one, other, strict=True)]
        assert walked.tolist() == expected
        assert {NOWHERE} < set(expected)


def test_counts_are_of_shared_boundaries() -> None:
    rows = [row for row in align([Text("the the answer"), Text("42")], HYMBA_LLAMA) if isinstance(row, Alignment)]
    seen = count_first_tokens(rows)
    assert seen.counts.sum() == sum((row.spelled == 0).sum() for row in rows)
    twice = count_first_tokens([*rows, *rows])
    assert (twice.counts == 2 * seen.counts).all()
    assert (twice.tokens == seen.tokens).all()


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """Pairs whose tables were built rather than read."""
    built: list[object] = []
    original = build_tables
    monkeypatch.setattr(module, "build_tables", lambda pair: built.append(pair) or original(pair))
    return built


def test_tables_are_built_once(tmp_path: Path, builds: list[object]) -> None:
    first, second = open_tables(HYMBA_LLAMA, tmp_path / "new"), open_tables(HYMBA_LLAMA, tmp_path / "new")
    assert same(first, second)
    assert len(builds) == 1
    assert [path.name for path in (tmp_path / "new").iterdir()] == [f"{pair_key(HYMBA_LLAMA)}.safetensors"]


def test_damaged_tables_are_built_again(tmp_path: Path, builds: list[object]) -> None:
    first = open_tables(HYMBA_LLAMA, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:1000])
    assert same(open_tables(HYMBA_LLAMA, tmp_path), first)
    assert same(open_tables(HYMBA_LLAMA, tmp_path), first)
    assert len(builds) == 2


def test_key_is_the_content_of_both_tokenizers() -> None:
    key = pair_key(HYMBA_LLAMA)
    assert key == pair_key(
        make_pair(ALL["hymba"], byte_level(LLAMA3, LLAMA3_TOKENS, "<|eot_id|>", "<|begin_of_text|>"))
    )
    assert key != pair_key(make_pair(ALL["hymba"], ALL["chatml"]))
    assert key != pair_key(make_pair(ALL["llama3"], ALL["hymba"]))
    assert key != pair_key(make_pair(ALL["hymba"], ALL["llama3"], teacher_end="<|begin_of_text|>"))
