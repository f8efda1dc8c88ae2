"""What is refused before anything heavy happens: by name, before torch is imported."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import yaml

from tests.cli.conftest import Command

RUN_ALL = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
from hymba_tune.cli.main import main
for line in sys.stdin:
    out, err, code = io.StringIO(), io.StringIO(), None
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main(json.loads(line))
        except SystemExit as end:
            code = end.code
    print(json.dumps([code, err.getvalue(), "torch" in sys.modules]), flush=True)
    if "torch" in sys.modules:
        break
"""
"""Runs one command line after the other, as long as none has imported torch."""

TRAINED = ("sft", "dpo", "kto", "distill --teacher hymba-nano", "distill capture --teacher hymba-nano")
LOADED = ("chat {}", "serve {}", "eval {} --data demo", "quantize {}", "merge {} --out new", "export {}")
"""Verbs that load a model, and the position of its name."""

MISSING = {
    **{f"{verb} --data nofile.jsonl": "Cannot find nofile.jsonl." for verb in (*TRAINED, "plan")},
    **{f"{verb} --data rows.jsonl --eval-data no.csv": "Cannot find no.csv." for verb in TRAINED},
    **{f"{verb} --data rows.jsonl --chat-template no.jinja": "--chat-template no.jinja cannot be" for verb in TRAINED},
    **{f"{verb} --data rows.jsonl --model ./gone": "--model ./gone: no such folder" for verb in (*TRAINED, "plan")},
    **{f"{verb} --data mix.yaml": "Cannot find gone.jsonl." for verb in TRAINED},
    **dict.fromkeys(TRAINED, "--data is missing."),
    "sft --data rows.jsonl --data rows.jsonl --weights 1": "--weights has 1 value, --data 2.",
    "sft --config gone.yaml": "There is no recipe gone.yaml.",
    **{
        f"{verb} --data rows.jsonl --model hymba-nano --nproc 9999": "--nproc 9999: this machine has"
        for verb in TRAINED
    },
    "sft --data rows.jsonl --model hymba-nano --accelerate-config gone.yaml": "--accelerate-config gone.yaml: no such",
    "sft --data rows.jsonl --model hymba-nano --global-batch 9": "--global-batch 9 is not a multiple of --batch-size",
    "plan --config gone.yaml": "There is no recipe gone.yaml.",
    **{f"{verb} --resume gone": "gone is not a run: it has no config.yaml." for verb in TRAINED[:4]},
    "sft --resume begun": "begun has no complete checkpoint to resume from.",
    "distill --data rows.jsonl": "--teacher is missing.",
    "distill capture --data rows.jsonl": "--teacher is missing.",
    "distill --data rows.jsonl --teacher ./gone": "--teacher ./gone: no such folder",
    "distill --data rows.jsonl --teacher http://x/v1": "--teacher-tokenizer is missing",
    "distill --data rows.jsonl --teacher http://x/v1 --teacher-tokenizer ./gone": "--teacher-tokenizer ./gone: no such",
    "distill --data rows.jsonl --teacher hymba-nano --teacher-chat-template no": "--teacher-chat-template no cannot be",
    **{verb.format("./gone"): "--model ./gone: no such folder" for verb in LOADED},
    **{verb.format("orphan"): "--model ./gone: no such folder" for verb in LOADED},
    "chat begun": "begun: this run has no model yet.",
    "chat hymba-nano --against ./gone": "--against ./gone: no such folder",
    "chat hymba-nano --from no.jsonl --to answers.jsonl": "Cannot find no.jsonl.",
    "chat hymba-nano --to answers.jsonl": "--from and --to go together.",
    "serve hymba-nano --chat-template no": "--chat-template no cannot be read",
    "serve hymba-nano --api-key sk-secret": "--api-key: there is no environment variable of this name, or it is empty.",
    "eval hymba-nano": "Nothing to evaluate on.",
    "eval hymba-nano --data no.jsonl": "Cannot find no.jsonl.",
    "eval hymba-nano --data demo --against ./gone": "--against ./gone: no such folder",
    "eval hymba-nano --data demo --chat-template no": "--chat-template no cannot be read",
    "eval hymba-nano --data demo --extract (": "--extract (: missing ), unterminated subpattern",
    "eval hymba-nano --tasks ./gone": "--tasks ./gone: there is no such folder.",
    "quantize hymba-nano --data no.jsonl": "Cannot find no.jsonl.",
    "quantize hymba-nano --chat-template no": "--chat-template no cannot be read",
    "data check no.jsonl": "Cannot find no.jsonl.",
    "data check rows.jsonl --model ./gone": "--model ./gone: no such folder",
    "data preview no.jsonl": "Cannot find no.jsonl.",
    "data preview rows.jsonl --chat-template no": "--chat-template no cannot be read",
    "data convert no.jsonl --to text --out new.jsonl": "Cannot find no.jsonl.",
    "data split no.jsonl --out new": "Cannot find no.jsonl.",
    "report gone": "gone is not a run",
    "report gone gone --out new.html": "gone is not a run",
    "recipes show gone": "There is no recipe gone.",
    "recipes validate gone.yaml": "There is no recipe gone.yaml.",
    "recipes copy gone": "There is no recipe gone.",
}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with some rows, a mix that names none, a run without a checkpoint, and an adapter without its base."""
    folder = tmp_path_factory.mktemp("here")
    (folder / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (folder / "mix.yaml").write_text("- path: gone.jsonl\n")
    for name in ("begun", "orphan"):
        (folder / name).mkdir()
        (folder / name / "run.json").write_text(json.dumps({"verb": "sft", "model": "./gone"}))
        (folder / name / "config.yaml").write_text(yaml.safe_dump({"verb": "sft", "data": ["rows.jsonl"]}))
    (folder / "orphan" / "adapter").mkdir()
    (folder / "orphan" / "adapter" / "adapter_config.json").write_text("{}")
    return folder


def run_all(lines: Iterable[str], folder: Path, **environment: str) -> dict[str, tuple[int, str, bool]]:
    """By command line: the exit code, the message, and whether torch was imported by then."""
    words = "".join(json.dumps(shlex.split(line)) + "\n" for line in lines)
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL],
        input=words,
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return dict(zip(lines, map(json.loads, done.stdout.splitlines()), strict=False))


@pytest.fixture(scope="module")
def answers(here: Path) -> dict[str, tuple[int, str, bool]]:
    return run_all(MISSING, here)


@pytest.mark.parametrize("words", MISSING)
def test_what_is_not_there_is_refused_before_torch_is_imported(
    words: str, answers: dict[str, tuple[int, str, bool]]
) -> None:
    assert words in answers, "a command line before this one has imported torch"
    code, message, torch_imported = answers[words]
    assert code == 2
    assert message.startswith(MISSING[words])
    assert not torch_imported


def test_several_processes_are_refused_in_a_sentence_before_torch_is_imported(here: Path) -> None:
    """By the verbs that work in one process; those that train want to know more of the others."""
    loaded = [verb.format("hymba-nano") for verb in LOADED]
    trained = [f"{verb} --data rows.jsonl --model hymba-nano" for verb in TRAINED]
    answers = run_all([*loaded, *trained], here, WORLD_SIZE="2")
    started = "a launcher such as torchrun has started 2 (WORLD_SIZE)."
    sentences = {line: f"hymba-tune {line.split()[0]} runs in a single process, and {started}" for line in loaded}
    sentences |= dict.fromkeys(trained, "WORLD_SIZE is 2, and RANK and MASTER_ADDR and MASTER_PORT are not set.")
    for line, sentence in sentences.items():
        code, message, torch_imported = answers[line]
        assert (code, message.splitlines()[0], torch_imported) == (2, sentence, False), line
    assert list(here.glob("runs")) == []


@pytest.mark.parametrize(
    "words",
    [
        "distill capture --teacher hymba-nano --data bad.jsonl --model hymba-nano",
        "chat hymba-nano --from bad.jsonl --to out.jsonl",
        "eval hymba-nano --data bad.jsonl --json",
        "quantize hymba-nano --data bad.jsonl",
        "export hymba-nano --adapter-only",
        "merge hymba-nano --out new",
        "serve hymba-nano --host 999.9.9.9",
    ],
)
def test_gpu_that_is_used_of_several_is_said(
    words: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"nothing": 1}\n')
    monkeypatch.setattr("hymba_tune.checkpoint.describe_choice", lambda _: "2 GPUs are visible")
    result = command(*words.split())
    assert result.code == 2
    assert result.err.startswith(" 2 GPUs are visible\n")
    assert "2 GPUs" not in result.out


LONG = "n" * 300
# Since 3.14 pathlib says that there is no such file, and then each verb says so in words of its own.
UNUSABLE = "" if sys.version_info >= (3, 14) else "Cannot use nnn"
NAMES = {
    **{f"sft --data {name}": UNUSABLE for name in (LONG, f"{LONG}/rows.jsonl")},
    f"sft --data rows.jsonl --model {LONG}": UNUSABLE,
    f"sft --data rows.jsonl --config {LONG}": UNUSABLE,
    f"sft --data rows.jsonl --out {LONG}": "--out nnn",
    f"sft --resume {LONG}": "--resume nnn",
    f"sft --data rows.jsonl --chat-template {LONG}": "--chat-template nnn",
    f"chat {LONG}": UNUSABLE,
    f"report {LONG}": UNUSABLE,
    f"recipes show {LONG}": UNUSABLE,
    f"recipes copy demo {LONG}": UNUSABLE,
    f"data check {LONG}": UNUSABLE,
    f"data split rows.jsonl --out {LONG}": "--out nnn",
    f"eval hymba-nano --tasks ./{LONG}": UNUSABLE,
    "sft --data dangling.jsonl": "Cannot find dangling.jsonl: it is a link to gone, which is not there.",
    "sft --data loop.jsonl": "Cannot find loop.jsonl: it is a link to loop.jsonl, which is not there.",
    "chat dangling.jsonl": "--model dangling.jsonl: no such folder",
    "report loop.jsonl": "loop.jsonl is not a run",
    "recipes copy demo dangling.jsonl": "FILE dangling.jsonl exists.",
    "data split rows.jsonl --out dangling.jsonl": "--out dangling.jsonl cannot be written: Not a directory.",
    "chat ~nobody-of-this-name/x": "A name begins with ~ and a user that this machine does not have.",
}


def test_names_that_no_file_can_have_are_one_message_each(here: Path) -> None:
    for name, target in {"dangling": "gone", "loop": "loop.jsonl"}.items():
        (here / f"{name}.jsonl").symlink_to(target)
    answers = run_all(NAMES, here)
    for words, message in NAMES.items():
        code, error, torch_imported = answers[words]
        assert (code, error.startswith(message), torch_imported) == (2, True, False), (words, error)
        assert LONG not in words or "nnn" in error
        assert len(error) < 700
