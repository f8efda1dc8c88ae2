"""Windows and macOS, simulated: what this package itself imports and calls is there, or is done without."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hymba_tune.cli.main import main
from hymba_tune.cli.screen import console
from hymba_tune.distributed import checks, launch
from hymba_tune.errors import ConfigError
from tests.conftest import ROOT


def simulated(system: str, *words: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a command as on another system; without words, every module is imported."""
    program = [sys.executable, "-m", "tests.simulated_platform", system, *map(str, words)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "cp1252"}  # as a pipe on Windows
    return subprocess.run(program, cwd=cwd, env=env, capture_output=True, text=True, encoding="cp1252", check=False)


def test_every_module_can_be_imported_on_windows() -> None:
    done = simulated("win32")
    assert done.returncode == 0, done.stderr
    modules, without = json.loads(done.stdout)
    assert modules > 200
    assert without == ["distributed.zero"]  # DeepSpeed


@pytest.mark.end_to_end
@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_a_model_is_trained_evaluated_merged_and_talked_to(system: str, tmp_path: Path) -> None:
    data = tmp_path / "my rows.jsonl"
    rows = (ROOT / "hymba_tune/assets/demo/train.jsonl").read_text(encoding="utf-8").splitlines()
    data.write_text("\n".join(rows[:40]), encoding="utf-8")
    commands = [
        ["sft", "--model", "hymba-nano", "--data", data, "--steps", 2, "--eval-max-rows", 4, "--out", "run"],
        ["sft", "--resume", "run", "--steps", 3],
        ["chat", "run", "--prompt", "Hello", "--max-new-tokens", 4],
        ["eval", "run", "--data", data, "--max-rows", 4],
        ["merge", "run", "--out", "merged"],
        ["export", "merged", "--out", "exported"],
        ["doctor"],
    ]
    for words in commands:
        done = simulated(system, *words, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "exported" / "model.safetensors").is_file()


def test_several_processes_are_refused_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.sys, "platform", "win32")
    monkeypatch.setattr(checks, "count_gpus", lambda: 2)
    assert checks.processes_here("auto", "cuda") == 1
    with pytest.raises(ConfigError, match="sft: several processes cannot work together on Windows"):
        launch.launch("sft", None, 2)  # type: ignore[arg-type]


def test_an_encoding_without_arrows_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    with pytest.raises(SystemExit, match="0"):
        main(["recipes", "show", "demo"])
    console.print("5.475 → 0.046 ▼")
    sys.stdout.flush()
    assert written.getvalue().endswith(b"5.475 ? 0.046 ?\n")
