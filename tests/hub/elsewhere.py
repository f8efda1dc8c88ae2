"""A Python elsewhere: an environment of its own with some packages, what they require, and nothing more."""

from __future__ import annotations

import os
import subprocess
import venv
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


class Elsewhere:
    """Runs Python where only some packages are installed; they are links to those here.

    Args:
        folder: Where it is made.
        *packages: By the names they are installed under.
    """

    def __init__(self, folder: Path, *packages: str) -> None:
        self.folder = folder
        venv.create(folder, with_pip=False, symlinks=True)
        (site,) = folder.glob("lib/python*/site-packages")
        for package in required(*packages):
            found = distribution(package)
            for top in {Path(file).parts[0] for file in found.files or []} - {"..", "__pycache__"}:
                if not (site / top).exists():
                    (site / top).symlink_to(Path(str(found.locate_file(top))))

    def run(self, program: str, *words: object, **environment: str) -> str:
        """Run a program in a process of its own; what it prints.

        Raises:
            AssertionError: If it fails, with what it said.
        """
        python = self.folder / "bin/python"
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        kept |= {"HF_HOME": str(self.folder / "home"), "HF_HUB_OFFLINE": "1"} | environment
        done: subprocess.CompletedProcess[str] = subprocess.run(
            [python, "-c", program, *map(str, words)], cwd=self.folder, env=kept, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


def required(*packages: str) -> set[str]:
    """Packages and all that they require here."""
    found: set[str] = set()
    waiting = list(packages)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        try:
            needs: list[Any] = list(map(Requirement, distribution(name).requires or []))
        except PackageNotFoundError:
            continue  # for another platform
        found.add(name)
        waiting += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found
