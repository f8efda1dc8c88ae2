"""`hymba-tune chat`."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.text import Text

from hymba_tune.cli.screen import RichScreen, console, quiet_libraries, say_which_gpu
from hymba_tune.cli.settings import check_first
from hymba_tune.config import ChatConfig
from hymba_tune.errors import ConfigError

if TYPE_CHECKING:
    from hymba_tune.generate import ChatSession


def chat(
    model: Annotated[str | None, Parameter(name="MODEL")] = None,
    /,
    *,
    flags: Annotated[ChatConfig, Parameter(name="*")] = ChatConfig(),  # noqa: B008 (cyclopts reads the default)
) -> None:
    """Talk to a model or a run, or to several side by side. /help says how; Ctrl-D ends, Ctrl-C stops an answer.

    Example: hymba-tune chat runs/my-run --prompt "How many legs have three cats?"

    A file: hymba-tune chat runs/my-run --from prompts.jsonl --to answers.jsonl

    Parameters
    ----------
    model
        A run directory, or whatever --model takes.
    """
    if model is not None:
        flags.model = model
    check_first(flags)
    from hymba_tune.generate import ChatSession, answer_file

    quiet_libraries()
    say_which_gpu(flags.device)
    if flags.prompts is not None or flags.to is not None:
        new, known = answer_file(flags, RichScreen().working)
        before = f", {known:,} of them before" if known else ""
        console.print(f" {new + known:,} answers{before} → {flags.to}", markup=False, soft_wrap=True)
        return
    with console.status(Text("loading the weights", style="dim")):
        talk = ChatSession(flags, _note)
    if flags.prompt is not None:
        _ask(talk, flags.prompt)
        return
    import readline  # noqa: F401 (input() then edits lines and remembers them)

    names = " | ".join(chat.name for chat in talk.chats)
    console.print(f" {names} · /help for what can be done, /quit or Ctrl-D to end", style="dim", markup=False)
    while True:
        try:
            said = console.input(Text("\n> ", style="bold")).strip()
        except EOFError:
            return
        if said == "/quit":
            return
        if said.startswith("/"):
            _command(talk, said)
        elif said:
            with suppress(KeyboardInterrupt):  # ends this answer only
                _ask(talk, said)


def _ask(talk: ChatSession, said: str) -> None:
    several = len(talk.chats) > 1
    talk.ask(said, _write, on_begin=_note if several else lambda _: None, on_end=console.print)


def _command(talk: ChatSession, line: str) -> None:
    try:
        _note(talk.command(line))
    except ConfigError as problem:  # a slip while talking ends nothing
        _note(str(problem))


def _write(piece: str) -> None:
    console.print(piece, end="", markup=False, soft_wrap=True)


def _note(text: str) -> None:
    for line in text.splitlines():
        console.print(f" {line}", style="dim", markup=False, soft_wrap=True)
