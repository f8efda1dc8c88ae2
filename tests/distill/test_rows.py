"""Rows on disk, aligned: as the alignment of the whole example has them, whatever they were cut to."""

from __future__ import annotations

import copy
import json
from functools import partial
from os.path import commonprefix
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from tokenizers import normalizers

from hymba_tune.config import SFTConfig
from hymba_tune.data import Conversation, Message
from hymba_tune.data.formats import Example
from hymba_tune.distill import rows as module
from hymba_tune.distill.alignment import Alignment, align
from hymba_tune.distill.alignment_report import check_aligned
from hymba_tune.distill.pair import TokenizerPair, make_pair
from hymba_tune.distill.rows import AlignedData, alignment, read_rows
from hymba_tune.errors import DataError, TrainingError
from tests.distill.inputs import ANSWERS, QUESTION, quiet, talks, write
from tests.distill.tokenizers import ALL


def pair_of(student: str = "hymba", teacher: str = "llama3") -> TokenizerPair:
    return make_pair(ALL[student], ALL[teacher])


def read(data: str, pair: TokenizerPair, *, context: int | None = None, **changes: Any) -> AlignedData:
    options = SFTConfig.model_validate({"data": [data], "eval_split": 0, "cache": False, **changes})
    return read_rows(options, pair, context=context, seed=0, prompts=1, working=quiet)


def whole(example: Example, pair: TokenizerPair) -> Alignment:
    (row,) = align([example], pair)
    assert isinstance(row, Alignment)
    return row


def positions(row: Alignment) -> list[tuple[int, ...]]:
    return list(zip(*(column.tolist() for column in (row.student, row.teacher, row.spelled)), strict=True))


def test_conversation_is_aligned_as_its_example(tmp_path: Path) -> None:
    pair = pair_of()
    data = read(talks(tmp_path / "a.jsonl"), pair)
    assert len(data.rows) == len(ANSWERS)
    for row, answer in zip(data.rows, ANSWERS, strict=True):
        ours, known = (
            alignment(row),
            whole(Conversation((Message("user", QUESTION), Message("assistant", answer))), pair),
        )
        assert (ours.student_ids, positions(ours)) == (known.student_ids, positions(known))
        assert ours.teacher_ids == known.teacher_ids[: len(ours.teacher_ids)]
        assert ours.spans.tolist() == known.spans.tolist()
        learned = [index for index, label in enumerate(row["labels"]) if label != -100]
        assert learned == ours.student.tolist()
    assert data.alignment.rows == len(ANSWERS)
    assert data.prompts[0][1] == ANSWERS[0]


def test_weight_between_nought_and_one_is_refused(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWERS[0], "weight": 0.5}]
    with pytest.raises(DataError, match=r"The first, .*, line 1: one of its answers has weight 0\.5"):
        read(write(tmp_path / "a.jsonl", [{"messages": messages}]), pair_of())


def test_cut_conversation_keeps_what_comes_before_the_cut(tmp_path: Path) -> None:
    pair = pair_of()
    full, short = (read(talks(tmp_path / "a.jsonl"), pair, max_length=length) for length in (512, 44))
    assert short.report.cut
    for ours, known in zip(map(alignment, short.rows), map(alignment, full.rows), strict=True):
        end = len(ours.student_ids)
        assert positions(ours) == [position for position in positions(known) if position[0] < end]
        assert ours.spans.tolist() == [span for span in known.spans.tolist() if span[1] <= end]
        assert ours.teacher_ids == known.teacher_ids[: len(ours.teacher_ids)]
        assert len(ours.teacher_ids) == 1 + max(int(ours.teacher.max()), *(ours.spans[:, 3] - 1))


@pytest.mark.parametrize("teacher", ["llama3", "chatml"])
def test_text_in_several_rows_is_taught_in_each(teacher: str, tmp_path: Path) -> None:
    pair = pair_of(teacher=teacher)
    data = read(write(tmp_path / "a.jsonl", [{"text": " ".join(ANSWERS * 6)}]), pair, max_length=24)
    assert len(data.rows) > 5
    spell = pair.student.spelling.tokens, pair.teacher.spelling.tokens
    for number, row in enumerate(data.rows):
        ours = alignment(row)
        assert row["row"] == [number] * len(ours.student_ids)
        if number and ours.teacher_ids[0] == pair.teacher.tokenizer.bos_token_id:
            assert ours.student.tolist() == list(range(1, len(ours.student_ids)))
        for student, teacher_at, spelled in positions(ours):
            theirs = spell[1][ours.teacher_ids[teacher_at]][spelled:]
            mine = spell[0][ours.student_ids[student]]
            assert commonprefix([mine, theirs]) in (mine, theirs)
        for begin, end, teacher_begin, teacher_end in ours.spans.tolist():
            mine = b"".join(spell[0][token] for token in ours.student_ids[begin:end])
            assert mine == b"".join(spell[1][token] for token in ours.teacher_ids[teacher_begin:teacher_end])


def test_rows_know_their_numbers_wherever_they_go(tmp_path: Path) -> None:
    other = write(tmp_path / "b.jsonl", [{"prompt": "Hi", "completion": "Hello"}] * 3)
    for changes in ({"eval_split": 0.5, "weights": [2.5]}, {"eval_data": [other], "eval_max_rows": 2}):
        read_data = read(talks(tmp_path / "a.jsonl"), pair_of(), **changes)
        assert read_data.held_out is not None
        assert len(read_data.held_out) == 2
        for row in [*read_data.train, *read_data.held_out]:
            assert read_data.rows[row["row"][0]] == row


def test_as_many_rows_are_held_out_of_each_source(tmp_path: Path) -> None:
    """Under the columns' names that ``--map`` gives to all of them."""
    named = [
        write(tmp_path / f"{name}.jsonl", [{"ask": QUESTION, "completion": f"{name} {i}"} for i in range(count)])
        for name, count in (("a", 5), ("b", 4), ("c", 3))
    ]
    data = read(named[0], pair_of(), eval_data=named[1:], eval_max_rows=4, map=["prompt=ask"])
    assert data.held_out is not None
    assert data.held_out_sources == {"b.jsonl": 2, "c.jsonl": 2}
    assert [row["row"][0] for row in data.held_out] == [5, 6, 7, 8]
    assert data.rows[7:9]["input_ids"] == data.held_out[2:4]["input_ids"]
    assert [data.rows[number]["place"] for number in (5, 7)] == data.held_out[0:4:2]["place"]


def test_rows_that_cannot_be_taught_are_dropped_and_counted(tmp_path: Path) -> None:
    context = min(len(row["teacher_tokens"]) for row in read(talks(tmp_path / "a.jsonl"), pair_of()).rows)
    data = read(talks(tmp_path / "a.jsonl"), pair_of(), context=context)
    assert 0 < len(data.rows) < len(ANSWERS)
    assert data.report.bad_rows == len(ANSWERS) - len(data.rows)
    assert data.report.dropped_file is not None
    assert f"the teacher's context is {context} tokens, and this row takes" in data.report.dropped_file.read_text()
    data = read(write(tmp_path / "b.jsonl", [{"text": "as ▁ it is"}, {"text": "as it is"}]), pair_of())
    assert data.report.dropped_file is not None
    assert "not aligned (bytes differ)" in data.report.dropped_file.read_text()
    assert len(data.rows) == 1


def test_no_rows_left_names_the_reason(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the teacher's context is 3 tokens(.|\n)*both tokenizers spell"):
        read(talks(tmp_path / "a.jsonl"), pair_of(), context=3)


def test_row_with_a_token_that_the_teacher_has_no_output_for_is_dropped(tmp_path: Path) -> None:
    """All others are used."""
    teacher = copy.deepcopy(ALL["llama3"])
    teacher.add_tokens(["<image>"])
    pair = make_pair(ALL["hymba"], teacher, teacher_outputs=len(teacher) - 1)
    data = read(write(tmp_path / "a.jsonl", [{"text": "as it is"}, {"text": "an <image>"}]), pair)
    assert data.alignment.dropped == {"no output": 1}
    (first,) = data.alignment.first.values()
    assert first.endswith(
        f"a.jsonl, line 2: the teacher's tokenizer writes '<image>' (id {len(teacher) - 1}), and the teacher has "
        f"{len(teacher) - 1} outputs (10 bytes of answers)"
    )


def test_composed_text_aligns_with_a_tokenizer_that_composes(tmp_path: Path) -> None:
    teacher = copy.deepcopy(ALL["llama3"])
    teacher.backend_tokenizer.normalizer = normalizers.NFC()
    pair = make_pair(ALL["hymba"], teacher)
    rows = [{"prompt": "A cafe\u0301?", "completion": "un cafe\u0301 noir"}, {"prompt": "A", "completion": "b"}]
    options = SFTConfig.model_validate({"data": [write(tmp_path / "a.jsonl", rows)], "eval_split": 0})
    read_as = partial(read_rows, options, pair, context=None, seed=0, prompts=2, working=quiet)
    found = read_as()
    assert found.alignment.dropped == {"Unicode form": 1}
    (first,) = found.alignment.first.values()
    assert first.endswith(
        "a.jsonl, line 1: the tokens of the teacher's tokenizer do not spell answer 1: at byte 7 of 14, "
        r"'\xe9 noir' instead of 'e\u0301 noir' (14 bytes of answers)"
    )
    with pytest.raises(TrainingError, match=r"The first, .*a\.jsonl, line 1: (.|\n)*--normalize nfc"):
        check_aligned(found.alignment, 0.9)
    composed = read_as(normalize="nfc")
    assert len(composed.rows) == 2
    assert not composed.alignment.dropped
    row = alignment(composed.rows[0])
    for side, ids in ((pair.student, row.student_ids), (pair.teacher, row.teacher_ids)):
        assert "caf\u00e9 noir".encode() in side.spelling.spell(ids)
    assert composed.prompts[0][0].messages[0].content == "A caf\u00e9?"


def test_cached_rows_are_neither_tokenized_nor_aligned_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(talks(tmp_path / "a.jsonl"))
    path.write_text(path.read_text() + json.dumps({"text": "as ▁ it is"}) + "\n")
    first = read(str(path), pair_of(), cache=True)
    for name in ("find_answers", "tokenize_examples", "align_rows"):
        monkeypatch.setattr(module, name, Mock(side_effect=AssertionError(f"{name} again")))
    again = read(str(path), pair_of(), cache=True)
    assert again.rows[:] == first.rows[:]
    assert again.alignment == first.alignment
    assert again.alignment.dropped == {"bytes differ": 1}
    assert again.report.fingerprint == first.report.fingerprint
    assert again.report.counts() == first.report.counts()


def test_cached_rows_are_those_of_their_settings(tmp_path: Path) -> None:
    data = talks(tmp_path / "a.jsonl")
    seen = {read(data, pair_of(), cache=True).report.fingerprint}
    for pair, changes in (
        (make_pair(ALL["hymba"], ALL["llama3"], teacher_system="Be kind."), {}),
        (make_pair(ALL["hymba"], ALL["llama3"], teacher_system="Be kind.", teacher_system_as="user"), {}),
        (pair_of(teacher="chatml"), {}),
        (pair_of(), {"max_length": 30}),
    ):
        found = read(data, pair, cache=True, **changes).report.fingerprint
        assert found not in seen
        seen.add(found)
    with pytest.raises(DataError, match="the teacher's context is 3 tokens"):
        read(data, pair_of(), context=3, cache=True)


def test_fingerprint_is_of_both_sides(tmp_path: Path) -> None:
    data = talks(tmp_path / "a.jsonl")
    same, other = read(data, pair_of()), read(data, pair_of(teacher="chatml"))
    assert same.report.fingerprint == read(data, pair_of()).report.fingerprint != other.report.fingerprint
