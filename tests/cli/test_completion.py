from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from hymba_tune.cli.completion import completion_script
from hymba_tune.cli.settings import recipes_and_files
from tests.cli.conftest import Command

pytestmark = pytest.mark.end_to_end

SHELLS = ("bash", "zsh", "fish")
script = cache(completion_script)
Complete = Callable[..., list[str]]


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Complete:
    """Returns what bash proposes for the last of some words."""
    folder = tmp_path_factory.mktemp("shell")
    (folder / "script").write_text(script("bash"))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def call(*words: str) -> list[str]:
        line = f"COMP_WORDS=(hymba-tune {' '.join(words)}); COMP_CWORD={len(words)}"
        if not words[-1]:
            line = line.replace(")", ' "")')
        show = 'source ./script; $LINE; _hymba_tune; printf "%s\\n" "${COMPREPLY[@]}"'.replace("$LINE", line)
        program = ["bash", "--norc", "-c", show]
        environment = {**os.environ, "PATH": path}
        done = subprocess.run(program, cwd=folder, env=environment, check=True, capture_output=True, text=True)
        assert not done.stderr
        return done.stdout.split()

    return call


def test_bash_completes_verbs_flags_choices_and_recipes(complete: Complete) -> None:
    assert {"sft", "recipes", "completion"} <= {*complete("")}
    assert complete("distill", "cap") == ["capture"]
    assert complete("sft", "--rsl") == ["--rslora"]  # --help does not show it
    assert complete("sft", "--help") == ["--help", "--help-all"]
    assert complete("sft", "--method", "d") == ["dora"]
    assert complete("completion", "z") == ["zsh"]
    assert complete("sft", "--config", "sft_l") == ["sft_long_8k", "sft_lora"]
    assert complete("recipes", "show", "dpo") == ["dpo_lora"]


def test_bash_completes_files_where_nothing_else_matches() -> None:
    assert script("bash").endswith("\ncomplete -o bashdefault -o default -F _hymba_tune hymba-tune\n")


def test_zsh_completes_files_as_values_of_texts() -> None:
    lines = script("zsh").splitlines()
    assert all(line.endswith(":data:_files' \\") for line in lines if line.strip().startswith("'*--data["))
    assert not [line for line in lines if line.count("_files") > 1]


@pytest.mark.parametrize("shell", SHELLS)
def test_scripts_are_well_formed(shell: Any, tmp_path: Path) -> None:
    assert "--rslora" in script(shell) or "-l rslora" in script(shell)
    if program := shutil.which(shell):
        (tmp_path / "script").write_text(script(shell))
        subprocess.run([program, "-n", tmp_path / "script"], check=True)


def test_the_script_is_all_that_is_printed(command: Command) -> None:
    printed = command("completion", "bash")
    assert (printed.code, printed.out, printed.err) == (0, script("bash"), "")


def test_names_of_recipes_complete_together_with_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mine.yaml", "mine.txt"):
        (tmp_path / name).touch()
    (tmp_path / "mines").mkdir()
    assert recipes_and_files("mi")[-2:] == ["mines/", "mine.yaml"]
    assert recipes_and_files("")[0] == "demo"
