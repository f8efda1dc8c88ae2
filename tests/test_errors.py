from __future__ import annotations

import shlex

import pytest

from hymba_tune.errors import command, did_you_mean, nearest, shortened, without_passwords


@pytest.mark.parametrize(("word", "near"), [("rnk", "rank"), ("packing", ""), ("", "")])
def test_nearest_known_word_is_suggested_if_one_is_close(word: str, near: str) -> None:
    known = ["alpha", "rank", "ranks"]
    assert nearest(word, known) == nearest(word, iter(known)) == near
    assert did_you_mean(word, known) == (f"did you mean {near}?" if near else "")


def test_command_can_be_pasted_into_a_shell() -> None:
    words = ["chat", "runs/my run; rm -rf ~", "$(id)", "it's"]
    assert shlex.split(command(*words)) == ["hymba-tune", *words]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("at https://me:p@ss@host/v1: refused", "at https://…@host/v1: refused"),
        ("http://host/a@b and me@host", "http://host/a@b and me@host"),
    ],
)
def test_passwords_of_addresses_are_not_shown(text: str, shown: str) -> None:
    assert without_passwords(text) == shown


def test_middle_of_a_long_text_is_cut() -> None:
    assert (shortened("abcdef", 6), shortened("abcdefg", 6)) == ("abcdef", "abc…efg")
