"""A virtual environment with some packages and their requirements only."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


class Elsewhere:
    """Runs Python in an environment with only some packages, which are links to the installed ones.

    Args:
        folder: The folder of the environment.
        *packages: The names of the packages.
        downloaded: Packages that pip installs instead, with versions, from the index that it is set to.
    """

    def __init__(self, folder: Path, *packages: str, downloaded: Sequence[str] = ()) -> None:
        self.folder = folder
        venv.create(folder, with_pip=False, symlinks=True)
        (site,) = folder.glob("lib/python*/site-packages")
        for package in required(*packages):
            installed = distribution(package)
            for top in {Path(file).parts[0] for file in installed.files or []} - {"..", "__pycache__"}:
                if not (site / top).exists():
                    (site / top).symlink_to(Path(str(installed.locate_file(top))))
        if downloaded:
            pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin/python"), "install", "--quiet"]
            subprocess.run([*pip, *downloaded], check=True)

    def run(self, program: str, *arguments: object, **environment: str) -> str:
        """Run a program in a subprocess, and return its output.

        Raises:
            AssertionError: If it fails; the message is its standard error.
        """
        python = self.folder / "bin/python"
        variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        variables |= {"HF_HOME": str(self.folder / "home"), "HF_HUB_OFFLINE": "1"} | environment
        done: subprocess.CompletedProcess[str] = subprocess.run(
            [python, "-c", program, *map(str, arguments)],
            cwd=self.folder,
            env=variables,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


def required(*packages: str) -> set[str]:
    """Return the packages and all their requirements on this platform."""
    names: set[str] = set()
    waiting = list(packages)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in names:
            continue
        try:
            needs: list[Any] = list(map(Requirement, distribution(name).requires or []))
        except PackageNotFoundError:
            continue  # for another platform
        names.add(name)
        waiting += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return names
