"""`hymba-tune chat`."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.text import Text

from hymba_tune.cli.screen import RichScreen, console, loading, print_chosen_gpu, quiet_libraries
from hymba_tune.cli.settings import check_first
from hymba_tune.config import ChatConfig
from hymba_tune.errors import ConfigError, HymbaTuneError

if TYPE_CHECKING:
    with loading():
        from hymba_tune.generate import ChatSession


def chat(
    model: Annotated[str | None, Parameter(name="MODEL")] = None,
    /,
    *,
    flags: Annotated[ChatConfig, Parameter(name="*")] = ChatConfig(),  # noqa: B008 (cyclopts reads the default)
) -> None:
    """Chat with a model or with several side by side. /help lists commands; Ctrl-D quits, Ctrl-C stops an answer.

    Example: hymba-tune chat runs/my-run --prompt "How many legs have three cats?"

    Answer a file: hymba-tune chat runs/my-run --from prompts.jsonl --to answers.jsonl

    Parameters
    ----------
    model
        A run directory, or any model that --model accepts.
    """
    if model is not None:
        if "model" in flags.model_fields_set and flags.model != model:
            raise ConfigError(f"The model is given twice, {model} and --model {flags.model}.", fix="leave --model out")
        flags = flags.model_copy(update={"model": model})
    check_first(flags)
    from hymba_tune.generate import ChatSession, answer_file

    quiet_libraries()
    print_chosen_gpu(flags.device)
    if flags.prompts is not None or flags.to is not None:
        new, resumed = answer_file(flags, RichScreen().working)
        note = f", {resumed:,} of them from an interrupted run" if resumed else ""
        console.print(f" {new + resumed:,} answers{note} → {flags.to}", markup=False, soft_wrap=True)
        return
    with console.status(Text("loading the weights", style="dim")):
        session = ChatSession(flags, _note)
    if flags.prompt is not None:
        _reply(session, flags.prompt)
        return
    _converse(session)


def _converse(session: ChatSession) -> None:
    """Answer the lines that are typed, until /quit or the end of the input."""
    with suppress(ModuleNotFoundError):  # Windows, whose consoles do that themselves
        import readline  # noqa: F401 (input() then edits lines and remembers them)

    names = " | ".join(chat.name for chat in session.chats)
    console.print(f" {names} · /help lists commands, /quit or Ctrl-D quits", style="dim", markup=False)
    while True:
        try:
            console.print()
            line = input(_prompt()).strip()
        except EOFError:
            return
        if line == "/quit":
            return
        if line.startswith("/"):
            _command(session, line)
        elif line:
            try:
                _reply(session, line)
            except KeyboardInterrupt:  # stops this answer only
                pass
            except HymbaTuneError as error:  # nor does a question that cannot be answered end the session
                _note(str(error))


def _prompt() -> str:
    """Return the prompt of the input line, bold on a terminal.

    GNU readline takes what stands between the characters 1 and 2 to need no room. Without them it would draw a line
    that wraps in the wrong place.
    """
    bold = "readline" in sys.modules and sys.stdin.isatty() and console.is_terminal and not console.no_color
    return "\001\033[1m\002> \001\033[0m\002" if bold else "> "


def _reply(session: ChatSession, text: str) -> None:
    several = len(session.chats) > 1
    session.reply(text, _write, on_begin=_note if several else lambda _: None, on_end=console.print)


def _command(session: ChatSession, line: str) -> None:
    try:
        _note(session.command(line))
    except ConfigError as error:  # a mistyped command does not end the session
        _note(str(error))


def _write(text: str) -> None:
    console.print(text, end="", markup=False, soft_wrap=True)


def _note(text: str) -> None:
    for line in text.splitlines():
        console.print(f" {line}", style="dim", markup=False, soft_wrap=True)
