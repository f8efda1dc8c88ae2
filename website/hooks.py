"""MkDocs' hooks: they add the generated pages, and rewrite links."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from release.address import address  # noqa: E402 (MkDocs imports this file by its path)
from website import reference  # noqa: E402
from website.links import COPIED, ROOT, for_the_site  # noqa: E402

ASSETS = ("worker.js", "tables.css")
log = logging.getLogger("mkdocs.hooks.links")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Set the project's address, and add the reference to the navigation."""
    config.extra["social"] = [{"icon": "fontawesome/brands/git-alt", "link": address(), "name": "Source code"}]
    assert config.nav is not None
    place = next(number for number, item in enumerate(config.nav) if "Changelog" in item)
    config.nav.insert(place, {"Reference": reference.navigation()})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and those that lie at the root of the repository."""
    texts = {name: (ROOT / source).read_text(encoding="utf-8") for source, name in COPIED.items()}
    for name, text in (reference.pages() | texts).items():
        files.append(File.generated(config, name, content=text))
    for name in ASSETS:
        files.append(File(name, str(HERE), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Page, files: Files, **_: object) -> str:
    """Rewrite the links of a page, and warn of those that lead nowhere."""
    text, broken = for_the_site(markdown, page.file.src_uri, files.src_uris)
    for link in broken:
        log.warning("%s: the link %s leads nowhere", page.file.src_uri, link)
    return text
