"""The generated reference of the documentation site: nothing that the code has is missing from it."""

from __future__ import annotations

import re

import pytest

from hymba_tune import config
from hymba_tune.cli.main import VERBS
from hymba_tune.config import Config
from hymba_tune.recipes import packaged
from release.address import address
from website import links, reference
from website.environment import described, in_the_code
from website.settings import commands, prose

PAGES = reference.pages()


def page(name: str) -> str:
    return PAGES[f"reference/{name}.md"]


OTHER_NAMES = {
    ("chat", "prompts"): "`--from`",
    ("eval", "learn"): "`--score`",
    ("quantize", "learn"): "`--score`",
    **{(verb, "model"): "`MODEL`" for verb in ("eval", "serve", "quantize", "export")},
    ("merge", "model"): "`RUN`",
}
"""How a command calls a setting that does not have the name of its field."""


def test_every_command_has_a_page() -> None:
    assert reference.verbs() == list(VERBS)
    overview = page("index")
    assert all(f"`hymba-tune {' '.join(command.words)}`" in overview for command in commands())


def test_every_field_of_every_commands_settings_is_documented() -> None:
    for command in commands():
        words = " ".join(command.words)
        section = page(command.words[0]).split(f"# hymba-tune {words}\n")[1].split("# hymba-tune ")[0]
        for name, field in command.settings.model_fields.items() if command.settings else ():
            shown = OTHER_NAMES.get((words, name), f"`--{name.replace('_', '-')}`")
            lines = re.findall(rf"^\| {shown}.*$", section, re.M)
            assert len(lines) == 1, f"hymba-tune {words}: {shown}"
            assert prose(field.description or "")[:20] in lines[0] or (words, name) in OTHER_NAMES


def test_every_class_of_settings_belongs_to_a_documented_command() -> None:
    bases = {base for command in commands() if command.settings for base in command.settings.__mro__}
    own = [kind for kind in vars(config).values() if isinstance(kind, type) and issubclass(kind, Config)]
    assert {*own} <= bases


def test_types_bounds_and_defaults_are_shown() -> None:
    sft = page("sft")
    assert re.search(r"\| `--rank`{ #--rank } \| Rank .* \| whole number ≥ 1 \| `16` \| `rank` \|", sft)
    assert re.search(
        r"\| `--lora-dropout`{ #--lora-dropout } \| .* \| number ≥ 0, < 1 \| `0.0` \| `lora_dropout` \|", sft
    )
    assert re.search(r"\| `--method`{ #--method } \| .* \| `lora`, `dora`, `full` \| `lora` \| `method` \|", sft)
    assert re.search(r"\| `--out`{ #split--out } \| .* \| path \| required \|", page("data"))
    assert re.search(r"\| `FILES` \| .* \| text \|", page("data"))


def test_groups_are_those_of_help() -> None:
    assert [*re.findall("^## (.*)$", page("sft"), re.M)][:3] == ["Model", "Data", "Training"]


def test_every_packaged_recipe_is_shown() -> None:
    assert all(recipe.path.read_text(encoding="utf-8").strip() in page("packaged-recipes") for recipe in packaged())


def test_every_environment_variable_of_the_code_is_described() -> None:
    names = {name for variables in described().values() for name in variables} - {"TRITON_INTERPRET"}
    assert not in_the_code() - names, "describe them in website/environment.yaml, or name them in OTHERS"
    assert not names - in_the_code(), "the code no longer has them"


def test_public_modules_say_what_they_export() -> None:
    for module in reference.API:
        assert f"::: {module}\n" in page(module)


def test_navigation_has_every_page_of_the_reference() -> None:
    def flat(items: object) -> list[str]:
        values = items.values() if isinstance(items, dict) else items if isinstance(items, list) else ()
        return [items] if isinstance(items, str) else [name for item in values for name in flat(item)]

    assert flat(reference.navigation()) == list(PAGES)


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        ("how-to/serve.md", "../serving.md#metrics", "../serving.md#metrics"),
        ("data.md", "../CONTRIBUTING.md#the-rooms", "contributing.md#the-rooms"),
        ("how-to/serve.md", "../../README.md", "../index.md"),
        ("changelog.md", "docs/data.md", "data.md"),
        ("data.md", "https://arxiv.org/abs/2411.13676", "https://arxiv.org/abs/2411.13676"),
        ("performance.md", "../benchmarks/results", f"{address()}/tree/main/benchmarks/results"),
        ("data.md", "../Makefile", f"{address()}/blob/main/Makefile"),
    ],
)
def test_links_work_on_the_site_as_in_the_repository(page: str, link: str, expected: str) -> None:
    pages = {"index.md", "data.md", "serving.md", "how-to/serve.md", *links.COPIED.values()}
    assert links.for_the_site(f"See [it]({link}).", page, pages) == (f"See [it]({expected}).", [])


def test_links_that_lead_nowhere_are_found() -> None:
    broken = ["../benchmarks/nothing.py", "other.md", "../../outside.md"]
    text = " ".join(f"[x]({link})" for link in broken)
    assert links.for_the_site(text, "data.md", {"data.md"})[1] == broken
