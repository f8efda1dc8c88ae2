"""No command overwrites what it reads, nor anything that exists without --overwrite."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import Command
from tests.report.inputs import write_run

ANSWER = ["--answers", "exact", "--max-new-tokens", "2", "--max-rows", "1", "--dtype", "float32", "--max-length", "64"]
COMMANDS = {
    "eval --out": ["eval", "small", "--data", "data.jsonl", *ANSWER, "--out", "OUT"],
    "eval --save-answers": ["eval", "small", "--data", "data.jsonl", *ANSWER, "--save-answers", "OUT"],
    "data check --html": ["data", "check", "data.jsonl", "--model", "hymba-nano", "--html", "OUT"],
    "data check --html of a mix": ["data", "check", "mix.yaml", "--model", "hymba-nano", "--html", "OUT"],
    "data convert --out": ["data", "convert", "data.jsonl", "--to", "messages", "--out", "OUT"],
    "data convert --out of a mix": ["data", "convert", "mix.yaml", "--to", "messages", "--out", "OUT"],
    "data split --out": ["data", "split", "train.jsonl", "--eval", "0.5", "--out", "."],
    "chat --to": [
        "chat",
        "small",
        "--from",
        "data.jsonl",
        "--dtype",
        "float32",
        "--max-new-tokens",
        "2",
        "--to",
        "OUT",
    ],
    "recipes copy": ["recipes", "copy", "data.yaml", "OUT"],
    "report --out": ["report", "one", "two", "--out", "OUT"],
}
OUTPUTS = {"data split --out": "train.jsonl", "recipes copy": "data.yaml", "report --out": "two/metrics.jsonl"}
"""The input and the output of a command, where they are not data.jsonl."""


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small_model: Path, questions: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("small").symlink_to(small_model)
    lines = questions.read_text().splitlines(keepends=True)[:4]
    for name in ("data.jsonl", "train.jsonl"):
        Path(name).write_text("".join(lines))
    Path("mix.yaml").write_text("- {path: data.jsonl}\n")
    Path("data.yaml").write_text("steps: 1\n")
    for name in ("one", "two"):
        write_run(Path(name), [3.0], [4.0])


def contents() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", COMMANDS)
def test_input_is_never_overwritten(name: str, command: Command) -> None:
    before = contents()
    out = OUTPUTS.get(name, "data.jsonl")
    words = [out if word == "OUT" else word for word in COMMANDS[name]]
    refused = command(*words, "--overwrite")
    assert refused.code == 2
    assert "is an input of this command" in refused.err or "is a part of a run" in refused.err
    assert contents() == before
    if name == "data split --out":
        return
    Path("other.jsonl").symlink_to(out)
    words = ["other.jsonl" if word == "OUT" else word for word in COMMANDS[name]]
    assert command(*words, "--overwrite").code == 2
    Path("other.jsonl").unlink()
    assert contents() == before


@pytest.mark.parametrize("name", [name for name in COMMANDS if "mix" not in name])
def test_what_exists_is_overwritten_only_on_demand(name: str, command: Command) -> None:
    out = Path("eval.jsonl" if name == "data split --out" else "out.jsonl")
    out.write_text("mine")
    words = [str(out) if word == "OUT" else word for word in COMMANDS[name]]
    if name == "data split --out":
        Path("train.jsonl").rename("data.jsonl")
        words[2] = "data.jsonl"
    before = contents()
    refused = command(*words)
    assert refused.code == 2
    assert f"{out} exists.\n" in refused.err
    assert "--overwrite" in refused.err
    assert contents() == before
    done = command(*words, "--overwrite")
    assert done.code == 0, done.err
    assert out.read_text() != "mine"
    assert not list(Path().rglob("*.partial"))


def test_two_outputs_of_one_name_are_refused(command: Command) -> None:
    words = ["eval", "small", "--data", "data.jsonl", *ANSWER, "--out", "out.json", "--save-answers", "./out.json"]
    refused = command(*words)
    assert refused.code == 2
    assert "--out and --save-answers are both out.json." in refused.err


def test_evaluations_that_end_together_are_all_kept(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from hymba_tune.config import EvalConfig
    from hymba_tune.evaluate import add_to_run
    from hymba_tune.evaluate.evaluation import Evaluation, ModelResult

    run = shutil.copytree("one", tmp_path / "run")
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: add_to_run(Evaluation(EvalConfig(), [ModelResult("one")]), run), range(16)))
    assert len(json.loads((run / "evaluations.json").read_text())) == 16
    assert not (run / ".evaluations.lock").exists()
