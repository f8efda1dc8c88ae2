from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hymba_tune
from hymba_tune.cli.main import main
from hymba_tune.errors import ConfigError
from tests.cli.conftest import Command

KERNELS = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


@pytest.mark.parametrize(("own", "limit"), [(None, "64"), ("7", "7")])
def test_few_kernels_are_cached_by_default(
    own: str | None, limit: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KERNELS, own or "")
    if own is None:
        monkeypatch.delenv(KERNELS)
    assert command("--version").code == 0
    assert os.environ[KERNELS] == limit


def test_version(command: Command) -> None:
    for word in ("--version", "-v", "-V", "version"):
        assert command(word).out.strip() == hymba_tune.__version__


LARGE = {"torch", "transformers", "peft", "trl", "datasets", "pandas", "pyarrow", "huggingface_hub", "matplotlib"}
IMPORTED = """
import sys
from hymba_tune.cli.main import main
try: main(sys.argv[1:])
except SystemExit: pass
print(*sorted(sys.modules), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("words", "imported"),
    [
        ("--help", ""),
        ("sft --help", ""),
        ("sft --help-all", ""),
        ("sft --rank 0", ""),
        ("sft --learning-rate 1", ""),
        ("sft", ""),
        ("distill --data demo", ""),
        ("eval gone", ""),
        ("sft --data gone.jsonl", "pyarrow"),
        ("data check gone.jsonl", "pyarrow"),
    ],
)
def test_help_and_first_errors_import_at_most_one_large_library(words: str, imported: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", IMPORTED, *words.split()]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert LARGE & set(done.stderr.splitlines()[-1].split()) == set(imported.split())


def test_bitsandbytes_warns_only_where_warnings_go() -> None:
    warn = "import hymba_tune, logging; {} logging.getLogger('bitsandbytes').warning('no kernel')"
    for first, warning in {"": "", "logging.basicConfig();": "WARNING:bitsandbytes:no kernel\n"}.items():
        words = [sys.executable, "-c", warn.format(first)]
        assert subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stderr == warning


MISTAKES = {
    "--rank 0": "--rank 0: must be at least 1 (common: 8 to 64).\n",
    "--rank x": "--rank x: must be a whole number (common: 8 to 64).\n",
    "--steps 1.5": "--steps 1.5: must be a whole number.\n",
    "--max-length 4": "--max-length 4: must be at least 8 (common: 512 to 8192).\n",
    "--lr 0": "--lr 0: must be more than 0.\n",
    "--lr fast": "--lr fast: must be a number.\n",
    "--eval-split 1": "--eval-split 1: must be less than 1.\n",
    "--method lara": "--method lara: must be 'lora', 'dora' or 'full'.\n  to fix     --method lora\n",
    "--method xyz": "--method xyz: must be 'lora', 'dora' or 'full'.\n",
    "--map prompt": "--map prompt: 'prompt' is not a pair such as name=value.\n",
    "--rank 0 --lr 0": "--rank 0: must be at least 1 (common: 8 to 64).\n--lr 0: must be more than 0.\n",
    "--rnk 3": "Unknown option: --rnk. Did you mean --rank?\n",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistake_gets_one_message(words: str, command: Command) -> None:
    result = command("sft", *words.split())
    assert result.code == 2
    assert result.err == MISTAKES[words]
    assert not result.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sfft"], 'Did you mean "sft"?'),
        (
            ["train"],
            "There is no verb train.\n  expected   sft, dpo, kto, orpo, reward, grpo and distill train\n"
            "  to fix     hymba-tune sft",
        ),
        (["generate"], "There is no verb generate.\n  to fix     hymba-tune chat MODEL"),
        (["eval", "gone"], "--model gone: no such folder"),
        (["eval", "runs/gone"], "--model runs/gone: no such folder"),
        (["sft"], "--data is missing."),
        (
            ["sft", "my.jsonl"],
            "hymba-tune sft: unexpected argument 'my.jsonl'.\n  to fix     hymba-tune sft --data my.jsonl",
        ),
        (["sft", "recipe.yaml"], "  to fix     hymba-tune sft --config recipe.yaml"),
        (["recipes", "shw", "kto"], "There is no recipe shw.\n  to fix     hymba-tune recipes show kto"),
        (["distill", "captre"], "to fix     hymba-tune distill capture"),
        (["distill", "my.jsonl"], "to fix     hymba-tune distill --data my.jsonl"),
        (["distill", "--data", "demo"], "--teacher is missing."),
        (["distill", "--loss", "jsd"], "loss: jsd needs the whole vocabulary, which no cache holds; add --online"),
        (["doctor", "x"], "hymba-tune doctor: unexpected argument 'x'.\n  to fix     hymba-tune doctor --help"),
        (["merge", "runs/x"], "--out requires an argument"),
        (["chat", "--top-p", "2"], "--top-p 2: must be at most 1."),
        (["chat", "no-such-model"], "--model no-such-model: no such folder"),
        (["sft", "--method", "full", "--targets", "mlp"], "targets: --method full trains every weight"),
        (["sft", "--method", "dora", "--targets", "ssm"], "targets: ssm adapts only some rows of in_proj"),
        (["sft", "--resume", "no/run"], "no/run is not a run: it has no config.yaml."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistake_ends_with_exit_code_2_and_no_traceback(words: list[str], message: str, command: Command) -> None:
    result = command(*words)
    assert result.code == 2
    assert message in result.err
    assert "Traceback" not in result.err + result.out


def test_debug_shows_where(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="--data is missing"):
        main(["sft", "--debug"])
    assert not capsys.readouterr().err


def test_interrupt_ends_with_130(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hymba_tune.train.sft.run_sft", interrupt)
    result = command("sft", "--data", "demo")
    assert (result.code, result.out, result.err) == (130, "", "")


def test_stopped_run_says_how_to_go_on(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt("runs/mine")

    monkeypatch.setattr("hymba_tune.train.sft.run_sft", interrupt)
    result = command("sft", "--data", "demo")
    assert result.code == 130
    assert "to resume: hymba-tune sft --resume runs/mine" in result.out


def test_words_come_from_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["hymba-tune", "sft", "--rank", "0"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "--rank 0" in capsys.readouterr().err


def test_offline_user_is_offered_the_packaged_model(command: Command, tmp_path: Path) -> None:
    result = command("sft", "--data", "demo", "--out", tmp_path / "out")
    assert result.code == 2
    assert "Cannot reach the Hub for nvidia/Hymba-1.5B-Base" in result.err
    assert "--model hymba-nano" in result.err
    assert not (tmp_path / "out").exists()


def test_libraries_are_told_to_send_no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    clean = {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_TELEMETRY"}
    monkeypatch.setattr(os, "environ", clean)
    with pytest.raises(SystemExit):
        main(["--version"])
    assert clean["HF_HUB_DISABLE_TELEMETRY"] == "1"


def crash(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("hymba_tune.train.sft.run_sft", fail)


def test_internal_error_is_a_line_that_says_where_its_log_is(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    crash(monkeypatch, KeyError("http://me:secret@host\x1b[2J\n" + "x" * 1000))
    result = command("sft", "--data", "demo", "--out", "http://me:secret@host")
    (log,) = tmp_path.glob("hymba-tune/errors/error-*.log")
    assert result.code == 1
    assert (result.out, result.err.count("\n")) == ("", 1)
    assert result.err.startswith("Internal error: KeyError: 'http://…@host")
    # An older installation may not know the address of the project.
    assert re.search(rf" \(log: {log}; report it: (https://\S+/issues|the project's issue tracker)\)\n$", result.err)
    assert "\x1b" not in result.err
    assert log.stat().st_mode & 0o077 == 0
    written = log.read_text()
    assert written.startswith("hymba-tune sft --data demo --out http://…@host\nhymba-tune ")
    assert "in fail\n    raise error\nKeyError: 'http" in written
    assert "secret" not in result.err + written


def test_log_of_an_internal_error_needs_no_cache(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    crash(monkeypatch, ValueError("x"))
    assert f"(log: {tmp_path}/error-" in command("sft", "--data", "demo").err
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    assert "(log: cannot be written: No such file or directory;" in command("sft", "--data", "demo").err


def test_internal_error_is_shown_whole_with_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    crash(monkeypatch, KeyError("why"))
    with pytest.raises(KeyError, match="why"):
        main(["sft", "--data", "demo", "--debug"])


def test_name_that_the_system_refuses_is_a_mistake_of_the_user(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash(monkeypatch, OSError(errno.ENAMETOOLONG, "File name too long", "q" * 300))
    result = command("sft", "--data", "demo")
    assert (result.code, result.err.count("q")) == (2, 200)
    assert "…" in result.err
    assert ": File name too long.\n  to fix     another name" in result.err
