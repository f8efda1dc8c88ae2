"""Rollouts: the same rows as data with the same text."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from hymba_tune.checkpoint import load_tokenizer, load_weights
from hymba_tune.config import SFTConfig
from hymba_tune.data import Conversation, Message
from hymba_tune.distill import rollouts
from hymba_tune.distill.alignment import Alignment, align
from hymba_tune.distill.pair import TokenizerPair, make_pair
from hymba_tune.distill.rollouts import RolloutGenerator
from hymba_tune.distill.rows import AlignedData, read_rows
from hymba_tune.registry import resolve_model
from tests.distill.inputs import QUESTION, quiet, talks, write
from tests.distill.tokenizers import ALL

ANSWER = "It is 42, or naïve 🙂."


@pytest.fixture(scope="module", params=["llama3", "mistral"])
def pair(request: pytest.FixtureRequest, small_model: Path) -> TokenizerPair:
    return make_pair(load_tokenizer(small_model), ALL[request.param])


@pytest.fixture
def data(pair: TokenizerPair, tmp_path: Path) -> AlignedData:
    options = SFTConfig(data=[talks(tmp_path / "a.jsonl")], eval_split=0)
    return read_rows(options, pair, context=None, seed=0, prompts=1, working=quiet)


@pytest.fixture
def own(pair: TokenizerPair, data: AlignedData) -> Callable[..., RolloutGenerator]:
    return lambda **changes: RolloutGenerator(
        **{
            "pair": pair,
            "rows": data.rows,
            "max_length": 512,
            "answer_tokens": 8,
            "temperature": 1.0,
            "seed": 0,
        }
        | changes
    )


def examples(data: AlignedData) -> list[dict[str, Any]]:
    return [{name: row[name] for name in ("input_ids", "labels", "row")} for row in data.rows]


def says(monkeypatch: pytest.MonkeyPatch, *answers: list[int]) -> None:
    """Have the student write these."""
    written = iter(answers)
    monkeypatch.setattr(rollouts, "write", lambda _, prompts, **__: [next(written) for _ in prompts])


class Nobody:
    device = torch.device("cpu")


def ids(pair: TokenizerPair, text: str) -> list[int]:
    """As the student's tokenizer parts an answer in its place."""
    tokenizer = pair.student.tokenizer
    (row,) = align([Conversation((Message("user", QUESTION), Message("assistant", text)))], pair)
    assert isinstance(row, Alignment)
    end = row.student_ids.index(tokenizer.eos_token_id, int(row.student[0]))
    return row.student_ids[int(row.student[0]) : end + 1]


def test_rollout_is_a_row_like_the_datas(
    pair: TokenizerPair, data: AlignedData, own: Callable[..., RolloutGenerator], monkeypatch: pytest.MonkeyPatch
) -> None:
    says(monkeypatch, ids(pair, ANSWER))
    texts, fresh = own().rewrite(Nobody(), examples(data)[:1], 1.0, 0, 3)  # type: ignore[arg-type]
    (row,) = align([Conversation((Message("user", QUESTION), Message("assistant", ANSWER)))], pair)
    assert isinstance(row, Alignment)
    (found,), (text,) = fresh, texts
    assert text["row"] == [-4] * len(text["input_ids"])
    assert text["input_ids"] == found.student_ids == row.student_ids[: len(found.student_ids)]
    assert found.teacher_ids == row.teacher_ids[: len(found.teacher_ids)]
    for name in ("student", "teacher", "spelled", "first", "crossing"):
        assert getattr(found, name).tolist() == getattr(row, name).tolist(), name
    assert found.spans.tolist() == row.spans.tolist()
    begin = int(row.student[0])
    assert text["labels"] == [-100] * begin + found.student_ids[begin:]


def test_unfinished_answer_is_judged_as_far_as_it_goes(
    pair: TokenizerPair, data: AlignedData, own: Callable[..., RolloutGenerator], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ids(pair, ANSWER)
    says(monkeypatch, whole[:-1], whole)
    (short, cut), fresh = own().rewrite(Nobody(), examples(data)[:2], 1.0, 0, 0)  # type: ignore[arg-type]
    assert short["input_ids"] == cut["input_ids"][:-1]
    end = pair.student.tokenizer.eos_token_id
    assert short["input_ids"][-1] != end == cut["input_ids"][-1]
    assert fresh[0].student.tolist() == fresh[1].student.tolist()[:-1]
    prompt = len(short["input_ids"]) - len(whole) + 1
    says(monkeypatch, whole)
    (shorter,), fresh = own(max_length=prompt + 2).rewrite(Nobody(), examples(data)[:1], 1.0, 0, 0)  # type: ignore[arg-type]
    assert shorter["input_ids"] == short["input_ids"][: prompt + 2]
    assert max(fresh[0].student) == prompt + 1


def test_what_the_teacher_cannot_read_leaves_the_data_as_it_is(
    pair: TokenizerPair, data: AlignedData, own: Callable[..., RolloutGenerator], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, end = pair.student.spelling.tokens, pair.student.tokenizer.eos_token_id
    half = next(token for token, spelled in enumerate(tokens) if spelled == b"\xf0")
    says(monkeypatch, [end], [half, end])
    given = examples(data)[:2]
    assert own().rewrite(Nobody(), given, 1.0, 0, 0) == (given, [])  # type: ignore[arg-type]


def test_texts_have_no_prompts_to_answer(pair: TokenizerPair, tmp_path: Path) -> None:
    options = SFTConfig(data=[write(tmp_path / "t.jsonl", [{"text": ANSWER * 20}])], eval_split=0, max_length=16)
    data = read_rows(options, pair, context=None, seed=0, prompts=0, working=quiet)
    given = examples(data)
    assert RolloutGenerator(pair, data.rows, 16, 8, 1.0, 0).rewrite(Nobody(), given, 1.0, 0, 0) == (given, [])  # type: ignore[arg-type]


def test_answers_depend_on_the_row_and_the_step_alone(
    data: AlignedData, own: Callable[..., RolloutGenerator], small_model: Path
) -> None:
    """Not on the other rows of the batch, so that any number of processes writes the same ones."""
    student = load_weights(resolve_model(str(small_model)), dtype=torch.float32, device=torch.device("cpu"))
    given, state = examples(data), torch.random.get_rng_state()

    def written(step: int, *batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        rows = [row for batch in batches for row in own().rewrite(student, batch, 0.5, step, 0)[0]]
        return [{name: row[name] for name in ("input_ids", "labels")} for row in rows]

    whole = [written(step, given) for step in range(3)]
    assert [written(step, given[:1], given[1:]) for step in range(3)] == whole
    assert torch.equal(torch.random.get_rng_state(), state)
    assert whole[0] != whole[1] != whole[2]
    before = [{name: row[name] for name in ("input_ids", "labels")} for row in given] * 3
    kept = [row for row, one in zip(chain(*whole), before, strict=True) if row == one]
    assert 0 < len(kept) < len(before)
