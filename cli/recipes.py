"""`hymba-tune recipes`."""

from __future__ import annotations

from pathlib import Path

from cyclopts import App
from rich.table import Table
from rich.text import Text

from hymba_tune.cli.screen import HELP_FLAGS, console
from hymba_tune.cli.settings import Overwrite, combine_for, find_recipe
from hymba_tune.config import SFTConfig
from hymba_tune.errors import command
from hymba_tune.files import check_file, write_errors, write_text
from hymba_tune.recipes import packaged

recipes = App(
    name="recipes",
    help_flags=HELP_FLAGS,
    help="List the packaged recipes, show or copy one, or check one of your own.\n\n"
    "Example: hymba-tune recipes copy sft_lora my.yaml",
)


@recipes.default
def list_recipes() -> None:
    """List the packaged recipes.

    Example: hymba-tune recipes
    """
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for recipe in packaged():
        memory = Text(f" ({recipe.memory})", style="dim")
        table.add_row(f" {recipe.name}", Text(recipe.what).append(memory))
    console.print(table)
    console.print("\n use one   hymba-tune VERB --config NAME --data FILE (the recipe names its VERB)", markup=False)
    console.print(" see one   hymba-tune recipes show NAME\n copy one  hymba-tune recipes copy NAME", markup=False)


recipes.command(list_recipes, name="list")


@recipes.command
def show(name: str) -> None:
    """Print a recipe.

    Example: hymba-tune recipes show sft_lora

    Parameters
    ----------
    name
        The name of a packaged recipe, or a file.
    """
    console.print(find_recipe(name).read_text(encoding="utf-8").rstrip(), markup=False, soft_wrap=True)


@recipes.command
def copy(name: str, file: Path | None = None, *, overwrite: Overwrite = False) -> None:
    """Copy a recipe so that you can change it.

    Example: hymba-tune recipes copy sft_lora my.yaml

    Parameters
    ----------
    name
        The name of a packaged recipe.
    file
        The file to write (default: NAME.yaml in the current directory).
    overwrite
        Replace a file that exists.
    """
    source = find_recipe(name)
    target = file or Path(source.name)
    if target.is_dir():
        target = target / source.name
    check_file("FILE", target, overwrite=overwrite, inputs=[source])
    with write_errors("FILE", target):
        write_text(target, source.read_text(encoding="utf-8"), overwrite=overwrite)
    check = command("recipes", "validate", target)
    console.print(f" copied to {target}\n check it  {check}", markup=False, soft_wrap=True)


@recipes.command
def validate(file: str) -> None:
    """Check the keys and values of a recipe.

    Example: hymba-tune recipes validate my.yaml

    Parameters
    ----------
    file
        A YAML file, or the name of a packaged recipe.
    """
    settings = combine_for(file, SFTConfig(), None)
    console.print(f" {file} is well-formed: {len(settings.model_fields_set)} settings.", markup=False)
    console.print(f" use it    {command(settings.verb, '--config', file)}", markup=False, soft_wrap=True)
