"""`hymba-tune data`: check, preview, convert, split, clear."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Parameter
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from hymba_tune.cli.screen import HELP_FLAGS, RichScreen, console, loading, quiet_libraries, visible
from hymba_tune.cli.settings import AsJson, checking
from hymba_tune.config import (
    DataCheckConfig,
    DataConvertConfig,
    DataPreviewConfig,
    DataSplitConfig,
    Learn,
    as_mapping,
)
from hymba_tune.errors import ConfigError, command
from hymba_tune.formatting import format_bytes
from hymba_tune.train.screen import Screen

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hymba_tune.data.check_counts import Check
    from hymba_tune.data.preview import Preview

USABLE, NOT_USABLE = 0, 2
BAR = 24
SHOWN_CHARACTERS = 4000
"""Maximum characters of a segment in a preview."""
SEGMENTS = {
    "context": ("", "dim"),
    "loss": ("", "bold green"),
    "chosen": ("chosen ", "bold green"),
    "rejected": ("rejected ", "red"),
}
"""Labels and styles of the segments of a preview."""

data = App(
    name="data",
    help_flags=HELP_FLAGS,
    help="Check, preview, convert and split data before training.\n\nExample: hymba-tune data check my.jsonl",
)


@data.command
def check(
    *files: str,
    as_json: AsJson = False,
    flags: Annotated[DataCheckConfig, Parameter(name="*")] = DataCheckConfig(),  # noqa: B008 (cyclopts reads the default)
) -> int:
    """Check whether files can be trained on, and list the problems to fix. Exit code 0 (usable) or 2.

    Example: hymba-tune data check my.jsonl --model hymba-nano --html check.html

    Parameters
    ----------
    files
        Data, as for sft --data.
    as_json
        Print the result as JSON.
    """
    with checking():
        from hymba_tune.data import open_sources
        from hymba_tune.data.check_facts import facts, next_commands
        from hymba_tune.data.checking import check_sources
        from hymba_tune.data.mixes import local_files
        from hymba_tune.files import check_file, write_errors, write_text
        from hymba_tune.inputs import check_inputs

        if flags.html:
            check_file("--html", flags.html, overwrite=flags.overwrite, inputs=local_files(files))
        sources = open_sources(_required(files), escape=flags.escape_special_tokens)
        check_inputs(flags)
    tokenizer = _tokenizer(flags)
    with (Screen() if as_json else RichScreen()).working("checking") as progress:
        result = check_sources(
            sources,
            tokenizer,
            max_length=flags.max_length,
            mapping=as_mapping(flags.map),
            learn=flags.learn,
            progress=progress,
        )

    reading = ["--chat-template", flags.chat_template] if flags.chat_template else []
    reading += ["--learn", flags.learn] if flags.learn is not Learn.all else []
    reading += ["--escape-special-tokens"] if flags.escape_special_tokens else []
    commands = next_commands(result, files, flags.model, flags.map, flags.max_length, reading)
    if flags.html:
        from hymba_tune.data.check_page import check_page  # which draws plots

        page = check_page(result, model=flags.model, commands=commands)
        with write_errors("--html", flags.html):
            write_text(flags.html, page, overwrite=flags.overwrite)
    if as_json:
        console.print_json(json.dumps(facts(result), ensure_ascii=False))
    else:
        _show_check(result)
        for label, line in [*commands, *([("page", str(flags.html))] if flags.html else [])]:
            console.print(f" {label:<8}{line}", markup=False, soft_wrap=True)
    return USABLE if result.usable else NOT_USABLE


@data.command
def preview(
    *files: str,
    flags: Annotated[DataPreviewConfig, Parameter(name="*")] = DataPreviewConfig(),  # noqa: B008
) -> None:
    """Show rows as the model reads them. Text with loss is bright, or in brackets if piped; the rest is dim.

    Of a pair, the better answer is bright and the worse one red.

    Example: hymba-tune data preview my.jsonl -n 1 --model hymba-nano

    Parameters
    ----------
    files
        Data, as for sft --data.
    """
    with checking():
        from hymba_tune.data import open_sources
        from hymba_tune.data.preview import previews
        from hymba_tune.inputs import check_inputs

        sources = open_sources(_required(files), escape=flags.escape_special_tokens)
        check_inputs(flags)
    rows = previews(sources, _tokenizer(flags), mapping=as_mapping(flags.map), learn=flags.learn)
    for row in islice(rows, flags.skip, flags.skip + flags.rows):
        _show_preview(row, flags.max_length)


@data.command
def convert(*files: str, flags: Annotated[DataConvertConfig, Parameter(name="*")]) -> None:
    """Convert data to another format or file type. Rows that the format cannot hold are errors, never silently lost.

    Example: hymba-tune data convert chats.json --to messages --out chats.jsonl

    Parameters
    ----------
    files
        Data, as for sft --data.
    """
    from hymba_tune.data import open_sources
    from hymba_tune.data.converting import check_converted
    from hymba_tune.data.converting import convert as write
    from hymba_tune.data.mixes import local_files
    from hymba_tune.files import remove_leftovers

    remove_leftovers(flags.out, Path(f"{flags.out}.dropped.jsonl"))
    check_converted(flags.out, on_bad_row=flags.on_bad_row, overwrite=flags.overwrite, inputs=local_files(files))
    with RichScreen().working("converting") as progress:
        done = write(
            open_sources(_required(files)),
            flags.to,
            flags.out,
            mapping=as_mapping(flags.map),
            on_bad_row=flags.on_bad_row,
            unique=flags.unique,
            overwrite=flags.overwrite,
            progress=progress,
        )
    _lines([f"{done.rows:,} rows → {flags.out}"])
    if done.repeated:
        _lines([f"{done.repeated:,} repeated rows left out"])
    if done.left_out:
        _lines([f"{done.left_out:,} bad rows left out → {flags.out}.dropped.jsonl"])


@data.command
def split(*files: str, flags: Annotated[DataSplitConfig, Parameter(name="*")]) -> None:
    """Split data into train.jsonl and eval.jsonl. Rows with the same prompt go to the same file.

    Example: hymba-tune data split my.jsonl --eval 0.1 --out data

    Parameters
    ----------
    files
        Data, as for sft --data.
    """
    from hymba_tune.data import open_sources
    from hymba_tune.data.dividing import EVAL, TRAIN, check_divided, divide
    from hymba_tune.data.mixes import local_files
    from hymba_tune.files import remove_leftovers

    remove_leftovers(flags.out / TRAIN, flags.out / EVAL)
    check_divided(flags.out, overwrite=flags.overwrite, inputs=local_files(files))
    with RichScreen().working("splitting") as progress:
        done = divide(
            open_sources(_required(files)),
            flags.eval,
            flags.out,
            seed=flags.seed,
            mapping=as_mapping(flags.map),
            on_bad_row=flags.on_bad_row,
            overwrite=flags.overwrite,
            progress=progress,
        )
    _lines([f"{done.train:,} rows → {flags.out / TRAIN}", f"{done.held_out:,} rows → {flags.out / EVAL}"])
    if done.unreadable:
        were = "row could not be read and was" if done.unreadable == 1 else "rows could not be read and were"
        _lines([f"{done.unreadable:,} {were} left out"])
    _lines([f"next  {command('sft', '--data', flags.out / TRAIN, '--eval-data', flags.out / EVAL)}"])


@data.command
def clear(*kinds: Literal["data", "targets", "answers", "pairs"]) -> None:
    """Empty the cache of encoded data and of teacher targets and generations.

    Example: hymba-tune data clear targets

    Parameters
    ----------
    kinds
        data (encoded), targets and answers (of teachers), pairs (tables of tokenizer pairs). Default: all.
    """
    from hymba_tune.data.cache import CACHE_KINDS, cache_folder
    from hymba_tune.data.cache import clear as empty

    for kind, what in CACHE_KINDS.items():
        if kinds and kind not in kinds:
            continue
        entries, size = empty(cache_folder(kind))
        if entries or kinds or kind == "data":
            things = "entry" if entries == 1 else "entries"
            _lines([f"{what}: {entries:,} {things}, {format_bytes(size)} removed from {cache_folder(kind)}"])


def _required(files: tuple[str, ...]) -> tuple[str, ...]:
    if not files:
        raise ConfigError("FILES are missing.", expected="a file, a Hub dataset, or demo", fix="demo to try it")
    return files


def _tokenizer(flags: DataCheckConfig | DataPreviewConfig) -> PreTrainedTokenizerBase:
    with loading():
        from hymba_tune.adapters import tokenizer_of
    from hymba_tune.data import with_chat_template
    from hymba_tune.registry import resolve_model

    quiet_libraries()
    return with_chat_template(tokenizer_of(resolve_model(flags.model), resize=True), flags.chat_template)


def _lines(lines: Iterable[str]) -> None:
    for line in lines:
        console.print(f" {line}", markup=False, soft_wrap=True)


def _show_check(result: Check) -> None:
    from hymba_tune.data.check_facts import overview, problems, verdict

    console.print(Text(f" {verdict(result)}", style="bold green" if result.usable else "bold red"))
    console.print()
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, line in overview(result):
        table.add_row(f" {label}", Text(line))
    console.print(table)
    console.print()
    if to_fix := problems(result):
        console.print(Text(" to fix", style="bold"))
        for problem in to_fix:
            _print_indented(problem.what)
            for example in problem.examples:
                _print_indented(example, indent=4, style="dim")
            if problem.fix:
                _print_indented(f"→ {problem.fix}", indent=4)
        console.print()
    _show_lengths(result)


def _print_indented(text: str, *, indent: int = 2, style: str = "") -> None:
    console.print(Padding(Text(visible(text), style=style, overflow="fold"), (0, 0, 0, indent)))


def _show_lengths(result: Check) -> None:
    from hymba_tune.data.check_facts import histogram

    bars = histogram(result.lengths)
    if not bars:
        return
    most = max(rows for _, _, rows in bars)
    labels = [f"{low:,} and more" if high is None else f"{low:,} to {high:,}" for low, high, _ in bars]
    width = max(map(len, labels))
    console.print(Text(" tokens per row", style="bold"))
    for label, (_, _, rows) in zip(labels, bars, strict=True):
        bar = "█" * round(BAR * rows / most) or ("▏" if rows else "")
        console.print(Text(f" {label:>{width}}  ", style="dim").append(bar, style="default").append(f" {rows:,}"))
    console.print()


def _show_preview(row: Preview, max_length: int) -> None:
    from hymba_tune.data.preview import shortened

    console.print(Text(f" {visible(str(row.place))}", style="bold"))
    if row.problem:
        console.print(Text(f" cannot be used: {visible(str(row.problem))}\n", style="red"), soft_wrap=True)
        return

    text = Text()
    for segment, kind in shortened(row.segments, SHOWN_CHARACTERS):
        label, style = SEGMENTS[kind]
        if label and not text.plain.endswith("\n"):
            text.append("\n")
        bare = kind == "context" or (kind == "loss" and console.is_terminal)
        text.append(label, style="dim").append(visible(segment) if bare else f"[{visible(segment)}]", style=style)
    console.print(text, soft_wrap=True)

    cut = f", cut to {max_length:,}" if row.tokens > max_length else ""
    with_loss = " and ".join(f"{count:,}" for count in row.learned)
    console.print(f" loss on {with_loss} of {row.tokens:,} tokens{cut}\n", markup=False)
