"""The errors that users see; every one derives from `HymbaTuneError`."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from difflib import get_close_matches

_PASSWORD = re.compile(r"(?<=://)[^\s/]+(?=@)")


class HymbaTuneError(Exception):
    """An error that the user can fix. The command line prints it without a traceback and exits with code 2.

    Args:
        what: The problem and its place (file and line, or field) in one sentence.
        expected: What would have been valid.
        fix: What to do about it.
        skip: How to continue without a fix.
    """

    exit_code = 2
    """The code with which the command line exits."""

    def __init__(self, what: str, *, expected: str = "", fix: str = "", skip: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.details = {"expected": expected, "to fix": fix, "to skip": skip}

    def __str__(self) -> str:
        lines = [self.what]
        lines += [f"  {label:<10} {text}" for label, text in self.details.items() if text]
        return "\n".join(lines)


def without_passwords(text: str) -> str:
    """Replace the user names and passwords of addresses in a text."""
    return _PASSWORD.sub("…", text)


def shortened(text: str, limit: int = 200) -> str:
    """Cut the middle out of a text of more than ``limit`` characters."""
    return text if len(text) <= limit else f"{text[: limit // 2]}…{text[-limit // 2 :]}"


def command(*words: object) -> str:
    """Return a `hymba-tune` command that can be pasted into a shell, whatever characters the words have."""
    return shlex.join(["hymba-tune", *map(str, words)])


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word that is spelled most like ``word``; empty if none is close."""
    return next(iter(get_close_matches(word[:100], list(known), n=1)), "")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Suggest the nearest known word to somebody who misspelled it: ``did you mean rank?``; empty if none is close."""
    near = nearest(word, known)
    return f"did you mean {near}?" if near else ""


class ConfigError(HymbaTuneError):
    """A setting, a flag or a recipe cannot be used."""


class DataError(HymbaTuneError):
    """A data file or a row of it cannot be used."""


class CheckpointError(HymbaTuneError):
    """A model, an adapter or a run directory cannot be read or written."""


class TrainingError(HymbaTuneError):
    """A run cannot start or go on."""


class HubError(HymbaTuneError):
    """The Hugging Face Hub cannot be reached or refuses."""
