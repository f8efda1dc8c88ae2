"""Answers that the teacher generates: once, whatever interrupts it."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from hymba_tune.config import DistillConfig
from hymba_tune.data import open_sources
from hymba_tune.distill import teacher, teacher_generations
from hymba_tune.distill.pair import make_pair
from hymba_tune.distill.spelling import END
from hymba_tune.distill.teacher_generations import ANSWERS, PART, TeacherGenerations, TeacherGenerator
from hymba_tune.errors import ConfigError, DataError
from tests.distill.ending_teachers import ENDS
from tests.distill.inputs import write
from tests.distill.runs import run, settings
from tests.distill.teachers import save_teacher
from tests.distill.tokenizers import ALL

PAIR = make_pair(ALL["hymba"], ALL["llama3"])
END_TOKEN = PAIR.teacher.spelling.tokens.index(END)
TALKS: list[dict[str, Any]] = [{"prompt": f"Number {number}?", "completion": "one"} for number in range(5)]
TURNS = ["Hi", "Hello", "And?", "Bye"]
TALKS += [
    {"messages": [{"role": role, "content": turn} for role, turn in zip(["user", "assistant"] * 2, TURNS, strict=True)]}
]


class Scripted:
    """A teacher that answers with the number of tokens of each prompt; it records the prompts, and may be killed."""

    def __init__(self, die_at: int = -1, unended: int = -1, unread: int = -1) -> None:
        self.prompts: list[list[int]] = []
        self._die_at, self._unended, self._unread = die_at, unended, unread

    def generate(
        self, prompts: Sequence[list[int]], *, decode: Callable[[list[int]], str | None], **options: Any
    ) -> list[str | None]:
        return list(map(decode, self.write(None, prompts, **options)))

    def write(self, _: Any, prompts: Sequence[list[int]], *, ends: Sequence[int], **__: Any) -> list[list[int]]:
        if len(self.prompts) == self._die_at:
            raise KeyboardInterrupt
        half_a_character = PAIR.teacher.spelling.tokens.index(b"\xf0")
        answers = []
        for prompt in prompts:
            answer = ALL["llama3"](f"answer {len(prompt)}", add_special_tokens=False)["input_ids"]
            if len(self.prompts) == self._unread:
                answer = [half_a_character]
            answers.append(answer if len(self.prompts) == self._unended else [*answer, ends[0]])
            self.prompts.append(prompt)
        return answers


@pytest.fixture
def generator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., TeacherGenerator]:
    monkeypatch.setattr(teacher_generations, "BATCH", 2)
    monkeypatch.setattr(teacher_generations, "SHARD", 1)

    def make(rows: list[dict[str, Any]] | None = None, **changes: Any) -> TeacherGenerator:
        sources = open_sources([write(tmp_path / "data.jsonl", rows or TALKS)])
        return TeacherGenerator(DistillConfig(**changes), sources, PAIR, lambda: "teacher")

    return make


def quiet(_: int) -> None: ...


def generated(generator: TeacherGenerator, folder: Path, load: Callable[[], Any]) -> TeacherGenerations:
    return generator.write(folder, generator.questions(quiet), load, quiet)


def nobody() -> Any:
    raise AssertionError("the teacher is loaded, although no answer is missing")


def test_last_answers_are_the_teachers_and_the_only_ones_with_a_loss(
    generator: Callable[..., TeacherGenerator], tmp_path: Path
) -> None:
    script = Scripted(unended=1, unread=3)
    found = generated(generator([*TALKS, {"text": "no prompt"}]), tmp_path / "a", lambda: script)
    assert (found.rows, found.left_out, found.texts) == (len(TALKS) - 2, 2, 1)
    rows = [json.loads(line) for line in found.path.read_text().splitlines()]
    assert [row["messages"][0]["content"] for row in rows] == ["Number 0?", "Number 2?", "Number 4?", "Hi"]
    assert rows[0]["messages"][-1] == {"role": "assistant", "content": f"answer {len(script.prompts[0])}"}
    assert rows[-1]["messages"][1] == {"role": "assistant", "content": "Hello", "weight": 0}
    assert rows[-1]["messages"][-1] == {"role": "assistant", "content": f"answer {len(script.prompts[-1])}"}
    prompt = PAIR.teacher.tokenizer.decode(script.prompts[-1])
    assert "Hello" in prompt
    assert "Bye" not in prompt


def test_questions_need_no_answer(generator: Callable[..., TeacherGenerator], tmp_path: Path) -> None:
    talk = [{"role": role, "content": turn} for role, turn in zip(["user", "assistant", "user"], TURNS, strict=False)]
    rows: list[dict[str, Any]] = [{"prompt": "Number 0?"}, {"messages": talk[:1]}, {"messages": talk}]
    script = Scripted()
    found = generated(generator([*rows, TALKS[1]]), tmp_path / "a", lambda: script)
    assert (found.rows, found.left_out) == (4, 0)
    said = [[m["content"] for m in json.loads(line)["messages"]] for line in found.path.read_text().splitlines()]
    assert [texts[:-1] for texts in said] == [["Number 0?"], ["Hi"], TURNS[:3], ["Number 1?"]]
    assert [texts[-1] for texts in said] == [f"answer {len(prompt)}" for prompt in script.prompts]
    with pytest.raises(DataError, match="--map prompt=question"):
        generator([{"question": "Why?", "answer": "So."}]).questions(quiet)


def test_interrupted_generation_continues(generator: Callable[..., TeacherGenerator], tmp_path: Path) -> None:
    whole = generated(generator(), tmp_path / "whole", Scripted)
    with pytest.raises(KeyboardInterrupt):
        generated(generator(), tmp_path / "a", lambda: Scripted(die_at=4))
    assert not (tmp_path / "a" / ANSWERS).exists()
    (tmp_path / "a" / "00002.jsonl.0123abcd.partial").write_text('{"messages": [torn')
    rest = Scripted()
    found = generated(generator(), tmp_path / "a", lambda: rest)
    assert len(rest.prompts) == 2
    assert found.path.read_text() == whole.path.read_text()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [ANSWERS, PART]
    again = generated(generator(), tmp_path / "a", nobody)
    assert (again.rows, again.left_out) == (whole.rows, whole.left_out)


def test_key_covers_everything_that_determines_the_answers(generator: Callable[..., TeacherGenerator]) -> None:
    keys = [
        generator(rows, **changes).questions(quiet).key
        for rows, changes in (
            (None, {}),
            (TALKS[:-1], {}),
            (None, {"answer_tokens": 9}),
            (None, {"answer_temperature": 0.5}),
            (None, {"seed": 1}),
        )
    ]
    assert len(set(keys)) == len(keys)
    assert generator().questions(quiet).key == keys[0]


def test_no_answers_to_train_on_raises(generator: Callable[..., TeacherGenerator], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the data has no conversations, only texts"):
        generator([{"text": "a text"}]).questions(quiet)
    with pytest.raises(DataError, match=r"ended none of its 1 answers within --answer-tokens 256(.|\n)*--teacher-end"):
        generated(generator(TALKS[:1]), tmp_path / "a", lambda: Scripted(unended=0))


@pytest.mark.parametrize("which", [0, 1])
def test_answer_ends_at_the_templates_token_or_the_tokenizers(which: int, tmp_path: Path) -> None:
    tokenizer, end = ENDS["gemma"]
    pair = make_pair(ALL["hymba"], tokenizer)

    class Answering(Scripted):
        def write(self, _: Any, prompts: Sequence[list[int]], *, ends: Sequence[int], **__: Any) -> list[list[int]]:
            assert list(ends) == tokenizer.convert_tokens_to_ids([end, "<eos>"])
            prompt = tokenizer.decode(prompts[-1])
            assert prompt.endswith("user\nAnd?<end_of_turn>\n<start_of_turn>model\n")
            assert "<eos>" not in prompt
            return [[*tokenizer("So.", add_special_tokens=False)["input_ids"], ends[which]] for _ in prompts]

    sources = open_sources([write(tmp_path / "data.jsonl", TALKS)])
    generator = TeacherGenerator(DistillConfig(), sources, pair, lambda: "teacher")
    found = generated(generator, tmp_path / "a", Answering)
    assert (found.rows, found.left_out) == (len(TALKS), 0)
    assert json.loads(found.path.read_text().splitlines()[0])["messages"][-1]["content"] == "So."


def test_source_with_weight_above_one_raises(tmp_path: Path) -> None:
    sources = open_sources([write(tmp_path / "data.jsonl", TALKS)], [2.0])
    with pytest.raises(ConfigError, match=r"data\.jsonl has weight 2(.|\n)*--weights of at most 1"):
        TeacherGenerator(DistillConfig(), sources, PAIR, lambda: "teacher")


def test_student_trains_on_generated_answers(
    small_model: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher, "write", Scripted().write)
    config = settings(
        small_model, save_teacher(tmp_path / "teacher"), questions, tmp_path / "out", loss=["seq", "auto"], steps=3
    )
    finished = run(config)
    samples = json.loads((finished.path / "samples.json").read_text())
    assert samples[0]["reference"].startswith("answer ")
    assert next(row for row in finished.rows() if row.loss is not None).more.keys() >= {"cross_entropy", "distillation"}
    assert run(config.model_copy(update={"out": tmp_path / "ce", "loss": ["seq"]})).facts()["steps"] == 3


def test_two_processes_answer_each_question_once(generator: Callable[..., TeacherGenerator], tmp_path: Path) -> None:
    """The first one is slow with its first batch, so that the second one answers all the others, and waits for it."""
    whole = generated(generator(), tmp_path / "whole", Scripted)
    begun, waited = threading.Event(), threading.Event()
    seen: list[int] = []

    class Slow(Scripted):
        def write(self, *args: Any, **options: Any) -> list[list[int]]:
            begun.set()
            assert waited.wait(60)
            return super().write(*args, **options)

    def progress(done: int) -> None:
        seen.append(done)
        if done == 4:
            waited.set()

    slow, quick = Slow(), Scripted()
    first = threading.Thread(target=generated, args=(generator(), tmp_path / "a", lambda: slow))
    first.start()
    assert begun.wait(60)
    second = generator()
    found = second.write(tmp_path / "a", second.questions(quiet), lambda: quick, progress)
    first.join(60)
    assert (len(slow.prompts), len(quick.prompts)) == (2, 4)
    assert found.path.read_text() == whole.path.read_text()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [ANSWERS, PART]
    assert seen == sorted(seen)


def test_conversation_that_the_teacher_does_not_read_whole_is_named_before_it_answers(tmp_path: Path) -> None:
    """Not with a prompt that lacks a message, and not with a token that it has no output for."""
    silent = copy.deepcopy(ALL["llama3"])
    silent.chat_template = silent.chat_template.replace("in messages %}", "in messages if message.role != 'system' %}")
    few = make_pair(ALL["hymba"], ALL["llama3"], teacher_outputs=10)
    refusing = make_pair(ALL["hymba"], ALL["mistral"])
    tool = {"messages": [{"role": role, "content": role} for role in ("user", "tool", "assistant")]}
    sources = open_sources([write(tmp_path / "data.jsonl", [TALKS[0] | {"system": "Be brief."}, tool])])
    for pair, message in (
        (
            make_pair(ALL["hymba"], silent),
            r"line 1: the teacher's chat template leaves out message 1 \(system\): 'Be brief\.'",
        ),
        (few, r"line 1: the teacher's tokenizer writes .*, and the teacher has 10 outputs(.|\n)*added tokens"),
        (refusing, r"line 2: for the teacher, the chat template refuses(.|\n)*--teacher-system-as user"),
    ):
        with pytest.raises(DataError, match=message):
            TeacherGenerator(DistillConfig(), sources, pair, lambda: "teacher").questions(quiet)
    skipping = TeacherGenerator(DistillConfig(on_bad_row="skip"), sources, refusing, lambda: "teacher")
    assert [talk.messages[0].content for talk, _ in skipping.talks()] == ["Be brief."]
