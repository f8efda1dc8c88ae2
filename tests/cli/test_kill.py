"""A command that is killed at any moment leaves nothing half-written under its name, and can be run again."""

from __future__ import annotations

import os
import random
import re
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.cli.conftest import Command
from tests.cli.killed import run_killed
from tests.distill.teachers import save_teacher

COMMANDS = {
    "merge": "merge run --out out/merged --dtype float32",
    "merge over": "merge run --out merged --dtype float32 --overwrite",
    "export": "export run --out out/exported --license mit",
    "quantize": "quantize wide --scheme int8 --max-tokens 64 --data rows.jsonl --out out/quantized",
    "convert": "data convert bad.jsonl --to messages --on-bad-row skip --out rows-of-messages.jsonl",
    "split": "data split rows.jsonl --eval 0.3 --out parts",
    "capture": "distill capture --model small --teacher teacher --data rows.jsonl --teacher-cache targets "
    "--min-teacher-probability 0 --min-end-probability 0",
    "eval": "eval run --data rows.jsonl --max-rows 3 --answers exact --max-new-tokens 2 --out out.json --save-answers "
    "answers.jsonl",
    "report": "report run run --out compare.html",
    "report of one": "report run",
}
ASIDE = re.compile(r"\.[0-9a-f]{8}\.(partial|old)(/|$)")
CHANGING = re.compile(rb'"(when|seconds)": [^\n]*')
"""What differs between two evaluations, in their files and in the page of the run."""
AT_ALL = ("convert", "split")
"""Commands that take so little time that they are killed at every change."""


@pytest.fixture(scope="module")
def inputs(
    finished_run: Path, small_model: Path, wide_model: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with all that the commands read."""
    folder = tmp_path_factory.mktemp("inputs")
    for name, source in (("run", finished_run), ("small", small_model), ("wide", wide_model)):
        shutil.copytree(source, folder / name)
    (folder / "rows.jsonl").write_bytes(questions.read_bytes())
    (folder / "bad.jsonl").write_text(questions.read_text() + '{"prompt": "no answer"}\n')
    save_teacher(folder / "teacher")
    shutil.copytree(folder / "small", folder / "merged")
    return folder


@pytest.fixture
def work(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a copy of them; files that no command writes are links."""
    folder = Path(shutil.copytree(inputs, tmp_path / "work", copy_function=_link))
    monkeypatch.chdir(folder)
    return folder


def _link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)  # every command that replaces a file gives a new one its name


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): CHANGING.sub(b"", path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith("lock")  # which the next process takes over
    }


def renewed(work: Path, fresh: Path) -> None:
    """Set up the current folder anew."""
    os.chdir(fresh)
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(fresh, work, copy_function=_link)
    os.chdir(work)


def check_killed(name: str, work: Path, command: Command, *, count: int) -> None:
    """Kill a command at some of its changes, and run it again each time."""
    words, fresh = COMMANDS[name].split(), work.parent / "fresh"
    shutil.copytree(work, fresh, copy_function=_link)
    before = contents(work)
    changes = run_killed(words, work, at=None)
    expected = contents(work)
    every = range(1, changes + 1)
    for at in every if name in AT_ALL else sorted(random.Random(name).sample(every, min(count, changes))):
        renewed(work, fresh)
        run_killed(words, work, at=at)
        for path, content in contents(work).items():
            if not ASIDE.search(path) and not path.endswith("evaluations.json"):
                is_page = path == "run/report.html" and content.endswith(b"</html>")  # with the time of an evaluation
                assert is_page or content in (before.get(path), expected.get(path)), (at, path)
        with patch("hymba_tune.distill.cache.SHARD", 8):
            again = command(*words)
        assert again.code == 0 or "exists" in again.err, (at, again.err)
        after = contents(work)
        assert after.keys() == expected.keys(), at
        # The run lists a second evaluation as well.
        differing = [path for path in after if after[path] != expected[path] and not path.startswith("run/")]
        assert not differing, at


@pytest.mark.parametrize("name", COMMANDS)
def test_killed_command_can_be_run_again(name: str, work: Path, command: Command) -> None:
    check_killed(name, work, command, count=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_at_many_changes(name: str, work: Path, command: Command) -> None:
    check_killed(name, work, command, count=12)
