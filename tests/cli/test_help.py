from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from cyclopts import App

from hymba_tune.cli.help import MOST
from hymba_tune.cli.main import VERBS, app
from hymba_tune.config import TrainingConfig
from hymba_tune.config.groups import FIRST
from tests.cli.conftest import Command

TITLES = ["Model", "Data", "Training", "Adapter", "Evaluation", "Run", "Computing", "Distributed"]
"""Groups of the flags of sft."""
NEEDED = {"--model", "--data", "--lr", "--epochs", "--batch-size", "--method", "--quantize", "--out", "--config"}
"""What every training needs."""
FLAG = re.compile(r"│ [ *]? {0,2}(--[\w-]+|(?!STR|PATH|INT|FLOAT|CHOICE)[A-Z]+)(?=[ │])")
"""The beginning of a line of a panel that has the name of a flag or an argument."""


def verbs(app: App, *path: str) -> Iterator[tuple[str, App]]:
    """Yields every verb that does something, with those below others."""
    for name in app:
        if not name.startswith("-"):
            if app[name].default_command:
                yield " ".join((*path, name)), app[name]
            yield from verbs(app[name], *path, name)


ALL_VERBS = dict(verbs(app))


def names(verb: str) -> set[str]:
    """The name of every flag and argument of a verb."""
    arguments = [argument for argument in ALL_VERBS[verb].assemble_argument_collection() if argument.show]
    return {one.name if one.index is None else one.name.strip("-").upper() for one in arguments}


def shown_names(help_text: str) -> set[str]:
    """The names of the flags and arguments that the panels of a help show."""
    flags = re.sub("╭─ Commands.*?╰", "", help_text, flags=re.DOTALL)
    return {match[1] for line in flags.splitlines() if (match := FLAG.match(line))}


@pytest.mark.parametrize("verb", ALL_VERBS)
def test_help_of_every_verb_has_at_most_twenty_flags_an_example_and_the_number_of_the_others(
    verb: str, command: Command
) -> None:
    shown = command(*verb.split(), "--help").out
    text, known, found = " ".join(shown.split()), names(verb), shown_names(shown)
    assert VERBS.get(verb, "Example: ") in text
    assert f"Example: hymba-tune {verb.removesuffix(' list')}" in text
    assert found <= known
    assert len(found) in range(min(1, len(known)), MOST + 1)
    more = f"{len(known - found)} more flags: hymba-tune {verb} --help-all"
    assert shown.splitlines()[-1] == more if known - found else "more flags" not in shown
    if verb in TrainingConfig.by_verb():
        assert found >= NEEDED


@pytest.mark.parametrize("verb", ["distill", "grpo", "eval"])
def test_all_flags_are_shown_unbroken_on_60_columns(
    verb: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    whole = command(verb, "--help-all").out
    assert shown_names(whole) == names(verb)
    assert max(map(len, whole.splitlines())) <= 60
    assert "more flags" not in whole


def test_every_flag_of_every_verb_stands_in_a_group() -> None:
    """Those of function parameters as well, which no class of settings groups."""
    groups_by_flag = {
        f"{path} {argument.name}": [group.name for group in argument.parameter.group if group != FIRST]
        for path, verb in ALL_VERBS.items()
        for argument in verb.assemble_argument_collection()
        if argument.index is None and argument.show
    }
    assert {
        name: groups for name, groups in groups_by_flag.items() if len(groups) != 1 or groups == ["Parameters"]
    } == {}
    assert {groups[0] for name, groups in groups_by_flag.items() if name.startswith("sft ")} == {*TITLES}
    # Settings that a verb changes stay where they are.
    assert (groups_by_flag["dpo --lr"], groups_by_flag["eval --score"], groups_by_flag["merge --dtype"]) == (
        ["Training"],
        ["Data"],
        ["Computing"],
    )


def test_help_begins_with_what_is_needed_first(command: Command) -> None:
    assert re.findall(r"╭─ (\w+) ─", command("sft", "--help-all").out) == TITLES
    assert re.findall(r"╭─ (\w+) ─", command("sft", "--help").out) == TITLES[:-2]


def test_a_misspelt_flag_finds_one_that_help_does_not_show(command: Command) -> None:
    assert "--rslora" not in command("sft", "--help").out
    assert command("sft", "--rsloar").err == "Unknown option: --rsloar. Did you mean --rslora?\n"


def test_a_plan_takes_the_flags_of_a_run() -> None:
    words = ["plan", "--data", "demo", "--out", "x", "--resume", "x", "--dry-run", "--overwrite"]
    _, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
    assert bound.arguments["flags"].data == ["demo"]


def test_help_names_the_verbs_and_something_to_try(command: Command) -> None:
    for words in ([], ["--help"]):
        result = command(*words)
        assert result.code == 0
        assert all(verb in result.out for verb in ("sft", "chat", "merge"))
        assert "Try it: hymba-tune demo" in result.out


def test_help_is_also_a_verb(command: Command) -> None:
    assert command("help").out == command("--help").out
    assert command("help", "sft").out == command("sft", "help").out == command("sft", "--help").out
