"""Prints the changelog of one version: ``python -m release.notes v0.1.0``, for the tag that releases it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from hymba_tune import __version__

CHANGELOG = Path(__file__).parents[1] / "CHANGELOG.md"


def notes(tag: str, changelog: str, *, version: str = __version__) -> str:
    """Return the section of a version in the changelog.

    Args:
        tag: The tag of the release: ``v`` and the version.
        changelog: The text of the changelog.
        version: The version of the package.

    Raises:
        ValueError: If the tag is that of another version, or the changelog has no dated section of the version.
    """
    if tag != f"v{version}":
        raise ValueError(f"The tag is {tag!r}, and the version in hymba_tune/__init__.py is {version}.")
    for section in re.split(r"^## ", changelog, flags=re.M):
        heading, _, text = section.partition("\n")
        if re.fullmatch(rf"\[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d", heading.strip()):
            return re.split(r"^\[", text, flags=re.M)[0].strip() + "\n"  # without the addresses at the end of the file
    raise ValueError(f"CHANGELOG.md has no section '## [{version}] - YYYY-MM-DD': rename '## [Unreleased]'.")


if __name__ == "__main__":
    try:
        sys.stdout.write(notes("".join(sys.argv[1:]), CHANGELOG.read_text(encoding="utf-8")))
    except ValueError as error:
        sys.exit(str(error))
