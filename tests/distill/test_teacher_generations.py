"""Data whose answers the teacher writes: once, whatever interrupts it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from hymba_tune.config import DistillConfig
from hymba_tune.data import open_sources
from hymba_tune.distill import teacher_generations
from hymba_tune.distill.pair import make_pair
from hymba_tune.distill.spelling import END
from hymba_tune.distill.teacher_generations import ANSWERS, PART, TeacherGenerator
from hymba_tune.errors import ConfigError, DataError
from hymba_tune.files import LOCK, locked
from tests.distill.ending_teachers import ENDS
from tests.distill.runs import run, settings
from tests.distill.teachers import save_teacher
from tests.distill.test_rows import write
from tests.distill.tokenizers import ALL

PAIR = make_pair(ALL["hymba"], ALL["llama3"])
END_TOKEN = PAIR.teacher.spelling.tokens.index(END)
TALKS: list[dict[str, Any]] = [{"prompt": f"Number {number}?", "completion": "one"} for number in range(5)]
TURNS = ["Hi", "Hello", "And?", "Bye"]
TALKS += [
    {"messages": [{"role": role, "content": turn} for role, turn in zip(["user", "assistant"] * 2, TURNS, strict=True)]}
]


class Model:
    """Who writes; `Scripted` says what."""

    device = torch.device("cpu")

    @property
    def model(self) -> Model:
        return self


class Scripted:
    """Answers with the number of tokens of each prompt; remembers how many it was asked for, and may be killed."""

    def __init__(self, die_at: int = -1, unended: int = -1, unread: int = -1) -> None:
        self.asked: list[list[int]] = []
        self._die_at, self._odd = die_at, (unended, unread)

    def __call__(self, _: Any, prompts: Sequence[list[int]], *, ends: Sequence[int], **__: Any) -> list[list[int]]:
        if len(self.asked) == self._die_at:
            raise KeyboardInterrupt
        answers = []
        for prompt in prompts:
            said = ALL["llama3"](f"answer {len(prompt)}", add_special_tokens=False)["input_ids"]
            unended, unread = self._odd
            half = PAIR.teacher.spelling.tokens.index(b"\xf0")
            answers.append(
                said if len(self.asked) == unended else [*([half] * (len(self.asked) == unread) or said), ends[0]]
            )
            self.asked.append(prompt)
        return answers


@pytest.fixture
def writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., TeacherGenerator]:
    monkeypatch.setattr(teacher_generations, "BATCH", 2)

    def make(script: Scripted, rows: list[dict[str, Any]] | None = None, **changes: Any) -> TeacherGenerator:
        monkeypatch.setattr(teacher_generations, "write", script)
        sources = open_sources([write(tmp_path / "data.jsonl", rows or TALKS)])
        return TeacherGenerator(DistillConfig(**changes), sources, PAIR, lambda: "teacher")

    return make


def quiet(_: int) -> None: ...


def nobody() -> Any:
    raise AssertionError("the teacher is loaded, though nothing is to be written")


def test_last_answers_are_the_teachers_and_alone_learned(
    writer: Callable[..., TeacherGenerator], tmp_path: Path
) -> None:
    script = Scripted(unended=1, unread=3)
    found = writer(script, [*TALKS, {"text": "no prompt"}]).write(tmp_path / "a", Model, quiet)  # type: ignore[arg-type]
    assert (found.rows, found.left_out, found.texts) == (len(TALKS) - 2, 2, 1)
    rows = [json.loads(line) for line in found.path.read_text().splitlines()]
    assert [row["messages"][0]["content"] for row in rows] == ["Number 0?", "Number 2?", "Number 4?", "Hi"]
    assert rows[0]["messages"][-1] == {"role": "assistant", "content": f"answer {len(script.asked[0])}"}
    assert rows[-1]["messages"][1] == {"role": "assistant", "content": "Hello", "weight": 0}
    assert rows[-1]["messages"][-1] == {"role": "assistant", "content": f"answer {len(script.asked[-1])}"}
    prompt = PAIR.teacher.tokenizer.decode(script.asked[-1])
    assert "Hello" in prompt
    assert "Bye" not in prompt


def test_interrupted_writing_goes_on_where_it_was(writer: Callable[..., TeacherGenerator], tmp_path: Path) -> None:
    whole = writer(Scripted()).write(tmp_path / "whole", Model, quiet)  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        writer(Scripted(die_at=4)).write(tmp_path / "a", Model, quiet)  # type: ignore[arg-type]
    assert not (tmp_path / "a" / ANSWERS).exists()
    with (tmp_path / "a" / PART).open("a") as file:
        file.write('{"messages": [torn')
    rest = Scripted()
    found = writer(rest).write(tmp_path / "a", Model, quiet)  # type: ignore[arg-type]
    assert len(rest.asked) == 2
    assert found.path.read_text() == whole.path.read_text()
    again = writer(Scripted()).write(tmp_path / "a", nobody, quiet)
    assert (again.rows, again.left_out) == (whole.rows, whole.left_out)


def test_key_is_of_all_that_decides_the_answers(writer: Callable[..., TeacherGenerator]) -> None:
    keys = [
        writer(Scripted(), rows, **changes).key(quiet)
        for rows, changes in (
            (None, {}),
            (TALKS[:-1], {}),
            (None, {"answer_tokens": 9}),
            (None, {"answer_temperature": 0.5}),
            (None, {"seed": 1}),
        )
    ]
    assert len(set(keys)) == len(keys)
    assert writer(Scripted()).key(quiet) == keys[0]


def test_nothing_to_answer_is_said(writer: Callable[..., TeacherGenerator], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no conversation in the data, only texts"):
        writer(Scripted(), [{"text": "a text"}]).key(quiet)
    with pytest.raises(DataError, match=r"ended none of its 1 answers within --answer-tokens 256(.|\n)*--teacher-end"):
        writer(Scripted(unended=0), TALKS[:1]).write(tmp_path / "a", Model, quiet)  # type: ignore[arg-type]


@pytest.mark.parametrize("which", [0, 1])
def test_answer_ends_at_the_templates_token_or_the_tokenizers(
    which: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, end = ENDS["gemma"]
    pair = make_pair(ALL["hymba"], tokenizer)

    def says(_: Any, prompts: Sequence[list[int]], *, ends: Sequence[int], **__: Any) -> list[list[int]]:
        assert list(ends) == tokenizer.convert_tokens_to_ids([end, "<eos>"])
        said = tokenizer.decode(prompts[-1])
        assert said.endswith("user\nAnd?<end_of_turn>\n<start_of_turn>model\n")
        assert "<eos>" not in said
        return [[*tokenizer("So.", add_special_tokens=False)["input_ids"], ends[which]] for _ in prompts]

    monkeypatch.setattr(teacher_generations, "write", says)
    sources = open_sources([write(tmp_path / "data.jsonl", TALKS)])
    found = TeacherGenerator(DistillConfig(), sources, pair, "teacher").write(tmp_path / "a", Model, quiet)  # type: ignore[arg-type]
    assert (found.rows, found.left_out) == (len(TALKS), 0)
    assert json.loads(found.path.read_text().splitlines()[0])["messages"][-1]["content"] == "So."


def test_conversation_cannot_be_answered_twice(tmp_path: Path) -> None:
    sources = open_sources([write(tmp_path / "data.jsonl", TALKS)], [2.0])
    with pytest.raises(ConfigError, match=r"data\.jsonl is to be taken 2 times(.|\n)*--weights of at most 1"):
        TeacherGenerator(DistillConfig(), sources, PAIR, lambda: "teacher")


def test_student_imitates_what_was_written(
    small_model: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_generations, "write", Scripted())
    config = settings(
        small_model, save_teacher(tmp_path / "teacher"), questions, tmp_path / "out", loss=["seq", "auto"], steps=3
    )
    finished = run(config)
    samples = json.loads((finished.path / "samples.json").read_text())
    assert samples[0]["reference"].startswith("answer ")
    assert next(row for row in finished.rows() if row.loss is not None).more.keys() >= {"cross_entropy", "distillation"}
    assert run(config.model_copy(update={"out": tmp_path / "ce", "loss": ["seq"]})).facts()["steps"] == 3


def test_answers_that_another_process_writes_are_left_to_it(
    writer: Callable[..., TeacherGenerator], tmp_path: Path
) -> None:
    folder = tmp_path / "answers"
    folder.mkdir()
    with locked(folder / LOCK), pytest.raises(ConfigError, match=r"teacher's answers, .*answers, is in use by another"):
        writer(Scripted()).write(folder, Model, quiet)
    assert not list(folder.iterdir())
