"""A teacher's targets for a student's data, from settings to a folder; what the preflight finds, and refuses."""

from __future__ import annotations

import json
import shutil
from collections import Counter, namedtuple
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from hymba_tune.config import DistillCaptureConfig
from hymba_tune.distill import capture
from hymba_tune.distill.alignment_report import AlignmentReport, check_aligned
from hymba_tune.distill.capture import pair_of, run_capture
from hymba_tune.distill.preflight import Preflight
from hymba_tune.distill.target_maker import CaptureStats
from hymba_tune.distill.teacher import LocalTeacherSpec, find_teacher
from hymba_tune.errors import ConfigError, TrainingError
from hymba_tune.files import locked
from hymba_tune.train.screen import Screen
from tests.distill.runs import RecordingScreen
from tests.distill.teachers import save_teacher

ANY = {"min_teacher_probability": 0.0, "min_end_probability": 0.0}
"""What a random teacher needs."""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"), padding=3)


@pytest.fixture(autouse=True)
def _few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hymba_tune.distill.preflight.SAMPLE_ROWS", 3)


def settings(teacher: Path | str, questions: Path, **changes: Any) -> DistillCaptureConfig:
    usual: dict[str, Any] = {
        "model": "hymba-nano",
        "data": [str(questions)],
        "device": "cpu",
        "teacher_dtype": "float32",
    }
    return DistillCaptureConfig(**{"teacher": str(teacher), "top_k": 4} | usual | ANY | changes)


def test_captured_targets_need_no_teacher_again(
    teacher: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen, config = RecordingScreen(), settings(teacher, questions, teacher_cache=tmp_path / "targets")
    first = run_capture(config, screen)
    assert len(first) == 24
    assert screen.progress[-1] == ("computing the teacher's targets", 24, 24)
    assert screen.lines["aligned"] == "24 of 24 rows, 100.0% of the bytes"
    assert screen.lines["sanity"].startswith("the teacher gives its own next token p = 0.0")
    assert screen.notes == [
        "the teacher is smaller than the student (26.2k parameters to 3.6M): expect little, unless it knows this data "
        "better"
    ]
    monkeypatch.setattr(LocalTeacherSpec, "load", Mock(side_effect=AssertionError("the teacher is loaded")))
    again = run_capture(config, screen)
    assert torch.equal(again[7].top.student_tokens, first[7].top.student_tokens)
    assert again[7].top.student_tokens.shape[1] == 4
    assert "it is not loaded" in screen.notes[-1]


def test_default_folder_depends_on_everything_that_determines_targets(teacher: Path, questions: Path) -> None:
    one = run_capture(settings(teacher, questions), Screen())
    assert run_capture(settings(teacher, questions), Screen()).folder == one.folder
    assert run_capture(settings(teacher, questions, temperature=2.0), Screen()).folder != one.folder


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"top_k": 5}, "top_k"),
        ({"temperature": 2.0}, "temperature"),
        ({"max_length": 30}, "data"),
        ({"teacher_system": "Be brief."}, "teacher's system message and another data"),
        ({"teacher_chat_template": "alpaca"}, "teacher's chat template and another data"),
        ({"chat_template": "alpaca"}, "student's chat template and another data"),
        ({"teacher_end": "<|begin_of_text|>"}, "pair of tokenizers"),
    ],
)
def test_folder_of_other_settings_is_refused(
    changes: dict[str, Any], what: str, teacher: Path, questions: Path, captured: Path
) -> None:
    with pytest.raises(ConfigError, match=f"--teacher-cache .* was made with another {what}"):
        run_capture(settings(teacher, questions, teacher_cache=captured, **changes), Screen())


@pytest.fixture(scope="module")
def captured(teacher: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("captured")
    return run_capture(settings(teacher, questions, teacher_cache=folder), Screen()).folder


def test_folder_of_another_teacher_or_data_is_refused(
    questions: Path, captured: Path, teacher: Path, tmp_path: Path
) -> None:
    other = save_teacher(tmp_path / "other", "qwen2")
    with pytest.raises(ConfigError, match=r"made with another teacher\.\n"):
        run_capture(settings(other, questions, teacher_cache=captured), Screen())
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(questions.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ConfigError, match=r"made with another data\.\n"):
        run_capture(settings(teacher, fewer, teacher_cache=captured), Screen())


def test_targets_are_replaced_on_demand_but_nothing_else(
    teacher: Path, questions: Path, captured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(captured, tmp_path / "targets")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    config = settings(teacher, questions, teacher_cache=folder, top_k=5, overwrite=True)
    with monkeypatch.context() as patch:
        patch.setattr(capture, "fill", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_capture(config, Screen())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with monkeypatch.context() as patch:
        patch.setattr(capture, "_inputs", lambda *_: [folder])
        with pytest.raises(ConfigError, match=r"--overwrite --teacher-cache .* would remove .*an input"):
            run_capture(config, Screen())
    assert run_capture(config, Screen())[0].top.student_tokens.shape[1] == 5
    assert {path.name for path in folder.iterdir()} == before.keys()
    (folder / "notes.txt").touch()
    with pytest.raises(ConfigError, match=r"this is not a folder of teacher's targets of hymba-tune: it holds notes"):
        run_capture(config.model_copy(update={"top_k": 4}), Screen())


def test_folder_that_another_process_replaces_is_refused(teacher: Path, questions: Path, tmp_path: Path) -> None:
    (tmp_path / "targets").mkdir()
    with (
        locked(tmp_path / "targets/.lock"),  # as it is held with --overwrite
        pytest.raises(ConfigError, match=r"--teacher-cache .*targets is in use by another process"),
    ):
        run_capture(settings(teacher, questions, teacher_cache=tmp_path / "targets"), Screen())
    assert not list((tmp_path / "targets").iterdir())


def test_folder_that_another_process_fills_is_filled_with_it_but_not_replaced(
    teacher: Path, questions: Path, tmp_path: Path
) -> None:
    config = settings(teacher, questions, teacher_cache=tmp_path / "targets")
    (tmp_path / "targets").mkdir()
    with locked(tmp_path / "targets/.lock", shared=True):
        assert len(run_capture(config, Screen())) == 24
        with pytest.raises(ConfigError, match=r"--teacher-cache .*targets is in use by another process"):
            run_capture(config.model_copy(update={"top_k": 5, "overwrite": True}), Screen())


def test_small_disk_is_an_error_before_the_pass(
    teacher: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(capture.shutil, "disk_usage", lambda _: usage(10))
    monkeypatch.setattr(capture, "fill", Mock(side_effect=AssertionError("the pass has begun")))
    with pytest.raises(ConfigError, match=r"its disk has 0\.0 MB free(.|\n)*for the teacher's targets(.|\n)*--top-k"):
        run_capture(settings(teacher, questions, teacher_cache=tmp_path / "targets"), Screen())


def test_unlikely_teacher_is_refused(teacher: Path, questions: Path, tmp_path: Path) -> None:
    config = settings(teacher, questions, min_teacher_probability=0.1, teacher_cache=tmp_path / "targets")
    with pytest.raises(TrainingError, match=r"a probability of 0\.\d+ on average(.|\n)*another chat template"):
        run_capture(config, Screen())
    assert not (tmp_path / "targets").exists()


def test_too_few_aligned_rows_are_refused() -> None:
    lost = AlignmentReport(rows=10, dropped=Counter({"bytes differ": 2, "template": 1}), bytes=900, lost=100)
    check_aligned(lost, 0.7)
    with pytest.raises(TrainingError, match=r"Only 70\.0% (.|\n)*10 rows 2 are dropped \(bytes differ\)(.|\n)*trims"):
        check_aligned(lost, 0.71)
    long = AlignmentReport(rows=10, dropped=Counter({"template": 1}), bytes=100, lost=100)
    with pytest.raises(TrainingError, match=r"Only 50\.0% (.|\n)*refuses such conversations"):
        check_aligned(long, 0.9)
    check_aligned(AlignmentReport(), 0.0)


def test_lines_of_the_preflight() -> None:
    aligned = AlignmentReport(
        rows=9412,
        dropped=Counter({"bytes differ": 3}),
        bytes=99_900,
        lost=100,
        positions=Counter(shared=801, inside=176, crossing=23),
        matched=992,
    )
    kept = CaptureStats(places=100, known=98, shared=80, mass=79.6, tokens=50, own=23.0, ends=4, end=3.7)
    assert Preflight(aligned, 0.572, kept, 1_600_000, 118.0, 720.0, "<end>").lines() == {
        "aligned": "9,409 of 9,412 rows, 99.9% of the bytes (3 dropped: bytes differ)",
        "matched": "57.2% of the student's vocabulary, 99.2% of what it writes",
        "tokens": "80.1% at shared boundaries · 17.6% inside a teacher token · 2.3% across two",
        "kept": "99.5% of the teacher's probability maps to student tokens · 98.0% of the tokens have a target",
        "sanity": "the teacher gives its own next token p = 0.46 on average",
        "p(end)": "after an answer, the teacher gives its end token <end> p = 0.925 on average",
        "targets": "1.6M tokens × 118 B = 0.18 GB · about 12 min",
    }


def test_row_that_the_teacher_cannot_hold_is_dropped(teacher: Path, questions: Path, tmp_path: Path) -> None:
    long = tmp_path / "long.jsonl"
    row = {"prompt": "What? " * 200, "completion": "That."}
    long.write_text(questions.read_text() + json.dumps(row) + "\n")
    found = run_capture(settings(teacher, long), Screen())
    assert len(found) == 24


def test_dates_of_a_template_are_pinned(teacher: Path, questions: Path, tmp_path: Path) -> None:
    template = tmp_path / "dated.jinja"
    template.write_text(
        "{{ bos_token }}{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "Today: {{ date_string }}\n{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    config = settings(teacher, questions, teacher_chat_template=str(template))
    found = find_teacher(str(teacher))

    def shown(config: DistillCaptureConfig) -> str:
        text = pair_of(config, find_teacher("hymba-nano").tokenizer, found).teacher.tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hi"}], tokenize=False
        )
        return str(text)

    assert "Today: 26 Jul 2024\n" in shown(config)
    assert "Today: 1 May 2025\n" in shown(config.model_copy(update={"teacher_template": ["date_string=1 May 2025"]}))


@pytest.mark.parametrize(("missing", "message"), [("teacher", "--teacher is missing"), ("data", "--data is missing")])
def test_what_is_missing(missing: str, message: str, teacher: Path, questions: Path) -> None:
    config = settings(teacher, questions).model_copy(update={missing: [] if missing == "data" else ""})
    with pytest.raises(ConfigError, match=message):
        run_capture(config, Screen())
