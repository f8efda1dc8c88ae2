"""The JSON Schema of recipes, for editors: made from the classes of settings, so that both have the same keys."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic.json_schema import JsonSchemaMode, models_json_schema
from pydantic_core import to_jsonable_python

from hymba_tune.config import TrainingConfig
from hymba_tune.config.base import MAX_NUMBER

DIALECT = "http://json-schema.org/draft-07/schema#"
"""The dialect that every editor knows."""
SCHEMA_FILE = "hymba-recipe.schema.json"
"""The packaged file with the schema."""
SAID_OTHERWISE = ("title", "default", "description")
Schema = dict[str, Any]


def recipe_schema() -> dict[str, Any]:
    """Return the JSON Schema of recipes.

    It has the keys of each verb that trains, with their types, choices, bounds, defaults and descriptions. Rules
    between settings are not in it; `hymba-tune recipes validate` checks those too.
    """
    kinds = TrainingConfig.by_verb()
    models: list[tuple[type[BaseModel], JsonSchemaMode]] = [(kind, "validation") for kind in kinds.values()]
    _, made = models_json_schema(models, ref_template="{model}")
    settings = {verb: _settings(kind, made["$defs"]) for verb, kind in kinds.items()}
    verb = {"description": "The command that the recipe is for.", "enum": [*kinds]}
    names = {verb: f"hymba-tune-{verb}" for verb in kinds}
    return {
        "$schema": DIALECT,
        "title": "Recipe of hymba-tune",
        "description": "Settings of a run, for --config. Flags of the command override them.",
        "type": "object",
        "properties": {"verb": verb},
        "allOf": [
            *({"if": _has_verb(verb), "then": _reference(name)} for verb, name in names.items()),
            {"if": {"not": {"required": ["verb"]}}, "then": {"anyOf": [*map(_reference, names.values())]}},
        ],
        "definitions": {names[verb]: _of_verb(verb, settings) for verb in kinds} | _shared(settings),
    }


def _reference(name: str) -> Schema:
    return {"$ref": f"#/definitions/{name}"}


def _has_verb(verb: str) -> Schema:
    return {"required": ["verb"], "properties": {"verb": {"const": verb}}}


def _of_verb(verb: str, settings: dict[str, dict[str, Schema]]) -> Schema:
    """Return the schema of a verb's recipes, which names settings that other verbs have as well."""
    shared = _shared(settings)
    properties = {name: _reference(name) if shared.get(name) == one else one for name, one in settings[verb].items()}
    return {"type": "object", "properties": {"verb": {"const": verb}} | properties, "additionalProperties": False}


def _shared(settings: dict[str, dict[str, Schema]]) -> dict[str, Schema]:
    """Return the settings that verbs share, as the first verb has them."""
    first: dict[str, Schema] = {}
    for properties in settings.values():
        first = properties | first
    return {name: one for name, one in first.items() if sum(name in properties for properties in settings.values()) > 1}


def _settings(kind: type[TrainingConfig], definitions: dict[str, Schema]) -> dict[str, Schema]:
    """Return the schema of each setting of a verb."""
    properties = definitions[kind.__name__]["properties"]
    return {name: _complete(properties[name], field, definitions) for name, field in kind.model_fields.items()}


def _complete(schema: Schema, field: FieldInfo, definitions: dict[str, Schema]) -> Schema:
    default = field.get_default(call_default_factory=True)
    description = " ".join((field.description or "").split())
    complete: Schema = {"description": description, "default": to_jsonable_python(default)}
    return {**complete, **_inlined(schema, definitions)}


def _inlined(schema: Any, definitions: dict[str, Schema]) -> Any:
    """Return a schema with the choices that it refers to written out, and with a bound on every number."""
    if isinstance(schema, list):
        return [_inlined(one, definitions) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return {key: definitions[schema["$ref"]][key] for key in ("type", "enum")}
    written = {key: _inlined(one, definitions) for key, one in schema.items() if key not in SAID_OTHERWISE}
    if written.get("type") in ("integer", "number") and "exclusiveMaximum" not in written:
        written.setdefault("maximum", MAX_NUMBER)
    return written
