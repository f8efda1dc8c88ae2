"""Checks what `make check` has built: ``python -m release.distributions build/dist build/wheel``."""

from __future__ import annotations

import sys
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from hymba_tune import __version__

ROOT = Path(__file__).parents[1]
MADE_HERE = {".git", ".venv", "build", "dist", "runs", "__pycache__"}
MADE_HERE |= {".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis", "hymba_tune.egg-info"}
"""Folders and files that are no part of the sources."""
Wheel = Mapping[str, bytes]


def sources(root: Path = ROOT) -> set[str]:
    """Return the files of the repository that a source distribution must have."""
    paths = (path.relative_to(root).parts for path in root.rglob("*") if path.is_file())
    return {"/".join(parts) for parts in paths if not MADE_HERE & {*parts} and not _is_example_data(parts)}


def _is_example_data(parts: tuple[str, ...]) -> bool:
    return parts[0] == "examples" and parts[2:3] == ("data",)


def problems(in_sdist: set[str], in_tree: set[str], of_sdist: Wheel, of_tree: Wheel) -> list[str]:
    """Return what is wrong with the distributions.

    Args:
        in_sdist: The files of the source distribution.
        in_tree: The files of the repository.
        of_sdist: The contents of the wheel that was built from the source distribution.
        of_tree: The contents of the wheel that was built from the repository.
    """
    missing = [f"the sdist lacks {name}" for name in sorted(in_tree - in_sdist)]
    names = sorted(of_sdist.keys() | of_tree.keys())
    different = [name for name in names if of_sdist.get(name) != of_tree.get(name)]
    return missing + [f"{name} is not the same in the wheels of the sdist and the repository" for name in different]


def _wheel(folder: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(folder / f"hymba_tune-{__version__}-py3-none-any.whl") as wheel:
        return {name: wheel.read(name) for name in wheel.namelist()}


def main(dist: Path, wheel: Path) -> list[str]:
    """Read the distributions in two folders, and return what is wrong with them."""
    with tarfile.open(dist / f"hymba_tune-{__version__}.tar.gz") as sdist:
        names = {member.name.partition("/")[2] for member in sdist.getmembers() if member.isfile()}
    return problems(names, sources(), _wheel(dist), _wheel(wheel))


if __name__ == "__main__":
    sys.exit("\n".join(main(*map(Path, sys.argv[1:]))) or 0)
