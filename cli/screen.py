"""What the terminal shows during a command: a banner, progress, and a table that grows row by row."""

from __future__ import annotations

import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from hymba_tune.formatting import format_bytes
from hymba_tune.train.screen import MetricsRow, Screen

MOVES = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """Replace characters that would move the cursor, color the screen or reverse the line by visible symbols."""
    return MOVES.sub(lambda match: _symbol(ord(match[0])), text)


def _symbol(code: int) -> str:
    return chr(0x2400 + code) if code < 0x20 else f"\\u{code:04x}"


class SafeConsole(Console):
    """A console that makes every text `visible`: the data, the models and the servers write none of its controls."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render an object as segments of text; rich's own controls stay."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))


console = SafeConsole(highlight=False, emoji=False)
error_console = SafeConsole(stderr=True, highlight=False, emoji=False)
COLUMNS = {"step": 11, "loss": 7, "eval": 9, "lr": 8, "tok/s": 7, "mem": 8, "left": 8}
PREFERENCE_COLUMNS = {"step": 11, "loss": 7, "eval": 9, "margin": 8, "acc": 6, "tok/s": 8, "left": 8}
"""The columns of preference training."""
REWARD_COLUMNS = {"step": 11, "loss": 7, "reward": 8, "eval": 9, "equal": 7, "tokens": 8, "left": 8}
"""The columns of training from rewards."""
HELP_FLAGS = ("--help", "-h", "--help-all")
QUIET_SECONDS = 2.0
"""The shortest work whose progress is worth showing."""
LOADING = "loading torch and transformers"
SHOWN_SPEED = 100
"""The amount of work after which its speed is shown."""


class RichScreen(Screen):
    """Shows a run on the terminal, 60 columns wide; plain text when it is piped."""

    def __init__(self) -> None:
        self._eval_losses: dict[str, float] = {}
        self._columns: dict[str, int] = {}

    @contextmanager
    def working(self, label: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """Show a spinner during work, with the remaining time where the total is known."""
        started = time.monotonic()
        with console.status(Text(label, style="dim")) as status:
            yield lambda done: status.update(Text(_progress(label, done, started, total), style="dim"))
        if (seconds := time.monotonic() - started) > QUIET_SECONDS and not console.is_terminal:
            console.print(f" {label} · {seconds:.0f} s", markup=False)

    def banner(self, lines: dict[str, str]) -> None:
        """Show labels and lines, aligned."""
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for label, line in lines.items():
            table.add_row(f" {label}", Text(line))
        console.print(table)
        console.print()

    def row(self, row: MetricsRow, *, total_steps: int, seconds_left: float | None) -> None:
        """Show one line of the table."""
        margin = row.margin if row.eval_margin is None else row.eval_margin
        accuracy = row.accuracy if row.eval_accuracy is None else row.eval_accuracy
        if not self._columns:
            rewards = (row.chosen_reward, row.rejected_reward, row.eval_chosen_reward, row.eval_rejected_reward)
            self._columns = COLUMNS if rewards == (None,) * 4 else PREFERENCE_COLUMNS
            if {"reward", "eval_reward"} & row.more.keys():
                self._columns = REWARD_COLUMNS
            names = (f"{name:>{width}}" for name, width in self._columns.items())
            console.print("".join(names), style="dim", markup=False)
        held_out = row.more.get("eval_reward", row.eval_loss)
        cells = {
            "step": f"{row.step}/{total_steps}",
            "loss": _format(row.loss, ".3f"),
            "eval": "" if held_out is None else self._trend("", held_out),
            "reward": _format(row.more.get("reward"), ".3f"),
            "equal": _format(row.more.get("equal_groups"), ".0%"),
            "tokens": _format(row.more.get("answer_tokens"), ".0f"),
            "margin": _format(margin, ".3f"),
            "acc": _format(accuracy, ".0%"),
            "lr": _format(row.learning_rate, ".1e"),
            "tok/s": _format(row.tokens_per_s, ",.0f"),
            "mem": format_bytes(row.memory_bytes) if row.memory_bytes else "",
            "left": "" if seconds_left is None else _duration(seconds_left),
        }
        console.print("".join(f"{cells[name]:>{width}}" for name, width in self._columns.items()), markup=False)
        indent = self._columns["step"] + 2
        for line in _listed((f"{name} {self._trend(name, loss)}" for name, loss in row.source_losses.items()), indent):
            console.print(line, style="dim", markup=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """Show a separate line."""
        console.print(f" {text}", markup=False)

    def _trend(self, source: str, loss: float) -> str:
        before = self._eval_losses.get(source, loss)
        self._eval_losses[source] = loss
        mark = " " if before == loss else "▼" if loss < before else "▲"
        return f"{loss:.3f} {mark}"


def _listed(items: Iterable[str], indent: int) -> list[str]:
    """Return items in lines of the terminal's width; only items wider than that are broken."""
    whole = " · ".join(visible(item).strip().replace(" ", "\xa0") for item in items)
    lines = textwrap.wrap(whole, console.width - indent, break_on_hyphens=False)
    return [" " * indent + line.replace("\xa0", " ") for line in lines]


@contextmanager
def loading() -> Iterator[None]:
    """Say that libraries are being imported, which takes seconds, unless that has happened already."""
    if "torch" in sys.modules:
        yield
        return
    if not error_console.is_terminal:
        error_console.print(f" {LOADING}", style="dim", markup=False)
    with error_console.status(Text(LOADING, style="dim")):
        yield


def quiet_libraries() -> None:
    """Silence transformers' progress and warnings in commands without a run's log."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def print_chosen_gpu(device: str) -> None:
    """Print which GPU is used, if several are visible, to stderr, as stdout may hold JSON.

    Args:
        device: The value of --device.

    Raises:
        ConfigError: If there is no such device.
    """
    from hymba_tune.checkpoint import choose_device, describe_choice

    if choice := describe_choice(choose_device(device)):
        error_console.print(f" {choice}", style="dim", markup=False, soft_wrap=True)


def _progress(label: str, done: int, started: float, total: int | None = None) -> str:
    if total:
        label = f"{label} · {done:,} of {total:,}"
        seconds = time.monotonic() - started
        enough = done and seconds > QUIET_SECONDS
        return f"{label} · {_duration(seconds / done * (total - done))} to go" if enough else label
    if done < SHOWN_SPEED:
        return f"{label} · {done:,}"
    return f"{label} · {done:,} · {done / max(time.monotonic() - started, 1e-3):,.0f} a second"


def _format(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
