"""From a template to a page that needs nothing beside itself."""

from __future__ import annotations

from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from hymba_tune.formatting import duration, format_bytes, share
from hymba_tune.pages.theme import DARK, LIGHT


def render(package: str, template: str, **facts: Any) -> str:
    """Fill a template in. Whatever the facts hold is escaped, unless it is ``Markup``.

    Args:
        package: Whose folder the template lies in; it may extend or import ``base.html.j2`` and ``parts.html.j2``.
        template: Its file name, ending in ``.html.j2``.
        facts: What the template names; one that is missing is an error.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(name, "") for name in (package, "hymba_tune.pages")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": duration, "format_bytes": format_bytes}
    environment.globals |= {"share": share, "themes": {"light": LIGHT, "dark": DARK}}
    return environment.get_template(template).render(facts)
