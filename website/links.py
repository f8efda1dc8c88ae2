"""Makes the links of a page, which are those of the repository, work on the site."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Container
from pathlib import Path

from release.address import address

ROOT = Path(__file__).parents[1]
COPIED = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
"""Files at the root of the repository that are pages of the site, with their names there."""
LINK = re.compile(r"(\[[^\]]*\]\()([^)#\s]+)([^)]*\))")


def for_the_site(text: str, page: str, pages: Container[str]) -> tuple[str, list[str]]:
    """Rewrite relative links: to pages as the site has them, to other files as the project's address has them.

    Args:
        text: The Markdown of the page.
        page: Its name on the site, such as ``how-to/serve.md``.
        pages: The names of all files on the site.

    Returns:
        The new text, and the links that lead nowhere.
    """
    place = next((source for source, name in COPIED.items() if name == page), f"docs/{page}")
    broken = []

    def rewritten(match: re.Match[str]) -> str:
        before, link, after = match.groups()
        if re.match(r"[a-z]+:|/", link):
            return match[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(place), link))
        name = "index.md" if target == "README.md" else COPIED.get(target, target.removeprefix("docs/"))
        if name in pages:
            return f"{before}{posixpath.relpath(name, posixpath.dirname(page) or '.')}{after}"
        if target.startswith("..") or not (ROOT / target).exists():
            broken.append(link)
        kind = "tree" if (ROOT / target).is_dir() else "blob"
        return f"{before}{address()}/{kind}/main/{target}{after}"

    return LINK.sub(rewritten, text), broken
