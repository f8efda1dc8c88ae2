"""Flags and recipes with values that no command can use."""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic.fields import FieldInfo

from hymba_tune.config import TrainingConfig
from tests.hostile.trying import Attempt, check

pytestmark = pytest.mark.end_to_end

NO_NUMBERS = ("nan", "inf", "-1", "abc")
LONG = "x" * 300


def kinds_of(field: FieldInfo) -> tuple[Any, ...]:
    """The types that a setting may have."""
    annotation = field.annotation
    return (
        tuple(one for one in get_args(annotation) if one is not type(None)) if get_args(annotation) else (annotation,)
    )


def is_number(field: FieldInfo) -> bool:
    return any(kind in (int, float) for kind in kinds_of(field)) and get_origin(field.annotation) is not list


def is_choice(field: FieldInfo) -> bool:
    annotated = field.annotation
    return get_origin(annotated) is Literal or any(
        get_origin(kind) is Literal or (isinstance(kind, type) and issubclass(kind, Enum)) for kind in kinds_of(field)
    )


def bad_flags() -> Iterator[tuple[str, Attempt]]:
    """Every number and choice of every training verb, with values that are none."""
    seen: set[str] = set()
    for verb, config in TrainingConfig.by_verb().items():
        for name, field in config.model_fields.items():
            if name in seen:
                continue
            seen.add(name)
            flag = f"--{name.replace('_', '-')}"
            values = NO_NUMBERS if is_number(field) else ("nonsense", LONG) if is_choice(field) else ()
            for value in values:
                words = [verb, "--data", "missing.jsonl", f"{flag}={value}"]
                yield f"{verb} {flag}={value[:20]}", Attempt(words, re.escape(flag))


def test_settings_that_no_run_can_use(capsys: pytest.CaptureFixture[str]) -> None:
    attempts = list(bad_flags())
    assert len(attempts) >= 150
    check(attempts, capsys)


NANO = ("--data", "demo", "--model", "hymba-nano")
OTHER_FLAGS = {
    "sft --epochs inf": "--epochs",
    "sft --weights 1e308 --weights 1e308": "--weights",
    "sft --weights 0": "--weights",
    "sft --weights nan": "--weights",
    "sft --device mps": "--device",
    "sft --device cuda:99": "--device",
    "sft --device ''": "--device",
    "sft --kernels scan=magic": "--kernels",
    "sft --kernels magic": "--kernels",
    "sft --map a": "--map",
    "sft --targets nothing_like_it": "--targets|nothing_like_it",
    "sft --caps 0": "--caps",
    "sft --track nobody": "--track",
    "sft --answers perhaps": "--answers",
    "sft --learn everything": "--learn",
    f"sft --out {LONG}": "--out",
    f"plan --model ./{LONG}": "--model|name",
    f"sft --chat-template {LONG}.jinja": "--chat-template",
    f"sft --config {LONG}.yaml": "name too long",
    f"sft --resume {LONG}": "run|name",
    "sft --nonsense 1": "--nonsense",
    "sft nonsense": "nonsense",
    "nonsense": "nonsense",
    "chat": "(?i)model|run",
    f"chat {LONG}": "(?i)no such|not found|cannot|neither|name",
    "chat hymba-nano --temperature -1 --prompt a": "--temperature",
    "chat hymba-nano --temperature nan --prompt a": "--temperature",
    "chat hymba-nano --top-p 0 --prompt a": "--top-p",
    "chat hymba-nano --top-p 2 --prompt a": "--top-p",
    "chat hymba-nano --max-new-tokens 0 --prompt a": "--max-new-tokens",
    "chat hymba-nano --max-new-tokens -5 --prompt a": "--max-new-tokens",
    "chat hymba-nano --from missing.jsonl --to out.jsonl": "missing.jsonl",
    "chat hymba-nano --device mps --prompt a": "--device",
    "chat hymba-nano --model other --prompt a": "given twice",
    "eval hymba-nano --model other --data demo": "--model",
    "serve hymba-nano --model other": "--model",
    "quantize hymba-nano --model other": "--model",
    f"serve hymba-nano --host {LONG}": "--host",
    "serve hymba-nano --host no.such.host.invalid": "--host",
    "serve hymba-nano --port 99999": "--port",
    "serve hymba-nano --port -1": "--port",
    "serve hymba-nano --port abc": "--port",
    "serve hymba-nano --max-batch 0": "--max-batch|max-batch",
    "eval hymba-nano": "--data",
    "eval hymba-nano --data missing.jsonl": "missing.jsonl",
    "eval hymba-nano --data demo --max-rows 0": "--max-rows",
    "quantize hymba-nano --scheme nf3": "--scheme",
    "quantize": "(?i)model|run",
    "merge missing --out new": "missing",
    "merge hymba-nano --out out": "(?i)adapter|merge",
    "export missing --out out": "missing",
    "report missing": "missing",
    "plan --recipe missing": "missing",
    "plan --batch-size 0": "--batch-size",
    "data check missing.jsonl": "missing.jsonl",
    f"data check {LONG}.jsonl": "(?i)cannot|name",
    "data split missing.jsonl --out new": "missing.jsonl",
    "data convert missing.jsonl --to messages --out o.jsonl": "missing.jsonl",
    "data convert demo --to nonsense --out o.jsonl": "--to",
    "data preview missing.jsonl": "missing.jsonl",
    "distill --teacher missing --data demo": "missing",
    "distill --teacher http://user:secret@host:99999/v1 --data demo": "(?i)teacher",
    "distill --teacher file:///etc/passwd --data demo": "(?i)teacher|file",
    "recipes nonsense": "nonsense",
    "doctor nonsense": "nonsense",
}


def test_other_flags_that_no_command_can_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    attempts = []
    for line, says in OTHER_FLAGS.items():
        words = [word if word != "''" else "" for word in line.split(" ")]
        more = [*NANO, *words[1:]] if words[0] == "sft" and len(words) > 2 else words[1:]
        attempts.append((line[:60], Attempt([words[0], *more], says)))
    check(attempts, capsys)
    assert not list(tmp_path.iterdir())


DEEP = "[" * 5000 + "]" * 5000
LAUGHS = "\n".join(
    ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
)
RECIPES: dict[str, str | bytes] = {
    "empty list": "[]",
    "a text": "hello",
    "a number": "3",
    "date as steps": "steps: 2024-01-01",
    "date as out": "lr: 2024-01-01 10:00:00",
    "date as key": "2024-01-01: 3",
    "number as key": "3: steps",
    "null as key": "~: steps",
    "list as key": "[1, 2]: steps",
    "mapping as value": "steps: {a: 1}",
    "list as value": "steps: [1, 2]",
    "text as number": "steps: many",
    "yes as number": "lr: yes",
    "nan": "lr: .nan",
    "infinity": "epochs: .inf",
    "minus infinity": "lr: -.inf",
    "exponent without a dot": "lr: 1e-4x",
    "sexagesimal": "steps: 1:30:x",
    "binary": "model: !!binary aGVsbG//",
    "python object": "model: !!python/object/apply:os.system ['true']",
    "python name": "model: !!python/name:os.system",
    "unknown tag": "model: !nonsense x",
    "undefined alias": "steps: *nobody",
    "alias to itself": "data: &a [*a]",
    "merge key": "<<: 3",
    "duplicate keys": "steps: 3\nsteps: 4",
    "tab": "steps:\t3\n\tlr: 3",
    "unclosed quote": "model: 'abc",
    "unclosed bracket": "data: [a",
    "bad indentation": "steps: 3\n  lr: 3",
    "two documents": "steps: 3\n---\nsteps: 4",
    "control character": "model: a\x00b",
    "escape sequence": 'learn: "\\e[31mred"',
    "not UTF-8": b"model: \xff\xfe\xfa",
    "UTF-16": "steps: x".encode("utf-16"),
    "unknown setting": "stepss: 3",
    "very long unknown setting": "x" * 5000 + ": 3",
    "very long value": "learn: " + "x" * 100_000,
    "5,000 levels": f"data: {DEEP}",
    "5,000 levels of mappings": "data: " + "{a: " * 5000 + "1" + "}" * 5000,
    "billion laughs": LAUGHS,
    "billion laughs as a setting": LAUGHS.replace("a11:", "data:"),
    "verb of nobody": "verb: nonsense",
    "verb as a list": "verb: [sft]",
    "verb of another command": "verb: dpo",
    "huge number": "steps: " + "9" * 400,
    "huge integer": "seed: " + "9" * 5000,
    "negative": "batch_size: -3",
    "fraction": "batch_size: 2.5",
    "bool as text": "packing: perhaps",
    "number as path": "out: 3.5",
    "text as weights": "weights: a",
    "map as a number": "map: 3",
    "kernels as a number": "kernels: 3",
    "nested settings": "training: {steps: 3}",
    "settings of transformers": "learning_rate: 1e-4\nnum_train_epochs: 3",
}


def test_recipes_that_no_run_can_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attempts = []
    for name, content in RECIPES.items():
        path = tmp_path / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        words = ["sft", "--config", str(path), "--data", "missing.jsonl"]
        attempts.append((name, Attempt(words[: 3 if "data:" in str(content) else 5], path.stem)))
    check(attempts, capsys)
