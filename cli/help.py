"""`--help`, which shows at most twenty flags of a verb, the needed ones first, and `--help-all`, which shows all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from attrs import define, evolve
from cyclopts import App, Argument, Group
from cyclopts.help import ColumnSpec, DefaultFormatter, DescriptionRenderer, HelpEntry, HelpPanel, NameRenderer
from cyclopts.help.specs import AsteriskColumn

from hymba_tune.errors import command

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions

ALL = "--help-all"
MOST = 20
"""The most flags of a verb that `--help` shows."""
NAMES = 0.35
"""Share of the width that the names of flags take, unless one of them is longer."""


def shown_flags(arguments: Sequence[Argument]) -> list[Argument]:
    """Return the arguments of a verb that `--help` shows: all if they are few, else those tagged with `FIRST`."""
    from hymba_tune.config.groups import FIRST  # the list of verbs needs no settings

    known = [argument for argument in arguments if argument.show]
    if len(known) <= MOST:
        return known
    return [one for one in known if one.index is not None or FIRST in cast(tuple[Group, ...], one.parameter.group)]


def help_settings(app: App, words: Sequence[str]) -> dict[str, Any]:
    """Return the settings of cyclopts with which a command line's help shows the flags that it should.

    Args:
        app: The whole command line.
        words: A command line that asks for help.
    """
    chain, apps, _ = app.parse_commands([word for word in words if word not in app.help_flags])
    verb = apps[-1]
    if not chain:
        return {"help_formatter": HelpFormatter()}
    if verb.default_command is None:
        return {"help_formatter": HelpFormatter(), "help_epilogue": ""}
    with app.app_stack(apps):
        arguments = [argument for argument in verb.assemble_argument_collection() if argument.show]
    shown = arguments if ALL in words else shown_flags(arguments)
    more = len(arguments) - len(shown)
    return {
        "help_formatter": HelpFormatter(shown=[name for argument in shown for name in argument.names]),
        "help_epilogue": f"{more} more flags: {command(*chain, ALL)}" if more else "",
    }


@define(kw_only=True)
class HelpFormatter(DefaultFormatter):
    """Formats the panels of `--help` so that no name is broken, also on 60 columns.

    Attributes:
        shown: Names of the flags to show. All if it is None.
    """

    shown: Sequence[str] | None = None

    def __call__(self, console: Console, options: ConsoleOptions, panel: HelpPanel) -> None:
        """Print a panel, unless it has nothing to show."""
        if panel.format == "parameter":
            entries = [_without_default_of_switch(entry) for entry in panel.entries if self._shows(entry)]
            columns = _columns(console.width, entries)
            DefaultFormatter(column_specs=columns)(console, options, panel.copy(entries=entries))
        else:
            super().__call__(console, options, panel)

    def _shows(self, entry: HelpEntry) -> bool:
        return self.shown is None or bool(entry.positional_label) or not {*entry.names}.isdisjoint(self.shown)


def _without_default_of_switch(entry: HelpEntry) -> HelpEntry:
    """Leave out of a switch that is off that it can be switched off."""
    if entry.default == "False" and entry.positive_names:
        return evolve(entry, default=None, negative_names=())
    return entry


def _columns(width: int, entries: Sequence[HelpEntry]) -> tuple[ColumnSpec, ...]:
    words = [word for entry in entries for word in entry.display_labels_with_metavar]
    most = max([round(NAMES * width), *map(len, words)])
    names = ColumnSpec(renderer=NameRenderer(max_width=most), style="cyclopts.name", max_width=most)
    texts = ColumnSpec(renderer=DescriptionRenderer(), overflow="fold")
    return (*([AsteriskColumn] if any(entry.required for entry in entries) else []), names, texts)
