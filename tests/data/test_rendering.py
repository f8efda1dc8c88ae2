"""Chat templates are code of strangers: whatever they do ends soon, with one message."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from jinja2 import TemplateError

from hymba_tune.checkpoint import load_tokenizer
from hymba_tune.data import rendering
from hymba_tune.data.rendering import TemplateFailureError, apply_template
from hymba_tune.data.templates import ALPACA_TEMPLATE, HYMBA_TEMPLATE, with_chat_template
from hymba_tune.errors import CheckpointError, ConfigError
from hymba_tune.registry import resolve_model

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
LOOP = "{% set r = range(100000) %}{% for a in r %}{% for b in r %}{% for c in r %}{% endfor %}{% endfor %}{% endfor %}"
DOUBLED = "{% set n = namespace(s='a') %}{% for a in range(99) %}{% set n.s = n.s <> n.s %}{% endfor %}"
TREE = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
FAILURES = {
    "overflow": ("{{ range(100001) }}", "OverflowError"),
    "power": ("{{ 10 ** 10000000000 }}", "an integer of more than 1,024 bits"),
    "power of a variable": ("{% set n = 999999 %}{{ n ** n }}", "an integer of more than 1,024 bits"),
    "product": ("{% set n = 2 ** 600 %}{{ n * n }}", "an integer of more than 1,024 bits"),
    "float overflow": ("{{ 1e3 ** 999 }}", "OverflowError"),
    "division": ("{{ 1 // 0 }}", "ZeroDivisionError"),
    "remainder": ("{{ 1 % 0 }}", "ZeroDivisionError"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself without end"),
    "recursive loop": ("{% for a in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}", "calls itself without end"),
    "include": ("{% include 'other' %}", "no loader"),
    "import": ("{% import 'other' as other %}", "no loader"),
    "extends": ("{% extends 'other' %}", "no loader"),
    "endless": (LOOP, r"takes more than 0\.1 seconds"),
    "doubling recursion": (TREE, r"takes more than 0\.1 seconds"),
    "long text": ("{{ 'a' * 10 ** 7 * 10 }}", "of more than 20,000 characters"),
    "long list": ("{{ [1] * 99999999 }}", "of more than 20,000 characters"),
    "doubled text": (DOUBLED.replace("<>", "~"), "of more than 20,000 characters"),
    "added text": (DOUBLED.replace("<>", "+"), "of more than 20,000 characters"),
    "width": ("{{ 'a' | center(1000000000) }}", "wider than 20,000 characters"),
    "method": ("{{ 'a'.ljust(1000000000) }}", "wider than 20,000 characters"),
    "format": ("{{ '%999999999d' % 1 }}", "a width of more"),
    "long output": ("{% for a in range(99) %}{{ 'a' * 999 }}{% endfor %}", "of more than 20,000 characters"),
    "type": ("{{ 'a' + 1 }}", "TypeError"),
    "syntax": ("{% if %}", "line 1: Expected an expression"),
    "no endless words": ("{{ lipsum(n=9999999) }}", "'lipsum' is undefined"),
}


@pytest.fixture
def tokenizer() -> Any:
    return load_tokenizer(resolve_model("hymba-nano").folder)


@pytest.fixture
def _short_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "SECONDS", 0.1)


@pytest.mark.parametrize(("template", "message"), FAILURES.values(), ids=list(FAILURES))
def test_failure_of_a_template_is_one_kind_of_error(
    template: str, message: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendering, "LARGEST", 20_000)
    if message.startswith("takes"):
        monkeypatch.setattr(rendering, "SECONDS", 0.1)
    with pytest.raises(TemplateError, match=message):
        apply_template(tokenizer, MESSAGES, chat_template=template)


@pytest.mark.usefixtures("_short_limit")
@pytest.mark.parametrize("template", [LOOP, "{{ 1 // 0 }}", "{% include 'a' %}"])
def test_model_whose_template_fails_is_refused_before_any_row(template: str, tokenizer: Any) -> None:
    tokenizer.chat_template = template
    with pytest.raises(CheckpointError, match=r"The chat template of .* fails: (.|\n)*--chat-template hymba"):
        with_chat_template(tokenizer)


@pytest.mark.usefixtures("_short_limit")
def test_template_file_that_fails_is_refused(tokenizer: Any, tmp_path: Any) -> None:
    (tmp_path / "endless.jinja").write_text(LOOP)
    with pytest.raises(ConfigError, match=r"--chat-template .*endless\.jinja: .* takes more than 0\.1 seconds"):
        with_chat_template(tokenizer, str(tmp_path / "endless.jinja"))


@pytest.mark.usefixtures("_short_limit")
def test_limit_holds_in_every_thread_at_once(tokenizer: Any) -> None:
    def outcome(template: str) -> str:
        try:
            return apply_template(tokenizer, MESSAGES, chat_template=template)
        except TemplateFailureError as error:
            return f"{threading.current_thread() is threading.main_thread()} {error}"

    with ThreadPoolExecutor(4) as threads:
        outcomes = list(threads.map(outcome, [LOOP, "{{ messages[0].content }}"] * 2))
    assert outcomes == ["False it takes more than 0.1 seconds", "Hi"] * 2


def test_refusal_by_the_template_is_no_failure(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('a system message is needed') }}"
    assert with_chat_template(tokenizer) is tokenizer
    with pytest.raises(TemplateError, match="a system message is needed") as error:
        apply_template(tokenizer, MESSAGES)
    assert not isinstance(error.value, TemplateFailureError)


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize(
    "template",
    [
        HYMBA_TEMPLATE,
        ALPACA_TEMPLATE,
        "{% for m in messages %}{{ m.role ~ ': ' ~ loop.index ~ ' ' + 'x' * 3 + m['content'] | upper }}\n{% endfor %}"
        "{{ '%s' % 3 ~ 7 % 4 ~ 2 ** 3 ~ 1 / 3 }}{% set n = namespace(i=0) %}{% set n.i = n.i + 1 %}{{ n.i }}"
        "{{ (1700000000000 * 3) | tojson ~ 'ab' | center(9) ~ 'b'.rjust(4) }}",
    ],
)
def test_renders_as_transformers_does(template: str, prompt: bool, tokenizer: Any) -> None:
    arguments: dict[str, Any] = {"chat_template": template, "add_generation_prompt": prompt}
    expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False, **arguments)
    assert apply_template(tokenizer, MESSAGES, **arguments) == expected
