import sys
import sysconfig
from pathlib import Path

import pytest

from hymba_tune.assets import corpus
from hymba_tune.assets.corpus import Entry, clean_paragraphs, compiled_entries, documents, read_entries, source_entries

SOURCE = '''
"""Keeps bees.

A longer text about how the bees are kept in this house.
"""

# hive = Hive(5, count=2); hive.add(Bee()); hive.add(Bee())

class Hive:
    """A box for the bees to live in."""

    def add(self, bee, /, *, count=1):
        """Put a bee into the hive."""
        # short note


if True:
    async def selfish_bee(selfish):
        """Return a bee that does not share."""
'''


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "bees.py"
    path.write_text(SOURCE)
    return path


def test_source_gives_docstrings_and_sentences_in_its_order(source: Path) -> None:
    assert [(e.kind, e.name, e.call, e.paragraphs) for e in source_entries(source, "bees")] == [
        ("module", "bees", "", ("A longer text about how the bees are kept in this house.",)),
        ("class", "bees.Hive", "class bees.Hive", ("A box for the bees to live in.",)),
        ("function", "bees.Hive.add", "bees.Hive.add(bee, /, *, count=1)", ("Put a bee into the hive.",)),
        ("function", "bees.selfish_bee", "bees.selfish_bee(selfish)", ("Return a bee that does not share.",)),
    ]


def test_comment_of_whole_sentences_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text("x = 1  # beside code, so only about it\n# Bees need a\n# flower for every wing they have.\n")
    assert [e.paragraphs for e in source_entries(path, "a")] == [("Bees need a\nflower for every wing they have.",)]


def test_source_that_does_not_parse_gives_nothing(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text("def (:\n")
    assert list(source_entries(path, "bad")) == []


def test_compiled_module_gives_its_functions_with_their_arguments() -> None:
    calls = {entry.name: entry.call for entry in compiled_entries("math")}
    assert calls["math.sqrt"] == "math.sqrt(x, /)"
    assert not any("__" in name for name in calls)


def test_python_module_is_not_read_as_a_compiled_one() -> None:
    assert list(compiled_entries("textwrap")) == []


def test_wrapped_lines_are_joined_and_lists_and_doctests_are_not() -> None:
    prose = "These lines are long enough that somebody must have\nwrapped them at the edge of a page."
    doctest = ">>> double(number)\n4"
    items = "- the first of two things\n- the second of two things"
    assert clean_paragraphs(f"{prose}\n\n{doctest}\n\n{items}") == (prose.replace("\n", " "), doctest, items)


@pytest.mark.parametrize(
    "paragraph",
    [
        "Copyright 2001 by the bees of this house.",
        "Send what you find to queen@hive.org, please.",
        "-*- coding: utf-8 -*- is what it says",
        "==========",
        "1 2 3 4 5 6 7 8 9 10 one two three",
        "x = [y(z) for z in (1, 2)]",
        "Die Bienen fliegen über den Garten.",
    ],
)
def test_boilerplate_rulers_and_tables_are_dropped(paragraph: str) -> None:
    assert clean_paragraphs(f"{paragraph}\n\nThis is a sentence.") == ("This is a sentence.",)


def test_heading_stays_with_what_it_names() -> None:
    text = "str.title()\n\n   Return a copy in title case.\n\nNote:\n\n===="
    assert clean_paragraphs(text) == ("str.title()\nReturn a copy in title case.",)


def test_typographic_quotes_become_plain_ones() -> None:
    assert clean_paragraphs("Say \u201chello\u201d \u2013 it\u2019s polite.") == ('Say "hello" - it\'s polite.',)


def test_documents_keep_to_their_limit_their_module_and_the_order() -> None:
    entries = [
        Entry("a", "function", "a.f", "a.f(x)", ("one two", "three")),
        Entry("a", "comment", "", "", ("four five six",)),
        Entry("b", "class", "b.C", "class b.C", ("seven " * 9,)),
    ]
    assert list(documents(entries, 22)) == [
        ("a", "a.f(x)\none two\n\nthree"),
        ("a", "four five six"),
        ("b", "class b.C\n" + "seven " * 9),
    ]


def test_library_is_read_without_repeats_bundled_code_or_one_line_tests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = {
        "_bees.py": SOURCE,
        "hives/__init__.py": SOURCE.replace("house", "garden"),
        "site-packages/birds.py": SOURCE.replace("house", "nest"),
        "test/test_bees.py": '"""A title of one line."""',
    }
    for name, source in sources.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    monkeypatch.setattr(sys, "stdlib_module_names", frozenset({"math", "this", "module_of_another_platform"}))
    monkeypatch.setattr(corpus, "topics", {"bees": "The language says little about bees."})

    entries = read_entries()
    paragraphs = [paragraph for entry in entries for paragraph in entry.paragraphs]
    assert len(paragraphs) == len(set(paragraphs))
    assert {entry.module for entry in entries} == {"topics.bees", "bees", "hives", "math"}
