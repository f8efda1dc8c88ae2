"""Every message that the page on troubleshooting explains still exists in the code."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest

from tests.conftest import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
ROOMS = ("hymba_tune", "cli", "distill", "quant", "recipes")
GAP = "…"
"""What stands for names and numbers, in the headings and in `messages`."""


def headings() -> list[str]:
    """The messages in the page's headings."""
    by_message, _, _ = PAGE.read_text(encoding="utf-8").partition("## Symptoms")
    return [line.removeprefix("### ") for line in by_message.splitlines() if line.startswith("### ")]


@cache
def messages() -> str:
    """All texts of the code, a line each, with `GAP` for values."""
    nodes = [
        node
        for room in ROOMS
        for file in sorted((ROOT / room).rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    ]
    return "\n".join(" ".join(text_of(node).split()) for node in nodes if isinstance(node, ast.expr))


def text_of(node: ast.expr) -> str:
    """The text that an expression is, as far as it is constant."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or GAP for part in node.values)
    if isinstance(node, ast.BinOp):
        return (text_of(node.left) or GAP) + (text_of(node.right) or GAP)
    return text_of(node.body) if isinstance(node, ast.IfExp) else ""


def exists(heading: str) -> bool:
    """Whether one message of the code has the constant words of a heading, in their order."""
    words = [re.escape(part.strip()) for part in heading.split(GAP) if part.strip(' ."():,')]
    return bool(words) and re.search(".*?".join(words), messages()) is not None


@pytest.mark.parametrize("heading", headings())
def test_message_of_a_heading_exists(heading: str) -> None:
    assert exists(heading)


def test_other_headings_are_noticed() -> None:
    assert len(headings()) > 30
    assert not exists(f"The adapter {GAP} cannot be loaded at all.")
    assert not exists(f"{GAP} adapted modules moved at the first step: {GAP}")
