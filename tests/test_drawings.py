"""The drawings of the pages: small, with a title, and shown with a description."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.conftest import ROOT

DRAWINGS = sorted((ROOT / "docs" / "images").glob("*.svg"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LARGEST = 20_000
SHOWN = {
    (page.parent / target).resolve(): description
    for page in PAGES
    for description, target in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
}


@pytest.mark.parametrize("file", DRAWINGS, ids=lambda file: file.stem)
def test_drawing_has_a_title_and_a_description(file: Path) -> None:
    assert file.stat().st_size < LARGEST
    title = ElementTree.parse(file).getroot().find("{http://www.w3.org/2000/svg}title")
    assert title is not None
    assert title.text
    assert len(SHOWN[file.resolve()]) > 20
