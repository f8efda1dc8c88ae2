"""The pages for users of other tools: their recipes load, and their tables name the settings that messages name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hymba_tune.cli.other_tools import OTHER_FLAGS
from hymba_tune.cli.settings import combine_for
from hymba_tune.config import SFTConfig
from hymba_tune.config.base import Config
from hymba_tune.data.formats import Names, parse
from hymba_tune.data.preferences import FIELDS, parse_pair
from tests.conftest import ROOT

PAGES = sorted((ROOT / "docs").rglob("*.md"))
FROM = sorted((ROOT / "docs" / "how-to").glob("from-*.md"))
RECIPES = [
    pytest.param(block, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"^```yaml\n(verb: .*?)^```$", page.read_text("utf-8"), re.M | re.S))
]
SETTINGS = {name for kind in Config.kinds() for name in kind.model_fields}


def rows(page: Path) -> list[tuple[list[str], str]]:
    """The rows of a page's tables of settings: another tool's names, and what is used here."""
    found = []
    settings, _, _ = page.read_text(encoding="utf-8").partition("## Data")
    for line in settings.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        names = re.fullmatch(r"`\w+`(?:, `\w+`)*", cells[0]) if len(cells) == 3 else None
        own = re.fullmatch(r"`(\w+)(?:: .+)?`|same", cells[1]) if names else None
        if names and own:
            found.append((re.findall(r"\w+", names[0]), own[1] or ""))
    return found


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_of_a_page_loads(recipe: str, tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(recipe)
    verb = re.match(r"verb: (\w+)", recipe)
    assert verb is not None
    assert combine_for(str(file), SFTConfig(), None).verb.name == verb[1]


@pytest.mark.parametrize("page", FROM, ids=lambda page: page.stem)
def test_tables_name_what_messages_name(page: Path) -> None:
    assert len(rows(page)) > 20
    for names, own in rows(page):
        for name in names:
            answers = {flag.split()[0].strip("-").replace("-", "_") for flag in OTHER_FLAGS.get(name, ())} | {name}
            assert (own or name) in answers & SETTINGS, name


def mapped() -> list[tuple[str, list[str], dict[str, str]]]:
    """The rows of the tables of data: the format, its columns, and the mapping that it needs."""
    found = []
    for page in FROM:
        _, _, data = page.read_text(encoding="utf-8").partition("## Data")
        for line in data.splitlines():
            cells = [cell.strip() for cell in line.split("|")[1:-1]]
            flags = dict(re.findall(r"--map (\w+)=(\w+)", cells[2])) if len(cells) == 3 else {}
            columns = re.findall(r"`(\w+)`", cells[1]) if flags else []
            if set(flags.values()) <= set(columns) and columns:
                found.append((cells[0], columns, flags))
    return found


@pytest.mark.parametrize(("kind", "columns", "flags"), mapped())
def test_mapping_of_a_page_reads_the_columns(kind: str, columns: list[str], flags: dict[str, str]) -> None:
    row = {column: f"text of {column}" for column in columns}
    if kind.startswith("DPO"):
        pair = parse_pair(row, Names.parse(flags, FIELDS))
        assert pair.chosen.messages[-1].content == row[flags.get("chosen", "chosen")]
    else:
        example = parse(row, Names.parse(flags))
        assert all(row[column] in str(example) for column in flags.values())


def test_pages_hold_mappings() -> None:
    assert len(mapped()) >= 8
