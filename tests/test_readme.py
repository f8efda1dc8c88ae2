"""The README and the pages of docs/: their commands work, their links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hymba_tune.cli.main import app
from tests.conftest import ROOT

pytestmark = pytest.mark.end_to_end

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
README_LINES = 200


def blocks(page: Path, language: str = "") -> Iterator[str]:
    """The fenced blocks of a page that are in one language."""
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S):
        if found[1] == language:
            yield found[2]


def commands(page: Path) -> Iterator[list[str]]:
    """Every command line of hymba-tune in a page: in blocks, and between backticks in a table."""
    text = page.read_text(encoding="utf-8")
    lines = [line for language in ("", "bash") for block in blocks(page, language) for line in block.splitlines()]
    lines += re.findall(r"\| `(hymba-tune [^`]*)` \|", text)
    for line in lines:
        if line.startswith("hymba-tune "):
            yield shlex.split(line, comments=True)[1:]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_command_of_a_page_parses(page: Path) -> None:
    for words in commands(page):
        app.parse_args(words, exit_on_error=False, print_error=False)


def test_pages_hold_commands() -> None:
    assert sum(len(list(commands(page))) for page in PAGES) > 50


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= README_LINES


def test_the_walk_through_the_readme_works_line_by_line(tmp_path: Path) -> None:
    (walk,) = blocks(ROOT / "README.md", "bash")
    shorter = walk.replace("--steps 20", "--steps 2 --eval-max-rows 8").replace("--base --data", "--max-rows 8 --data")
    assert shorter.count("--steps 2 ") == 1
    assert shorter.count("--max-rows 8 ") == 1
    here = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    program = ["bash", "-e", "-o", "pipefail", "-c", shorter]
    done = subprocess.run(program, cwd=tmp_path, env={**os.environ, "PATH": here}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "my-model" / "model.safetensors").is_file()
