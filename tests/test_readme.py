"""The README and the pages of docs/ and examples/: their commands work and print what is shown, their links lead on."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from hymba_tune.cli.main import app
from tests.conftest import ROOT
from tests.walk import Block, blocks, commands, differences, walk

pytestmark = pytest.mark.end_to_end

EXAMPLES = [ROOT / "examples" / "README.md", *sorted((ROOT / "examples").glob("*/README.md"))]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")), *EXAMPLES]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
README_LINES = 200

WALKS: dict[str, tuple[dict[str, str], str]] = {
    "README.md": (
        {"--steps 20": "--steps 2 --eval-max-rows 8", "--base --data": "--max-rows 8 --data"},
        "my-model/model.safetensors",
    ),
    "docs/tutorial.md": ({}, "ferry-export/model.safetensors"),
    "docs/how-to/own-data.md": ({}, "runs/desk/report.html"),
}
"""Pages that are run line by line: what is changed in them to save time, and a file that is there at the end."""


def commands_of(page: Path) -> Iterator[list[str]]:
    """Every command line of hymba-tune in a page: in blocks, and between backticks in a table."""
    for block in blocks(page):
        if block.language in ("", "bash"):
            yield from commands(block)
    for command in re.findall(r"\| `(hymba-tune [^`]*)` \|", page.read_text(encoding="utf-8")):
        yield shlex.split(command)[1:]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_command_of_a_page_parses(page: Path) -> None:
    for words in commands_of(page):
        app.parse_args(words, exit_on_error=False, print_error=False)


def test_pages_hold_commands() -> None:
    assert sum(len(list(commands_of(page))) for page in PAGES) > 150
    assert any("how-to" in name for name in NAMES)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_to_files(page: Path) -> None:
    """Those to the reference, which is generated, are checked where the site is built."""
    links = re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))
    written = [link for link in links if "://" not in link and not re.match(r"(\.\./)*reference/", link)]
    missing = [link for link in written if not (page.parent / link).exists()]
    assert not missing


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= README_LINES


@pytest.mark.parametrize("name", WALKS)
def test_page_copied_line_by_line_works_and_prints_what_it_shows(name: str, tmp_path: Path) -> None:
    changes, made = WALKS[name]
    (work := tmp_path / "work").mkdir()
    printed = walk(ROOT / name, work, changes)
    assert (work / made).is_file()
    assert not "\n".join(difference for _, difference in differences(ROOT / name, printed))


PAGE = """
```bash
echo one; echo 1.25 s
sleep 60 &
kill %1; false    # exit code 1
```
```text
SHOWN
```
```bash
cat <<'END'
  2/9  0.5  17 tok/s
END
test -f none
```
"""


@pytest.mark.parametrize("shown", ["one\n3 min", "…", "o…e\n  7.0  s", "…\n1.0 s"])
def test_walk_compares_outputs_but_for_what_varies(shown: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE.replace("SHOWN", shown).replace("test -f none\n", ""), encoding="utf-8")
    (tmp_path / "work").mkdir()
    assert not list(differences(page, walk(page, tmp_path / "work")))


@pytest.mark.parametrize("shown", ["one", "two\n3.5 s", "one\n3 rows", "…\none"])
def test_walk_finds_other_outputs(shown: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE.replace("SHOWN", shown).replace("test -f none\n", ""), encoding="utf-8")
    (tmp_path / "work").mkdir()
    ((block, difference),) = differences(page, walk(page, tmp_path / "work"))
    assert block.lines == shown.splitlines()
    assert "+1.25 s" in difference


def test_walk_fails_where_a_line_does(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE, encoding="utf-8")
    (tmp_path / "work").mkdir()
    with pytest.raises(AssertionError, match=r"\{5: 1, 14: 1\}, expected \{5: 1\}"):
        walk(page, tmp_path / "work")


def test_commands_end_where_the_shell_goes_on() -> None:
    lines = [
        "hymba-tune serve a --port 1 > log 2>&1 &",
        "X=1 hymba-tune chat b \\",
        "    --prompt 'c & d' | head; hymba-tune e # f",
    ]
    assert list(commands(Block("bash", 1, lines))) == [
        ["serve", "a", "--port", "1"],
        ["chat", "b", "--prompt", "c & d"],
        ["e"],
    ]
