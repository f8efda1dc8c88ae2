"""Renders chat templates, which are code of whoever made a model, within limits of time, numbers and size."""

from __future__ import annotations

import operator
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, wraps
from time import monotonic
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.visitor import NodeTransformer

if TYPE_CHECKING:  # importing transformers imports torch
    from transformers import PreTrainedTokenizerBase

SECONDS = 5.0
"""The most seconds that rendering one conversation may take."""
LARGEST = 20_000_000
"""The most characters or items of a text or list that a template makes, and the largest width of its texts."""
INTEGER_BITS = 1024
"""The most bits of an integer that a template computes."""
WIDTHS = ("center", "indent", "wordwrap", "batch", "slice", "round", "format", "ljust", "rjust", "zfill", "expandtabs")
"""Filters and methods of texts that make something as long as a number that they are given."""
_limits = threading.local()


class TemplateFailureError(TemplateError):
    """A template fails whatever the conversation is; a `TemplateError` may be the template's own refusal."""


def apply_template(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Any] | None = None,
    chat_template: str | None = None,
    add_generation_prompt: bool = False,
    **names: Any,
) -> str:
    """Render a conversation as the tokenizer's `apply_chat_template` does, but within limits.

    It works in any thread.

    Args:
        tokenizer: The tokenizer, with a chat template.
        messages: The messages, as plain JSON values.
        tools: The tools, as JSON schemas.
        chat_template: A template to use instead of the tokenizer's.
        add_generation_prompt: Whether to end with what precedes an answer.
        **names: Further names for the template.

    Raises:
        TemplateFailureError: If the template is no valid one, fails at a calculation, or exceeds a limit.
        TemplateError: If the template refuses the conversation.
    """
    template = tokenizer.get_chat_template(chat_template, tools=tools)
    try:
        compiled = _compile(template)
        _limits.deadline = monotonic() + SECONDS
        text = compiled.render(
            messages=messages,
            tools=tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **(tokenizer.special_tokens_map | names),
        )
    except TemplateSyntaxError as error:
        raise TemplateFailureError(f"line {error.lineno}: {error.message}") from error
    except TemplateError:
        raise
    except RecursionError as error:
        raise TemplateFailureError("it calls itself without end") from error
    except Exception as error:  # what a template computes can fail in every way that Python can
        raise TemplateFailureError(f"{type(error).__name__}: {str(error)[:200]}") from error
    _check_size(len(text))
    return text


@lru_cache(maxsize=16)
def _compile(template: str) -> Template:
    environment = _environment()
    tree = _Limiter().visit(environment.parse(template))
    tree.set_environment(environment)
    return environment.from_string(tree)


@lru_cache(maxsize=1)
def _environment() -> Environment:
    """Return the sandbox of transformers, with limits."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    limited: Any = _compile_jinja_template("").environment.overlay()
    limited.tick, limited.concatenated = _tick, _concatenated
    limited.binop_table = {**limited.binop_table, "**": _power, "*": _times, "+": _plus, "%": _modulo}
    limited.intercepted_binops = frozenset(["**", "*", "+", "%"])
    limited.filters |= {name: _with_limited_widths(limited.filters[name]) for name in WIDTHS if name in limited.filters}
    limited.globals = {name: value for name, value in limited.globals.items() if name != "lipsum"}
    limited.call = _limited_call(limited.call)
    return limited  # type: ignore[no-any-return]


class _Limiter(NodeTransformer):
    """Adds a look at the clock to whatever can repeat, and computes concatenations in `_concatenated`."""

    def _visit_repeated(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(tick).set_lineno(node.lineno))
        return node  # type: ignore[no-any-return]

    visit_For = visit_Macro = visit_CallBlock = _visit_repeated  # noqa: N815 (jinja2's names)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802 (jinja2's name)
        self.generic_visit(node)
        return nodes.Call(nodes.EnvironmentAttribute("concatenated"), node.nodes, [], None, None).set_lineno(
            node.lineno
        )


def _tick() -> str:
    if monotonic() > _limits.deadline:
        raise TemplateFailureError(f"it takes more than {SECONDS:g} seconds")
    return ""


def _check_size(size: int) -> None:
    if size > LARGEST:
        raise TemplateFailureError(f"it makes a text or list of more than {LARGEST:,} characters or items")


def _check_bits(bits: int) -> None:
    if bits > INTEGER_BITS:
        raise TemplateFailureError(f"it computes an integer of more than {INTEGER_BITS:,} bits")


def _check_widths(values: Iterable[Any]) -> None:
    if any(isinstance(value, int) and value > LARGEST for value in values):
        raise TemplateFailureError(f"it makes a text wider than {LARGEST:,} characters")


def _with_limited_widths(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def limited(*args: Any, **kwargs: Any) -> Any:
        _check_widths([*args, *kwargs.values()])
        return function(*args, **kwargs)

    return limited


def _limited_call(call: Callable[..., Any]) -> Callable[..., Any]:
    """Limit the widths that methods of texts are called with."""

    def limited(context: Any, called: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(getattr(called, "__self__", None), str) and called.__name__ in WIDTHS:
            _check_widths([*args, *kwargs.values()])
        return call(context, called, *args, **kwargs)

    return limited


def _concatenated(*values: Any) -> str:
    texts = [str(value) for value in values]
    _check_size(sum(map(len, texts)))
    return "".join(texts)


def _power(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() * right)
    return left**right


def _times(left: Any, right: Any) -> Any:
    for sequence, count in ((left, right), (right, left)):
        if isinstance(sequence, str | list | tuple) and isinstance(count, int):
            _check_size(len(sequence) * count)
            return sequence * count
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())
    return left * right


def _plus(left: Any, right: Any) -> Any:
    if isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
        _check_size(len(left) + len(right))
    return operator.add(left, right)


def _modulo(left: Any, right: Any) -> Any:
    if isinstance(left, str) and re.search(r"%[^a-zA-Z]*(\d{6}|\*)", left):
        raise TemplateFailureError("it formats a value with a width of more than 99,999")
    return left % right
