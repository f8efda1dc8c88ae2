"""The environment variables that the code reads or sets, compared with their descriptions in environment.yaml."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import yaml

HERE = Path(__file__).parent
FOLDERS = ("hymba_tune", "cli", "distill", "quant", "recipes")
OTHERS = """BF16 F16 F32 F64 U8 SC_PAGE_SIZE SC_PHYS_PAGES DEEPSPEED FSDP
FULL_STATE_DICT MULTI_
GPU MIG FATAL MODEL BLOCK BLOCK_E BLOCK_N CARD CHANNELS GROUPS STATES"""
"""Texts in capitals that are no variables, in modules that use the environment."""


def described() -> dict[str, dict[str, str]]:
    """Return the descriptions of the variables, by group."""
    groups: dict[str, dict[str, str]] = yaml.safe_load((HERE / "environment.yaml").read_text(encoding="utf-8"))
    return groups


def in_the_code() -> set[str]:
    """Return every text that may be a variable: those in capitals, in the modules that use the environment."""
    found = set()
    for path in (path for folder in FOLDERS for path in (HERE.parent / folder).rglob("*.py")):
        if "environ" in (text := path.read_text(encoding="utf-8")):
            nodes = (node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant))
            found |= {
                value
                for value in nodes
                if isinstance(value, str) and re.fullmatch(r"(?!SIG[A-Z])[A-Z][A-Z0-9_]+", value)
            }
    return found - {*OTHERS.split()}
