"""Renders templates as self-contained HTML pages."""

from __future__ import annotations

import re
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from hymba_tune.formatting import duration, format_bytes, share
from hymba_tune.pages.theme import DARK, LIGHT

TOGETHER = re.compile(r"(?<=\d) (?=(?:%|(?:GB|MB|kB|min|nats|steps?|rows?|h|s)\b))|(?<=\bn) (?== \d)|(?<=\bn =) (?=\d)")
"""The space between a number and its unit, and those of ``n = 24``."""


def render(package: str, template: str, **facts: Any) -> str:
    """Render a template. Values are escaped unless they are ``Markup``.

    Args:
        package: The package that contains the template, which may extend or import ``base.html.j2`` and
            ``parts.html.j2``.
        template: File name of the template, ending in ``.html.j2``.
        facts: Variables of the template. A missing one is an error.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(name, "") for name in (package, "hymba_tune.pages")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_unbroken,
    )
    environment.filters |= {"duration": duration, "format_bytes": format_bytes, "flags": _with_flags}
    environment.globals |= {"share": share, "themes": {"light": LIGHT, "dark": DARK}}
    return environment.get_template(template).render(facts)


def _unbroken(value: Any) -> Any:
    """Keep numbers and their units on one line."""
    return TOGETHER.sub("\N{NO-BREAK SPACE}", value) if type(value) is str else value


def _with_flags(text: str) -> Markup:
    """Keep each flag of a sentence on one line."""
    return Markup(re.sub(r"--[a-z][a-z-]*", r'<span class="flag">\g<0></span>', str(escape(_unbroken(text)))))
