"""What can go wrong, and for whom: every error of the kit derives from `HymbaTuneError`."""

from __future__ import annotations


class HymbaTuneError(Exception):
    """Something the user can mend. The command line prints it without a traceback and exits with code 2.

    Args:
        what: What is wrong and where, in one sentence: the file and line, or the field.
        expected: What would have been right.
        fix: What to do about it.
        skip: How to go on without mending it.
    """

    def __init__(self, what: str, *, expected: str = "", fix: str = "", skip: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.details = {"expected": expected, "to fix": fix, "to skip": skip}

    def __str__(self) -> str:
        lines = [self.what]
        lines += [f"  {label:<10} {text}" for label, text in self.details.items() if text]
        return "\n".join(lines)


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
