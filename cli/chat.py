"""`hymba-tune chat`."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated

from cyclopts import Parameter
from rich.text import Text

from hymba_tune.cli.screen import console, quiet_libraries
from hymba_tune.config import ChatConfig


def chat(
    model: Annotated[str | None, Parameter(name="MODEL")] = None,
    /,
    *,
    flags: Annotated[ChatConfig, Parameter(name="*")] = ChatConfig(),  # noqa: B008 (cyclopts reads the default)
) -> None:
    """Talk to a model or a run. Ctrl-D or /quit ends, Ctrl-C stops an answer, /reset forgets what was said.

    Example: hymba-tune chat runs/my-run --prompt "How many legs have three cats?"

    Parameters
    ----------
    model
        A run directory, or whatever --model takes.
    """
    from hymba_tune.generate import Chat

    quiet_libraries()
    if model is not None:
        flags.model = model
    with console.status(Text("loading the weights", style="dim")):
        talk = Chat(flags, _note)
    if flags.prompt is not None:
        talk.ask(flags.prompt, _write)
        console.print()
        return
    import readline  # noqa: F401 (input() then edits lines and remembers them)

    console.print(f" {talk.name} · /reset to start over, /quit or Ctrl-D to end", style="dim", markup=False)
    while True:
        try:
            said = console.input(Text("\n> ", style="bold")).strip()
        except EOFError:
            return
        if said == "/quit":
            return
        if said == "/reset":
            talk.reset()
        elif said:
            with suppress(KeyboardInterrupt):  # ends this answer only
                talk.ask(said, _write)
            console.print()


def _write(piece: str) -> None:
    console.print(piece, end="", markup=False, soft_wrap=True)


def _note(text: str) -> None:
    console.print(f" {text}", style="dim", markup=False)
