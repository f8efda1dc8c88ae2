"""Chooses the settings of a new recipe from its data and the memory that there is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hymba_tune.data.summary import DataSummary
from hymba_tune.files import read_yaml
from hymba_tune.recipes import packaged
from hymba_tune.registry import NANO

RECIPES = {
    "sft": "sft_lora",
    "dpo": "dpo_lora",
    "kto": "kto",
    "orpo": "orpo_lora",
    "reward": "reward_lora",
    "grpo": "grpo_lora",
    "distill": "distill_llama3",
}
"""The packaged recipe that a new one of a verb begins with."""
TOKEN_BYTES = 2
"""Bytes of text in a token, at least, in most texts."""
LENGTHS = (512, 1024, 2048, 4096, 8192)
UNTUNED = ("epochs", "gradient_checkpointing", "grad_accum")
"""Settings for the released model that the packaged one takes its own defaults for."""


@dataclass(frozen=True)
class RecipeWish:
    """What a new recipe is for.

    Attributes:
        verb: The verb.
        data: Its data, by the names that the user gave.
        model: The model.
        teacher: The teacher of a distillation.
        reward: The reward of grpo.
    """

    verb: str
    data: Sequence[str]
    model: str
    teacher: str | None = None
    reward: str | None = None


def usual_model(verb: str, *, on_cpu: bool) -> str:
    """Return the model that a new recipe proposes: the packaged one on a CPU."""
    return NANO if on_cpu else str(_recipe(verb)["model"])


def first_settings(wish: RecipeWish, summary: DataSummary) -> dict[str, Any]:
    """Return the settings of a new recipe, before its memory is known.

    Args:
        wish: What it is for.
        summary: What its data holds.
    """
    settings = _recipe(wish.verb)
    if wish.model == NANO:
        settings = {name: value for name, value in settings.items() if name not in UNTUNED}
    first: dict[str, Any] = {"data": list(wish.data)}
    if summary.mapping:
        first["map"] = list(summary.mapping)
    if summary.bad_rows:
        first["on_bad_row"] = "skip"
    settings = first | settings | {"model": wish.model}
    tokens = summary.row_bytes / TOKEN_BYTES + settings.get("max_new_tokens", 0)
    settings["max_length"] = next((length for length in LENGTHS if length >= tokens), LENGTHS[-1])
    if wish.verb == "distill" and wish.teacher:
        settings["teacher"] = wish.teacher
    if wish.verb == "grpo":
        settings["reward"] = [wish.reward or ("gsm8k" if summary.marked else "exact")]
    return settings


def with_changes(settings: Mapping[str, Any], flags: str) -> dict[str, Any]:
    """Return settings changed by the flags that a plan proposes: ``--batch-size 4 --gradient-checkpointing``."""
    changed = dict(settings)
    name = ""
    for word in flags.split():
        name = word.removeprefix("--").replace("-", "_") if word.startswith("--") else name
        changed[name] = True if word.startswith("--") else int(word) if word.isdecimal() else word
    return changed


def _recipe(verb: str) -> dict[str, Any]:
    path = next(recipe.path for recipe in packaged() if recipe.name == RECIPES[verb])
    settings: dict[str, Any] = read_yaml(path)
    del settings["verb"]
    settings.pop("lr", None)  # the default is the same, and depends on the size of the model
    return settings
