"""Checks that the tests of several commands share."""

from __future__ import annotations

from rich.cells import cell_len

from tests.cli.conftest import Result


def assert_plain(result: Result, columns: int = 80) -> None:
    """Checks that a command succeeded, and that its output reads well in a file."""
    assert result.code == 0, result.err
    assert not result.err
    assert "\x1b" not in result.out
    assert "\r" not in result.out
    assert max(map(cell_len, result.out.splitlines())) <= columns
