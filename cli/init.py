"""`hymba-tune init`."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from cyclopts import Parameter, Token

from hymba_tune.cli.main import VERBS
from hymba_tune.cli.screen import RichScreen, console, error_console, loading, quiet_libraries, visible
from hymba_tune.cli.settings import check_first
from hymba_tune.config import TrainingConfig, as_mapping
from hymba_tune.config.base import Names, Pairs
from hymba_tune.config.groups import DATA, MODEL, RESULT, RUN
from hymba_tune.errors import ConfigError, HubError, HymbaTuneError, command, nearest
from hymba_tune.files import check_file, write_errors, write_text
from hymba_tune.formatting import format_bytes

if TYPE_CHECKING:
    from hymba_tune.data.summary import DataSummary
    from hymba_tune.plan import DeviceEstimate

T = TypeVar("T")
Verb = Literal["sft", "dpo", "kto", "orpo", "reward", "grpo", "distill"]
Card = Literal["here", "8gb", "12gb", "16gb", "24gb", "48gb", "80gb", "cpu"]
CARDS: dict[str, str] = {
    "here": "the GPU of this machine",
    "8gb": "a GPU of 8 GB, such as an RTX 4060",
    "12gb": "a GPU of 12 GB, such as an RTX 4070",
    "16gb": "a GPU of 16 GB, such as an RTX 4080",
    "24gb": "a GPU of 24 GB, such as an RTX 4090",
    "48gb": "a GPU of 48 GB, such as an L40S",
    "80gb": "a GPU of 80 GB, such as an A100",
    "cpu": "no GPU; slow for more than the packaged model hymba-nano",
}
UNCHECKED = {"8gb": "--batch-size 2 --grad-accum 8 --quantize nf4"}
"""Flags for a card where a plan cannot be made, as the model's configuration cannot be downloaded."""


@dataclass
class Answers:
    """The answers to the questions of `init`, from flags or a person. Those not given yet are None."""

    data: Sequence[str] | None
    mapping: Mapping[str, str]
    verb: str | None
    model: str | None
    card: str | None
    teacher: str | None
    reward: str | None

    @property
    def asks(self) -> bool:
        """Whether a person is to be asked: something necessary was not given."""
        return not self.data or self.card is None


def _meant(answer: str, choices: Iterable[str]) -> str:
    """Return the choice that an answer means, in any case and for memory with or without its unit; empty if none."""
    plain = answer.lower().replace(" ", "")
    return next((choice for choice in choices if choice in (plain, f"{plain}gb")), "")


def _card(_: Any, tokens: Sequence[Token]) -> str:
    """Return the card that a flag names.

    Raises:
        ValueError: If there is none.
    """
    if found := _meant(tokens[0].value, CARDS):
        return found
    raise ValueError(f"{tokens[0].value} is none of {', '.join(CARDS)}")


def init(
    *,
    data: Annotated[Names | None, Parameter(group=DATA)] = None,
    map: Annotated[Pairs | None, Parameter(group=DATA)] = None,
    verb: Annotated[Verb | None, Parameter(group=RUN)] = None,
    model: Annotated[str | None, Parameter(group=MODEL)] = None,
    card: Annotated[Card | None, Parameter(group=RUN, converter=_card)] = None,
    teacher: Annotated[str | None, Parameter(group=MODEL)] = None,
    reward: Annotated[str | None, Parameter(group=RUN)] = None,
    out: Annotated[Path, Parameter(group=RESULT)] = Path("recipe.yaml"),
) -> None:
    """Ask for your data and your GPU, and write a recipe that fits.

    With --data and --card it asks nothing, and takes the usual values for what no flag says.

    Example: hymba-tune init --data my.jsonl --card 8gb --out recipe.yaml

    Parameters
    ----------
    data
        Data, as for sft --data.
    map
        Column and role names that differ: --map prompt=question.
    verb
        What to do: sft, dpo, kto, orpo, reward, grpo or distill. Default: what the data is usually for.
    model
        The model to train, as for sft --model. Default: Hymba-1.5B, or hymba-nano on a CPU.
    card
        The memory: that of the GPU here, of another one (8gb to 80gb), or cpu.
    teacher
        The teacher of distill. Default: llama-3.2-3b-instruct.
    reward
        The reward of grpo. Default: gsm8k where answers have ####, else exact.
    out
        The file to write. It must not exist.
    """
    if os.path.lexists(out):
        raise ConfigError(f"--out {out} exists.", fix="another name: --out FILE")
    check_file("--out", out)
    answers = Answers(data, as_mapping(map or []), verb, model, card, teacher, reward)
    if answers.asks and not _is_terminal():
        missing = [flag for flag, value in (("--data", data), ("--card", card)) if not value]
        raise ConfigError(
            f"init asks questions, and this is no terminal; {' and '.join(missing)} would answer them.",
            fix=command("init", "--data", *(data or ["my.jsonl"]), "--card", card or "8gb", "--out", out),
        )
    try:
        text = _recipe(answers, out)
    except EOFError:  # Ctrl-D
        raise KeyboardInterrupt from None
    with write_errors("--out", out):
        write_text(out, text, overwrite=False)
    _show_next(out, answers)


def _is_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def _recipe(answers: Answers, out: Path) -> str:
    """Ask what is not known yet, and return the text of the recipe."""
    from hymba_tune.recipes.choosing import RecipeWish, first_settings, usual_model
    from hymba_tune.recipes.schema import SCHEMA_FILE
    from hymba_tune.recipes.writing import recipe_text

    asks = answers.asks
    summary = _read_data(answers)
    described = _describe(answers.data or (), summary)
    console.print(f" {visible(described)}", markup=False, soft_wrap=True)
    verbs = {name: VERBS[name] for name in summary.verbs}
    if answers.verb is None:
        answers.verb = _choose("what to do", verbs, next(iter(verbs))) if asks else next(iter(verbs))
    elif answers.verb not in verbs:
        raise ConfigError(f"--verb {answers.verb}: the data holds {summary.format}.", expected=", ".join(verbs))
    if answers.card is None:
        answers.card = _ask_card()
    proposed = usual_model(answers.verb, on_cpu=answers.card == "cpu")
    answers.model = answers.model or (_ask_model(proposed) if asks else proposed)
    if answers.verb == "distill" and answers.teacher is None and asks:
        answers.teacher = _ask("teacher: a Hub id, an alias, or a folder", "llama-3.2-3b-instruct")

    wish = RecipeWish(answers.verb, answers.data or (), answers.model, answers.teacher, answers.reward)
    settings = first_settings(wish, summary)
    if answers.card == "cpu":
        settings["device"] = "cpu"
    check_first(TrainingConfig.of(answers.verb).model_validate(settings))
    settings, memory = _fitted(answers, settings)
    console.print(f" memory    {memory}", markup=False, soft_wrap=True)
    heading = [
        described,
        f"  {command(answers.verb, '--config', out)}",
        f"data:     {summary.format}",
        f"hardware: {CARDS[answers.card]}",
        f"memory:   {memory}",
        f"More settings: hymba-tune {answers.verb} --help-all",
    ]
    if (out.parent / SCHEMA_FILE).is_file():  # which an editor finds without a connection, on every machine
        heading.insert(0, f"yaml-language-server: $schema={SCHEMA_FILE}")
    return recipe_text(answers.verb, settings, heading)


def _read_data(answers: Answers) -> DataSummary:
    from hymba_tune.data.summary import summarize

    def read(names: Sequence[str]) -> DataSummary:
        answers.data = names
        with RichScreen().working("reading the data"):
            return summarize(names, answers.mapping)

    if answers.data:
        return read(answers.data)
    return _until_usable(lambda: read(shlex.split(_ask("data: files, a Hub dataset, or demo", "demo"))))


def _describe(data: Sequence[str], summary: DataSummary) -> str:
    columns = f" ({' '.join(summary.mapping)})" if summary.mapping else ""
    size = format_bytes(summary.row_bytes) if summary.row_bytes >= 2**20 else f"{summary.row_bytes:,} bytes"
    parts = [f"{summary.rows:,} rows", f"{summary.format}{columns}", f"99 % of them up to {size} of text"]
    bad = f" · {summary.bad_rows:,} rows cannot be used and are skipped: {summary.problem}" if summary.bad_rows else ""
    return " · ".join([", ".join(data), *parts]) + bad


def _ask(question: str, default: str) -> str:
    return input(f" {question} [{default}]: ").strip() or default


def _choose(question: str, choices: Mapping[str, str], default: str) -> str:
    for name, meaning in choices.items():
        console.print(f"   {name:<8} {meaning}", style="dim", markup=False)
    while True:
        answer = _ask(question, default)
        if found := _meant(answer, choices):
            return found
        console.print(f"   one of {', '.join(choices)}", style="yellow", markup=False)
        default = nearest(answer, choices) or default


def _until_usable(read: Callable[[], T]) -> T:
    while True:
        try:
            return read()
        except (HymbaTuneError, ValueError) as error:  # ValueError: an open quotation mark
            console.print(visible(str(error)), style="yellow", markup=False, soft_wrap=True)


def _ask_card() -> str:
    if (size := _memory_of_gpu()) is None:
        return _choose("memory", {name: what for name, what in CARDS.items() if name != "here"}, "cpu")
    return _choose("memory", CARDS | {"here": f"{CARDS['here']}, {format_bytes(size)}"}, "here")


def _memory_of_gpu() -> int | None:
    """Return the bytes of this machine's GPU; None if it has none."""
    with loading():
        from hymba_tune.checkpoint import choose_device
        from hymba_tune.footprint import device_memory

    device = choose_device("auto")
    return device_memory(device) if device.type == "cuda" else None


def _ask_model(proposed: str) -> str:
    from hymba_tune.registry import find_local

    def read() -> str:
        name = _ask("model: a Hub id, hymba-nano, a folder, or a run", proposed)
        find_local(name)
        return name

    return _until_usable(read)


def _fitted(answers: Answers, settings: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Change settings until a run fits, and describe the memory that it needs.

    Raises:
        ConfigError: If none fits.
    """
    from hymba_tune.recipes.choosing import with_changes

    if answers.card == "here" and _memory_of_gpu() is None:
        raise ConfigError("--card here: this machine has no GPU.", expected=", ".join(CARDS), fix="--card cpu")
    try:
        estimate = _estimate(answers, settings)
        if estimate.change:
            settings = with_changes(settings, estimate.change)
            console.print(f" changed to fit: {estimate.change}", markup=False, soft_wrap=True)
            estimate = _estimate(answers, settings)
    except HubError as error:
        error_console.print(f" memory not checked: {error.what}", style="yellow", markup=False, soft_wrap=True)
        settings = with_changes(settings, UNCHECKED.get(answers.card or "", ""))
        return settings, "not checked: the Hub could not be reached; hymba-tune plan estimates it"
    if estimate.change is None:
        raise ConfigError(
            f"{answers.model} does not fit into {format_bytes(estimate.has)}, with no settings.",
            fix="a larger --card, or another --model",
        )
    needs = f"{format_bytes(estimate.needs)} of {format_bytes(estimate.has)}"
    return settings, f"{needs}, at most (estimated for rows of {settings['max_length']:,} tokens, not measured)"


def _estimate(answers: Answers, settings: Mapping[str, Any]) -> DeviceEstimate:
    with loading():
        from hymba_tune.plan import plan

    quiet_libraries()
    config = TrainingConfig.of(answers.verb or "").model_validate({**settings, "data": []})
    with RichScreen().working("estimating the memory"):
        planned = plan(config)
    if answers.card in ("here", "cpu"):
        return planned.here
    size = int((answers.card or "").removesuffix("gb")) * 2**30
    return next(gpu for gpu in planned.gpus if gpu.has == size)


def _show_next(out: Path, answers: Answers) -> None:
    verb = answers.verb or ""
    for label, line in (
        ("written", str(out)),
        ("train", command(verb, "--config", out)),
        ("try first", command(verb, "--config", out, "--dry-run")),
    ):
        console.print(f" {label:<10}{line}", markup=False, soft_wrap=True)
