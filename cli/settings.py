"""Reading settings: a recipe, overridden by flags."""

from __future__ import annotations

import re
import reprlib
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, TypeVar

from cyclopts import Parameter
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from rich.status import Status
from rich.text import Text

from hymba_tune.cli.other_tools import nearest_value, other_flag
from hymba_tune.cli.screen import error_console
from hymba_tune.config import Config, TrainingConfig
from hymba_tune.config.groups import FIRST, RESULT, RUN
from hymba_tune.errors import ConfigError, command, did_you_mean, shortened

C = TypeVar("C", bound=Config)
RecipeName = Annotated[str, Parameter(completer=lambda context: recipes_and_files(context.incomplete))]
Recipe = Annotated[RecipeName | None, Parameter(group=(RUN, FIRST))]
AsJson = Annotated[bool, Parameter(name="--json", negative="", group=(RESULT, FIRST))]
Overwrite = Annotated[bool, Parameter(negative="", group=RESULT)]
PACKAGED = Path(str(resources.files("hymba_tune.recipes")))
"""The folder of the packaged recipes."""
CHOICES = ("enum", "literal_error")
"""Kinds of errors of settings that have a few values."""
LIMITS = {
    "greater_than_equal": "must be at least {ge:g}",
    "greater_than": "must be more than {gt:g}",
    "less_than_equal": "must be at most {le:g}",
    "less_than": "must be less than {lt:g}",
    "enum": "must be {expected}",
    "literal_error": "must be {expected}",
    "int_parsing_size": "must be a whole number, and a smaller one",
    "finite_number": "must be a finite number",
    "string_type": 'must be text, in "quotes"',
    "string_pattern_mismatch": "must be auto, cpu, cuda or cuda:1; other kinds of devices are not supported",
    "path_type": "must be the name of a file or folder",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
    "bool_parsing": "must be true or false",
    "list_type": "must be a list, [in, brackets]",
    "missing": "is missing",
}


def combine(recipe: str | None, flags: C) -> C:
    """Return the recipe's settings, overridden by the flags.

    Args:
        recipe: A YAML file, or the name of a packaged recipe.
        flags: The flags. Those that were set explicitly override the recipe.

    Raises:
        ConfigError: If the recipe cannot be read or is for another verb, or a setting is unknown or out of range.
    """
    if recipe is None:
        return flags
    path = find_recipe(recipe)
    settings = read_recipe(path)
    own = flags.verb.name if isinstance(flags, TrainingConfig) else None
    if (verb := settings.pop("verb", own)) != own:
        verb = shortened(str(verb))
        raise ConfigError(f"The recipe {recipe} is for hymba-tune {verb}.", fix=command(verb, "--config", recipe))
    known = type(flags).model_fields
    for key in settings:
        if key not in known:
            flags_of_keys = {f"--{name.replace('_', '-')}": name for name in known}
            flag, _, value = other_flag(str(key), flags_of_keys).partition(" ")
            own = f"{flags_of_keys[flag]}: {value or '…'}" if flag else ""
            fix = own or did_you_mean(str(key), known) or "remove it"
            raise ConfigError(f"{recipe}: there is no setting {reprlib.repr(key)}.", fix=fix)
    settings |= flags.given()
    try:
        return type(flags).model_validate(settings)
    except ValidationError as error:
        raise ConfigError(f"{recipe}: {explain(error)}") from error


def checking() -> Status:
    """Show on a terminal that settings are being checked, before the imports that this takes."""
    return error_console.status(Text("checking the settings", style="dim"))


def check_first(config: Config) -> None:
    """Check what can be checked without a download and without importing torch, for verbs that load a model.

    Raises:
        HymbaTuneError: If the settings cannot be used, or a file or model that they name does not exist.
    """
    from hymba_tune.inputs import check_inputs

    with checking():
        check_inputs(config)


def combine_for(recipe: str | None, flags: TrainingConfig, verb: str | None) -> TrainingConfig:
    """Return the settings as `combine` does, for the recipe's own verb.

    Args:
        recipe: A YAML file, or the name of a packaged recipe.
        flags: The flags. Those that were set explicitly override the recipe.
        verb: The verb of the settings. When None, the recipe's verb, or that of the flags.

    Raises:
        ConfigError: If `combine` raises it, or if there is no such verb, or it has no such setting.
    """
    try:
        own = TrainingConfig.of(verb or (recipe and read_recipe(find_recipe(recipe)).get("verb")) or flags.verb.name)
        return combine(recipe, own.model_validate(flags.given()))
    except ValidationError as error:
        raise ConfigError(explain(error)) from error
    except ValueError as error:
        raise ConfigError(f"{error}.") from error


def explain(error: ValidationError) -> str:
    """Describe each invalid setting in a line: ``--rank 0: must be at least 1 (common: 8 to 64)``."""
    fields = next(kind.model_fields for kind in Config.kinds() if kind.__name__ in error.title)
    return "\n".join(_explain_one(dict(problem), fields) for problem in error.errors())


def _explain_one(problem: dict[str, Any], fields: dict[str, FieldInfo]) -> str:
    limit = LIMITS.get(problem["type"], "")
    reason = limit.format(**problem.get("ctx", {})) if limit else problem["msg"].removeprefix("Value error, ")
    reason = shortened(reason, 400)
    if not problem["loc"]:
        name, colon, rest = str(reason).partition(":")
        return f"--{name.replace('_', '-')}:{rest}" if name in fields else f"{name}{colon}{rest}"
    field = str(problem["loc"][0])
    flag = "--" + field.replace("_", "-")
    common = re.search(r" \(common: .*?\)", fields[field].description or "") if field in fields else None
    values = problem["input"] if isinstance(problem["input"], list) else [problem["input"]]
    value = "" if problem["type"] == "missing" else f" {shortened(' '.join(map(_shown, values[:9])))}"
    near = nearest_value(str(problem["input"]), re.findall("'(.+?)'", reason)) if problem["type"] in CHOICES else ""
    meant = f"\n  {'to fix':<10} {flag} {near}" if near else ""
    return f"{flag}{value}: {reason}{common[0] if common else ''}.{meant}"


def _shown(value: Any) -> str:
    return str(value) if isinstance(value, str | Path) else reprlib.repr(value)


def recipe_names() -> list[str]:
    """Return the names of the packaged recipes."""
    return sorted(file.stem for file in PACKAGED.glob("*.yaml"))


def recipes_and_files(beginning: str) -> list[str]:
    """Return what a shell may complete the beginning of a recipe's name to."""
    found = [*Path().glob(f"{beginning}*")] if beginning and not Path(beginning).is_absolute() else []
    folders = [f"{path}/" for path in found if path.is_dir()]
    return [*recipe_names(), *folders, *(str(path) for path in found if path.suffix in (".yaml", ".yml"))]


def find_recipe(recipe: str) -> Path:
    """Return the file of a recipe, given as a file or by the name of a packaged recipe.

    Raises:
        ConfigError: If there is no such recipe.
    """
    path = Path(recipe).expanduser()
    if path.is_file():
        return path
    names = recipe_names()
    if path.stem in names and path.parent == Path():
        return PACKAGED / f"{path.stem}.yaml"
    files = [str(file) for file in path.parent.glob("*.yaml")] if path.suffix else []
    raise ConfigError(
        f"There is no recipe {recipe}.",
        expected=f"a YAML file, or a packaged recipe: {', '.join(names)}",
        fix=did_you_mean(str(path), files) or did_you_mean(path.stem, names) or "hymba-tune recipes lists them",
    )


def read_recipe(path: Path) -> dict[str, Any]:
    """Return the settings in a recipe's file.

    Raises:
        ConfigError: If it cannot be read.
    """
    from hymba_tune.files import read_yaml  # most commands have no recipe

    try:
        settings = read_yaml(path)
    except ValueError as error:
        raise ConfigError(f"{path} cannot be read: {error}", expected="YAML with one setting a line") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} holds a {type(settings).__name__}.", expected="YAML with one setting a line")
    return settings
