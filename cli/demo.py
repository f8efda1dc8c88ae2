"""`hymba-tune demo`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from hymba_tune.cli.screen import console
from hymba_tune.config.groups import RESULT
from hymba_tune.errors import ConfigError, command
from hymba_tune.files import check_new_folder, entries

DEFAULT = Path("runs", "demo")
QUESTION = "How long does the ferry to Little Cross take?"


def demo(*, out: Annotated[Path | None, Parameter(group=RESULT)] = None) -> None:
    """Fine-tune the packaged model on the packaged data, chat with the result, and merge it: minutes on a CPU.

    It needs no network, no GPU and no other file, and prints each command before it runs it.

    Example: hymba-tune demo

    Parameters
    ----------
    out
        The directory of the run (default: runs/demo, or runs/demo-2 and so on if that exists). The merged model is
        written beside it, into a directory whose name ends in -merged. Nothing that exists is replaced.
    """
    run = out or next(path for path in _names(DEFAULT) if not _taken(path))
    if run.name in ("", ".."):
        raise ConfigError(f"--out {run} names no new folder.", expected="a folder for the run, such as runs/demo")
    if taken := _taken(run):
        raise ConfigError(f"--out {run}: {taken} exists.", expected="a new or empty folder", fix="another --out")
    try:
        check_new_folder(_merged(run))
    except ConfigError as error:
        fix = f"{command('demo', '--out', 'DIR')}, in a folder that can be written"
        raise ConfigError(error.what, fix=fix) from error
    for words in steps(run):
        console.print(f"\n$ {command(*words)}", markup=False, soft_wrap=True)
        _run(words)


def steps(run: Path) -> list[list[str]]:
    """Return the commands of the demo.

    Args:
        run: The directory of its run.
    """
    return [
        ["sft", "--config", "demo", "--out", str(run)],
        ["chat", str(run), "--temperature", "0", "--prompt", QUESTION],
        ["merge", str(run), "--out", str(_merged(run))],
    ]


def _run(words: list[str]) -> None:
    from hymba_tune.cli.main import app  # which lists this verb

    app(words, exit_on_error=False, print_error=False)


def _merged(run: Path) -> Path:
    return run.with_name(f"{run.name}-merged")


def _taken(run: Path) -> Path | None:
    """Return what would be replaced."""
    return next((path for path in (run, _merged(run)) if path.is_file() or any(entries(path))), None)


def _names(first: Path) -> Iterator[Path]:
    yield first
    yield from (first.with_name(f"{first.name}-{number}") for number in count(2))
