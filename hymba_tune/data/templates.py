"""Chat templates: Hymba's, Alpaca's, and those of files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from hymba_tune.data.chat import render
from hymba_tune.data.formats import Conversation
from hymba_tune.data.messages import Message
from hymba_tune.data.rendering import TemplateFailureError, apply_template
from hymba_tune.data.rows import listing
from hymba_tune.errors import CheckpointError, ConfigError, DataError

if TYPE_CHECKING:  # importing transformers imports torch
    from transformers import PreTrainedTokenizerBase

HYMBA_TEMPLATE = r"""
{{- bos_token -}}
{{- '<extra_id_0>System' -}}
{%- for message in messages if message['role'] == 'system' -%}
  {{- '\n' + message['content'] | trim -}}
  {%- if tools or contexts -%} {{- '\n' -}} {%- endif -%}
{%- endfor -%}
{%- for tool in tools or [] -%}
  {{- '\n<tool> ' + tool | tojson + ' </tool>' -}}
{%- endfor -%}
{%- if tools and contexts -%} {{- '\n' -}} {%- endif -%}
{%- for context in contexts or [] -%}
  {{- '\n<context> ' + context | trim + ' </context>' -}}
{%- endfor -%}
{{- '\n\n' -}}
{%- for message in messages -%}
  {%- if message['role'] == 'assistant' -%}
    {{- '<extra_id_1>Assistant\n' -}}
    {%- generation -%} {{- message['content'] | trim + eos_token -}} {%- endgeneration -%}
    {{- '\n' -}}
  {%- elif message['role'] in ('user', 'tool') -%}
    {{- '<extra_id_1>' + message['role'] | capitalize + '\n' + message['content'] | trim + '\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%} {{- '<extra_id_1>Assistant\n' -}} {%- endif -%}
"""
"""Hymba's chat format, with what its released template lacks: the tokens that begin the text and end an answer, and the
``generation`` marks by which other libraries locate the answers."""

ALPACA_TEMPLATE = r"""
{{- bos_token -}}
{%- if tools or contexts -%} {{- raise_exception('alpaca shows no tools or contexts') -}} {%- endif -%}
{%- for message in messages -%}
  {%- if message['role'] == 'assistant' -%}
    {{- '### Response:\n' -}}
    {%- generation -%} {{- message['content'] | trim + eos_token -}} {%- endgeneration -%}
    {{- '\n\n' -}}
  {%- elif message['role'] == 'user' -%}
    {{- '### Instruction:\n' + message['content'] | trim + '\n\n' -}}
  {%- elif message['role'] == 'system' -%}
    {{- message['content'] | trim + '\n\n' -}}
  {%- else -%}
    {{- raise_exception('alpaca has no role ' + message['role']) -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%} {{- '### Response:\n' -}} {%- endif -%}
"""
"""Alpaca's headings, which need no special tokens."""

NAMED = {"hymba": HYMBA_TEMPLATE, "alpaca": ALPACA_TEMPLATE}
PROBE = Conversation((Message("user", "Hi"), Message("assistant", "Hello")))


def with_chat_template(
    tokenizer: PreTrainedTokenizerBase, template: str | None = None, *, flag: str = "--chat-template"
) -> PreTrainedTokenizerBase:
    """Return a tokenizer with a chat template.

    Args:
        tokenizer: The tokenizer; it is not changed.
        template: One of `NAMED`, or a Jinja file. `None` keeps the tokenizer's own template, except that
            `HYMBA_TEMPLATE` replaces a missing one and one that renders as Hymba's released template does.
        flag: The flag that set the template, for error messages.

    Returns:
        A copy with the template, or the tokenizer itself if its own template is kept.

    Raises:
        ConfigError: If there is no such template, or answers cannot be located in its output.
        CheckpointError: If the tokenizer's own template fails.
    """
    if template is None and tokenizer.chat_template is not None and not _renders_released_format(tokenizer):
        _check_own_template(tokenizer)
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = HYMBA_TEMPLATE if template is None else read_template(template, flag=flag)
    if template is not None:
        try:
            render(PROBE, tokenizer)
        except DataError as problem:
            raise ConfigError(
                f"{flag} {template}: {problem.what}.",
                expected="a template that keeps answers unchanged",
            ) from problem
    return tokenizer


def read_template(template: str, *, flag: str = "--chat-template") -> str:
    """Read a chat template.

    Args:
        template: One of `NAMED`, or a file of Jinja.
        flag: The flag that names it.

    Raises:
        ConfigError: If there is no such template.
    """
    if template in NAMED:
        return NAMED[template]
    try:
        return Path(template).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{flag} {template} cannot be read: {getattr(error, 'strerror', None) or 'it is not UTF-8'}.",
            expected=f"one of {listing(NAMED)}, or a Jinja file",
        ) from error


def _renders_released_format(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer's own template renders as Hymba's released template, on a probe with every feature."""
    roles = ("system", "user", "assistant", "tool", "assistant", "user")
    messages = [{"role": role, "content": f" {role} "} for role in roles]
    probe: dict[str, Any] = {
        "tools": [{"name": "tool"}],
        "contexts": [" context "],
        "add_generation_prompt": True,
    }
    without_marks: dict[str, Any] = {"bos_token": "", "eos_token": ""}
    try:
        own = apply_template(tokenizer, messages, **probe)
    except TemplateError:
        return False
    return own == apply_template(tokenizer, messages, **probe, **without_marks, chat_template=HYMBA_TEMPLATE)


def _check_own_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a CheckpointError if a tokenizer's template fails at a question and its answer.

    A template may refuse this conversation, as it may refuse any.
    """
    messages = [{"role": message.role, "content": message.content} for message in PROBE.messages]
    try:
        apply_template(tokenizer, messages)
    except TemplateFailureError as error:
        raise CheckpointError(
            f"The chat template of {tokenizer.name_or_path} fails: {error}.",
            expected="a template that renders a question and its answer",
            fix="--chat-template hymba, or remove chat_template from the tokenizer",
        ) from error
    except TemplateError:
        return
