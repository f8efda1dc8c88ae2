"""Trying bad input: what came of a command line, and whether that is what a user needs."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from hymba_tune.cli.main import main

TIMEOUT = 60
"""Seconds after which a command counts as endless. It is a limit for hangs, not for speed."""
LONGEST = 1500
"""Characters that a message may have: values of the user's are cut."""


@dataclass(frozen=True)
class Attempt:
    """A command line with bad input.

    Attributes:
        words: The words after ``hymba-tune``.
        says: A pattern that the output must contain, so that the user knows what is wrong.
        refused: Whether the command must end with exit code 2. Otherwise it may also use the input, and say what is
            wrong.
    """

    words: Sequence[str]
    says: str
    refused: bool = True


class Endless(BaseException):
    """Raised when a command takes too long; no ``except Exception`` of the kit can swallow it."""


@contextmanager
def limited() -> Iterator[None]:
    """Interrupt what runs longer than `TIMEOUT`."""

    def stop(*_: Any) -> None:
        raise Endless

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(TIMEOUT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fault(attempt: Attempt, capsys: pytest.CaptureFixture[str]) -> str | None:
    """Run a command line; returns what is wrong with its end, None if nothing is."""
    capsys.readouterr()
    code: Any = None
    try:
        with limited():
            main(list(attempt.words))
    except SystemExit as end:
        code = end.code
    except Endless:
        return "endless"
    except BaseException as error:
        return f"traceback: {type(error).__name__}: {str(error)[:200]}"

    output = capsys.readouterr()
    text = re.sub(r"\s+", " ", output.out + output.err)
    if code not in (0, 2) or "Traceback" in text:
        return f"traceback: exit code {code}: {text[:300]}"
    if attempt.refused and code == 0:
        return f"silent: exit code 0: {text[:300]}"
    says = attempt.says.replace("\\ ", "").replace(" ", "")
    unwrapped = re.search(says, text.replace(" ", ""))  # a name may be wrapped anywhere
    if not (re.search(attempt.says, text) or unwrapped):
        return f"silent: exit code {code}, nothing like {attempt.says!r}: {text[:300]}"
    if len(output.err) > LONGEST:
        return f"too long: {len(output.err)} characters: {output.err[:200]}"
    return None


def check(attempts: Iterable[tuple[str, Attempt]], capsys: pytest.CaptureFixture[str]) -> None:
    """Check that every attempt ends with a message that helps; the faults are listed, a line each."""
    results = [(name, fault(attempt, capsys)) for name, attempt in attempts]
    if wrong := [f"{name}: {problem}" for name, problem in results if problem]:
        pytest.fail(f"{len(wrong)} of {len(results)} end badly:\n" + "\n".join(wrong), pytrace=False)
