"""Texts that must follow a grammar, with the packaged tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hymba_tune.checkpoint import load_tokenizer, load_weights
from hymba_tune.errors import DataError
from hymba_tune.generate import Decoder, Generation, Grammars, Sampling, generate_texts
from hymba_tune.generate.choosing import Chooser
from hymba_tune.generate.constraints import json_rule
from hymba_tune.registry import resolve_model

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"enum": ["Ann", "Bob"]}, "age": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def json_grammar(schema: dict[str, Any]) -> str:
    return f"%llguidance {{}}\nstart: {json_rule(schema)}"


@pytest.fixture(scope="module")
def tokenizer(small_model: Path) -> Any:
    return load_tokenizer(small_model)


@pytest.fixture(scope="module")
def grammars(tokenizer: Any) -> Grammars:
    return Grammars(tokenizer)


@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_any_model_writes_json_of_the_schema(
    small_model: Path, tokenizer: Any, grammars: Grammars, temperature: float
) -> None:
    """The model is a random one."""
    model = load_weights(resolve_model(str(small_model)), dtype=torch.float32, device=torch.device("cpu")).eval()
    constraint = grammars.lark(json_grammar(SCHEMA))
    generations = [
        Generation([5, 6, 7], 100, Sampling(temperature, seed=seed), constraint=constraint.copy()) for seed in range(3)
    ]
    for one in generate_texts(model, tokenizer, generations, batch_size=2):
        value = json.loads(one.text(tokenizer))
        assert value.keys() == {"name", "age"}
        assert value["name"] in ("Ann", "Bob")
        assert 1 <= value["age"] <= 99
        assert one.finish_reason == "stop"


def test_white_space_is_limited(grammars: Grammars) -> None:
    assert grammars.lark(json_grammar(SCHEMA)).skip(grammars.tokens('{"name":\n  "Ann"'))
    assert not grammars.lark(json_grammar(SCHEMA)).skip(grammars.tokens('{"name":' + " " * 20))


def test_a_model_wider_than_its_tokenizer_writes_its_tokens_only(grammars: Grammars, tokenizer: Any) -> None:
    vocabulary = len(tokenizer) + 77
    constrained, free = Generation([5], 1, constraint=grammars.lark(json_grammar(SCHEMA))), Generation([5], 1)
    logits = torch.zeros(2, vocabulary)
    logits[:, -1] = 1.0
    chooser = Chooser()
    chooser.join([constrained, free], logits, 2)
    needs = chooser.prepare([constrained, free])
    choices = chooser.read(chooser.choose(logits, needs), [constrained, free], needs)
    assert tokenizer.decode([choices[0].token]).startswith("{")
    assert choices[1].token == vocabulary - 1


def test_a_constraint_that_fails_ends_its_text_only(small_model: Path, tokenizer: Any) -> None:
    class Failing:
        def allowed(self) -> bytes:
            raise DataError("too much to compute")

    model = load_weights(resolve_model(str(small_model)), dtype=torch.float32, device=torch.device("cpu")).eval()
    failing: Any = Failing()
    generations = [Generation([5, 6], 3, constraint=failing), Generation([5, 6], 3), Generation([5, 6], 3)]
    Decoder(model, tokenizer).add(generations[:2])
    list(generate_texts(model, tokenizer, generations[2:], batch_size=1))
    assert str(generations[0].error) == "too much to compute"
    assert generations[0].ids == []
    assert generations[1].ids == generations[2].ids[:1]


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ({"type": "objekt"}, "Invalid type: objekt"),
        ({"unevaluatedProperties": 3}, "Unimplemented keys"),
        ({"$ref": "https://example.com/schema"}, "Default retriever does not fetch resources"),
        ({"type": "string", "pattern": "(?=a)b"}, "regex parse error"),
    ],
)
def test_a_schema_that_cannot_be_enforced_is_refused(grammars: Grammars, schema: Any, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        grammars.lark(json_grammar(schema))


def test_a_schema_without_end_is_refused(grammars: Grammars) -> None:
    schema: dict[str, Any] = {}
    for _ in range(100_000):
        schema = {"not": schema}
    with pytest.raises(DataError, match="the schema is nested too deeply"):
        grammars.lark(json_grammar(schema))


def test_a_token_outside_the_grammar_is_an_error(grammars: Grammars) -> None:
    constraint = grammars.lark(json_grammar(SCHEMA))
    with pytest.raises(DataError, match="The text cannot follow its grammar"):
        constraint.accept(5)
