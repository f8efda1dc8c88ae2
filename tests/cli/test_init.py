from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from hymba_tune.cli import init
from hymba_tune.cli.settings import combine_for
from hymba_tune.config import SFTConfig, TrainingConfig
from hymba_tune.errors import HubError
from hymba_tune.files import read_yaml
from hymba_tune.plan import DeviceEstimate
from hymba_tune.recipes.choosing import RECIPES
from hymba_tune.recipes.schema import SCHEMA_FILE
from tests.cli.conftest import Command
from tests.tiny import RELEASED

QUESTION = {"question": "How many legs have two cats?", "answer": "Eight.\n#### 8"}
ROWS: dict[str, tuple[dict[str, object], list[str]]] = {
    "prompts": ({"prompt": "a", "completion": "b"}, ["sft", "distill", "grpo"]),
    "messages": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        ["sft", "distill", "grpo"],
    ),
    "other columns": (QUESTION, ["sft", "distill", "grpo"]),
    "pairs": ({"prompt": "a", "chosen": "b", "rejected": "c"}, ["dpo", "orpo", "kto", "reward"]),
    "labels": ({"prompt": "a", "completion": "b", "label": True}, ["kto"]),
    "texts": ({"text": "a"}, ["sft"]),
}


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """No run is planned: each fits into the memory."""
    estimate = DeviceEstimate("a card", 8 * 2**30, 2**30, None, 1.0, "")
    monkeypatch.setattr(init, "_estimate", lambda *_: estimate)


def save(row: dict[str, object], path: str = "my.jsonl", rows: int = 3) -> str:
    Path(path).write_text(f"{json.dumps(row)}\n" * rows)
    return path


def read(path: str = "recipe.yaml") -> TrainingConfig:
    """The settings of a recipe, as its verb reads them."""
    return combine_for(path, SFTConfig(), None)


@pytest.mark.usefixtures("fits")
@pytest.mark.parametrize("kind", ROWS)
def test_recipes_are_for_what_the_data_allows(kind: str, command: Command) -> None:
    row, verbs = ROWS[kind]
    data = save(row)
    done = command("init", "--data", data, "--card", "8gb")
    assert done.code == 0, done.err
    assert f"hymba-tune {verbs[0]} --config recipe.yaml\n" in done.out
    for verb in verbs:
        assert command("init", "--data", data, "--card", "8gb", "--verb", verb, "--out", f"{verb}.yaml").code == 0
        assert read(f"{verb}.yaml").verb.name == verb
    for verb in RECIPES.keys() - verbs:
        refused = command("init", "--data", data, "--card", "8gb", "--verb", verb, "--out", "no.yaml")
        assert (refused.code, f"--verb {verb}: the data holds " in refused.err) == (2, True)
    assert not Path("no.yaml").exists()


@pytest.mark.usefixtures("fits")
def test_columns_lengths_and_rewards_come_from_the_data(command: Command) -> None:
    data = save(QUESTION | {"question": "x" * 2800})
    assert command("init", "--data", data, "--card", "8gb", "--verb", "grpo").code == 0
    settings = read()
    assert (settings.map, settings.max_length) == (["prompt=question", "completion=answer"], 2048)
    assert read_yaml(Path("recipe.yaml"))["reward"] == ["gsm8k"]


@pytest.mark.usefixtures("fits")
def test_learning_rates_are_the_defaults_for_the_size_of_the_model(command: Command) -> None:
    assert command("init", "--data", "demo", "--card", "8gb").code == 0
    assert command("init", "--data", "demo", "--card", "cpu", "--out", "nano.yaml").code == 0
    assert command("init", "--data", "demo", "--card", "8 GB", "--out", "same.yaml").code == 0
    assert read("same.yaml") == read()
    assert (read().lr, read("nano.yaml").lr, read("nano.yaml").epochs) == (None, None, None)


def test_packaged_recipes_have_the_default_learning_rate() -> None:
    for verb, name in RECIPES.items():
        settings = read(name)
        assert settings.lr == TrainingConfig.of(verb).learning_rates[settings.method]


@pytest.mark.usefixtures("fits")
def test_bad_rows_are_skipped_and_named(command: Command) -> None:
    save({"prompt": "a", "completion": "b"})
    Path("my.jsonl").write_text(Path("my.jsonl").read_text() + "no\n")
    done = command("init", "--data", "my.jsonl", "--card", "8gb")
    assert "1 rows cannot be used and are skipped: my.jsonl, line 4: " in done.out
    assert read().on_bad_row == "skip"


@pytest.mark.usefixtures("fits")
def test_every_setting_of_the_recipe_has_a_comment(command: Command) -> None:
    Path(SCHEMA_FILE).touch()
    assert command("init", "--data", save(QUESTION, "my\a{}: x #.jsonl"), "--card", "8gb").code == 0
    lines = Path("recipe.yaml").read_text().splitlines()
    assert lines[0] == f"# yaml-language-server: $schema={SCHEMA_FILE}"
    assert max(map(len, lines[3:])) <= 120
    for before, line in pairwise(lines):
        assert line.startswith(("#", "verb:")) or not line or before.startswith("# ")
    assert read().data == ["my\a{}: x #.jsonl"]


@pytest.mark.end_to_end
def test_a_run_that_does_not_fit_is_changed_until_it_does(command: Command) -> None:
    """By the estimates of `plan`, for the released model."""
    RELEASED.save_pretrained("model")
    data = save({"prompt": "a" * 20_000, "completion": "b"})
    done = command("init", "--data", data, "--card", "8gb", "--model", "./model")
    assert done.code == 0, done.err
    assert "changed to fit: --" in done.out
    settings = read()
    assert settings.batch_size * settings.grad_accum == 16
    assert settings.batch_size < 8
    assert " of 8.0 GB, at most (estimated for rows of " in Path("recipe.yaml").read_text()


def estimate_nothing(change: str | None) -> Callable[..., DeviceEstimate]:
    return lambda *_: DeviceEstimate("a card", 2**30, 2**31, None, 1.0, change)


def test_what_never_fits_is_refused(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init, "_estimate", estimate_nothing(None))
    failed = command("init", "--data", save(QUESTION), "--card", "8gb")
    assert (failed.code, failed.err.splitlines()[0]) == (
        2,
        "nvidia/Hymba-1.5B-Base does not fit into 1.0 GB, with no settings.",
    )
    assert not Path("recipe.yaml").exists()


def test_without_the_hub_the_memory_is_not_checked(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object) -> Any:
        raise HubError("Cannot reach the Hub for it.")

    monkeypatch.setattr(init, "_estimate", unreachable)
    done = command("init", "--data", save(QUESTION), "--card", "8gb")
    assert (done.code, done.err) == (0, " memory not checked: Cannot reach the Hub for it.\n")
    assert read().quantize == "nf4"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--data and --card would answer them.\n  to fix     hymba-tune init --data my.jsonl --card 8gb --out"),
        (
            ["--data", "a b.jsonl"],
            "; --card would answer them.\n  to fix     hymba-tune init --data 'a b.jsonl' --card",
        ),
        (["--data", "gone.jsonl", "--card", "8gb"], "Cannot find gone.jsonl."),
        (["--data", "bad.jsonl", "--card", "8gb"], "No row of bad.jsonl can be used. bad.jsonl, line 1: "),
        (["--data", "demo", "--card", "9gb"], "Invalid value for --card: 9gb is none of here, 8gb, "),
        (["--data", "demo", "--card", "here"], "--card here: this machine has no GPU."),
        (["--data", "demo", "--card", "cpu", "--model", "gone"], "--model gone: no such folder"),
        (
            ["--data", "demo", "--card", "cpu", "--out", "bad.jsonl"],
            "--out bad.jsonl exists.\n  to fix     another name",
        ),
        (["--data", "demo", "--card", "cpu", "--out", "no/r.yaml"], "there is no folder no"),
    ],
)
def test_what_cannot_be_used_gets_one_message(words: list[str], message: str, command: Command) -> None:
    Path("bad.jsonl").write_text("no\n")
    failed = command("init", *words)
    assert failed.code == 2
    assert message in failed.err
    assert [path.name for path in Path().iterdir()] == ["bad.jsonl"]
    assert Path("bad.jsonl").read_text() == "no\n"


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Answers the questions on a terminal, and returns these; Ctrl-C after the last."""

    def give(*words: str) -> list[str]:
        asked: list[str] = []
        left: Iterator[str] = iter(words)

        def answer(question: str) -> str:
            asked.append(question.partition(":")[0].partition("[")[0].strip())
            for word in left:
                if word == "^D":
                    raise EOFError
                return word
            raise KeyboardInterrupt

        monkeypatch.setattr("builtins.input", answer)
        monkeypatch.setattr(init, "_is_terminal", lambda: True)
        return asked

    return give


@pytest.mark.usefixtures("fits")
def test_questions_have_defaults_and_are_asked_until_answers_can_be_used(
    answers: Callable[..., list[str]], command: Command
) -> None:
    asked = answers("gone.jsonl", save(QUESTION), "sfft", "distill", "8 GB", "no-such-model", "hymba-nano", "")
    done = command("init")
    assert done.code == 0, done.err
    assert asked == ["data"] * 2 + ["what to do"] * 2 + ["memory"] + ["model"] * 2 + ["teacher"]
    assert "Cannot find gone.jsonl." in done.out
    assert "one of sft, distill, grpo" in done.out
    settings = read()
    assert (settings.verb.name, settings.model, settings.device) == ("distill", "hymba-nano", "auto")


@pytest.mark.usefixtures("fits")
def test_a_gpu_that_is_found_is_proposed(
    answers: Callable[..., list[str]], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hymba_tune.checkpoint.choose_device", lambda _: torch.device("cuda:0"))
    monkeypatch.setattr("hymba_tune.footprint.device_memory", lambda _: 12 * 2**30)
    answers("demo", "", "", "")
    done = command("init")
    assert "here     the GPU of this machine, 12.0 GB\n" in done.out
    assert "# hardware: the GPU of this machine\n" in Path("recipe.yaml").read_text()
    assert read().device == "auto"


@pytest.mark.parametrize("words", [(), ("demo",), ("demo", "sft"), ("demo", "sft", "8gb"), ("^D",)])
def test_an_interrupt_writes_nothing(
    words: tuple[str, ...], answers: Callable[..., list[str]], command: Command
) -> None:
    answers(*words)
    assert command("init").code == 130
    assert not list(Path().iterdir())


@pytest.mark.end_to_end
def test_on_a_terminal_questions_are_asked_and_ctrl_c_ends_them() -> None:
    master, terminal = pty.openpty()
    program = [sys.executable, "-m", "hymba_tune.cli", "init"]
    process = subprocess.Popen(program, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True)
    os.close(terminal)
    shown = b""
    while b"data: files" not in shown:
        shown += os.read(master, 1024)
    for _ in range(12):  # Python misses a signal that comes just before it waits for a line
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)
            break
    process.kill()
    assert process.wait() == 130
    assert not list(Path().iterdir())
    os.close(master)
