"""Sets the address of the project's repository everywhere: ``make address PROJECT=https://github.com/me/hymba-tune``."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLACES = (
    "*.md",
    "*.toml",
    "*.cff",
    "*.yml",
    ".github/**/*.*",
    "docs/**/*.md",
    "website/*.*",
    "examples/**/*.md",
    "examples/**/*.py",
    "examples/*.ipynb",
)
"""Files that may hold the address, which is read from `pyproject.toml`."""


def address(root: Path = ROOT) -> str:
    """Return the address, from the project's metadata."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return str(project["urls"]["Repository"])


def files(root: Path = ROOT) -> Iterator[Path]:
    """Yield every file that may hold the address."""
    yield from sorted({path for pattern in PLACES for path in root.glob(pattern) if path.is_file()})


def replace_address(new: str, root: Path = ROOT) -> list[str]:
    """Replace the address in all files that hold it, and return their names.

    Raises:
        ValueError: If the new address is not that of a repository.
    """
    new = new.removesuffix("/")
    if not re.fullmatch(r"https://[\w.-]+(/[\w.-]+){2,}", new):
        raise ValueError(f"{new!r} is not an address such as https://github.com/me/hymba-tune")
    old, changed = address(root), []
    for path in files(root):
        content = path.read_bytes()
        if old.encode() in content:
            path.write_bytes(content.replace(old.encode(), new.encode()))
            changed.append(path.relative_to(root).as_posix())
    return changed


if __name__ == "__main__":
    try:
        sys.stdout.write("\n".join(replace_address("".join(sys.argv[1:]))) + "\n")
    except ValueError as error:
        sys.exit(str(error))
