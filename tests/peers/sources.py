"""The tests of transformers and PEFT, in the source packages of the installed versions. None of them is kept here."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

# Read while tests are collected: during a test, XDG_CACHE_HOME is a folder of the session.
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hymba-tune" / "peers"
NEEDED = {"transformers": ["parameterized==0.9.0"], "peft": [], "trl": []}
"""Packages that the tests need and the kit does not."""


def tests_of(library: str) -> list[Path]:
    """Return folders to import from while the tests of an installed library run; the first has its package ``tests``.

    HYMBA_TUNE_TRANSFORMERS or HYMBA_TUNE_PEFT may name a checkout instead. A checkout of transformers has more tests
    than its source package, those of generation among them. The tests of TRL are our own.
    """
    needed = [_unpacked(requirement) for requirement in NEEDED[library]]
    if library == "trl":
        return needed
    if checkout := os.environ.get(f"HYMBA_TUNE_{library.upper()}"):
        assert (Path(checkout) / "tests").is_dir(), f"{checkout} has no folder tests"
        return [Path(checkout), *needed]
    return [_unpacked(f"{library}=={version(library)}"), *needed]


def _unpacked(requirement: str) -> Path:
    """Download and unpack the source package of ``name==version``, unless that was done before; return its folder."""
    name = requirement.replace("==", "-")
    folder = CACHE / name
    if not folder.is_dir():
        new = CACHE / f"{name}.new"
        new.mkdir(parents=True, exist_ok=True)
        # Pip and not our own client: it goes to the registry that the machine is set to.
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-binary", ":all:", "--no-deps"]
        subprocess.run([*pip, "--dest", str(new), requirement], check=True)
        (archive,) = new.glob("*.tar.gz")
        with tarfile.open(archive) as files:
            files.extractall(new, filter="data")
        archive.unlink()
        new.rename(folder)
    return folder / name
