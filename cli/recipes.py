"""`hymba-tune recipes`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from hymba_tune.cli.screen import HELP_FLAGS, console
from hymba_tune.cli.settings import Overwrite, RecipeName, combine_for, find_recipe
from hymba_tune.config import SFTConfig
from hymba_tune.config.groups import RESULT
from hymba_tune.errors import ConfigError, command, nearest
from hymba_tune.files import check_file, write_errors, write_text
from hymba_tune.recipes import packaged

recipes = App(
    name="recipes",
    help_flags=HELP_FLAGS,
    help="List the packaged recipes, show or copy one, or check one of your own.\n\n"
    "Example: hymba-tune recipes copy sft_lora my.yaml",
)


@recipes.default
def list_recipes(*names: RecipeName, schema: Annotated[bool, Parameter(negative="", group=RESULT)] = False) -> None:
    """List the packaged recipes: what each is for, its memory and data, and its command. Or print the named ones.

    Example: hymba-tune recipes sft_lora

    For editors: hymba-tune recipes --schema > hymba-recipe.schema.json

    Parameters
    ----------
    names
        Packaged recipes or files to print.
    schema
        Print the JSON Schema of recipes, with which editors complete and check them.
    """
    if schema:
        from hymba_tune.recipes.schema import recipe_schema

        console.print(json.dumps(recipe_schema(), indent=1, ensure_ascii=False), markup=False, soft_wrap=True)
    elif not names:
        _list()
    for name in names:
        try:
            show(name)
        except ConfigError as error:
            if verb := nearest(name, [verb for verb in recipes if not verb.startswith("-")]):
                raise ConfigError(error.what, fix=command("recipes", verb, *names[1:])) from error
            raise


def _list() -> None:
    for recipe in packaged():
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        table.add_row("  memory", Text(recipe.memory))
        table.add_row("  data", Text(recipe.data))
        console.print(Text(f" {recipe.name}", style="bold"))
        console.print(Padding(Text(f"{recipe.what}."), (0, 0, 0, 2)))
        console.print(table)
        console.print(f"  {recipe.command}\n", markup=False, soft_wrap=True)
    console.print(" see one   hymba-tune recipes NAME\n copy one  hymba-tune recipes copy NAME my.yaml", markup=False)
    console.print(" your own  hymba-tune init", markup=False)


recipes.command(list_recipes, name="list")


@recipes.command
def show(name: RecipeName) -> None:
    """Print a recipe.

    Example: hymba-tune recipes show sft_lora

    Parameters
    ----------
    name
        The name of a packaged recipe, or a file.
    """
    console.print(find_recipe(name).read_text(encoding="utf-8").rstrip(), markup=False, soft_wrap=True)


@recipes.command
def copy(name: RecipeName, file: Path | None = None, *, overwrite: Overwrite = False) -> None:
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
def validate(file: RecipeName) -> None:
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
