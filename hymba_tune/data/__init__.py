"""Data: reads files in any of the known formats into rows of token ids, with the loss on the answers only."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hymba_tune.data.cache import cache_folder
    from hymba_tune.data.chat import IGNORED, Encoded, encode, encode_prompt, render_prompt
    from hymba_tune.data.dataset import LOSS_WEIGHTS, build_dataset, sample_prompts
    from hymba_tune.data.formats import Conversation, Text
    from hymba_tune.data.messages import Message
    from hymba_tune.data.mixes import open_sources
    from hymba_tune.data.preference_dataset import PreferenceReport, build_preferences
    from hymba_tune.data.preferences import PreferencePair, UnpairedPreference, parse_pair, parse_unpaired
    from hymba_tune.data.prompt_dataset import PromptReport, build_prompts
    from hymba_tune.data.report import DataReport
    from hymba_tune.data.rows import RowError, RowLocation, SourceRow
    from hymba_tune.data.sources import Source, open_source
    from hymba_tune.data.templates import HYMBA_TEMPLATE, with_chat_template
    from hymba_tune.data.training import TrainingData, read_preferences, read_prompts, read_training_data

_MODULES = {
    "cache": ("cache_folder",),
    "chat": (
        "IGNORED",
        "Encoded",
        "encode",
        "encode_prompt",
        "render_prompt",
    ),
    "dataset": (
        "LOSS_WEIGHTS",
        "build_dataset",
        "sample_prompts",
    ),
    "formats": (
        "Conversation",
        "Text",
    ),
    "messages": ("Message",),
    "mixes": ("open_sources",),
    "preference_dataset": (
        "PreferenceReport",
        "build_preferences",
    ),
    "preferences": (
        "PreferencePair",
        "UnpairedPreference",
        "parse_pair",
        "parse_unpaired",
    ),
    "prompt_dataset": (
        "PromptReport",
        "build_prompts",
    ),
    "report": ("DataReport",),
    "rows": (
        "RowError",
        "RowLocation",
        "SourceRow",
    ),
    "sources": (
        "Source",
        "open_source",
    ),
    "templates": (
        "HYMBA_TEMPLATE",
        "with_chat_template",
    ),
    "training": (
        "TrainingData",
        "read_preferences",
        "read_prompts",
        "read_training_data",
    ),
}
"""The names of each module. A module is imported when one of its names is used: some take a second."""

__all__ = [
    "HYMBA_TEMPLATE",
    "IGNORED",
    "LOSS_WEIGHTS",
    "Conversation",
    "DataReport",
    "Encoded",
    "Message",
    "PreferencePair",
    "PreferenceReport",
    "PromptReport",
    "RowError",
    "RowLocation",
    "Source",
    "SourceRow",
    "Text",
    "TrainingData",
    "UnpairedPreference",
    "build_dataset",
    "build_preferences",
    "build_prompts",
    "cache_folder",
    "encode",
    "encode_prompt",
    "open_source",
    "open_sources",
    "parse_pair",
    "parse_unpaired",
    "read_preferences",
    "read_prompts",
    "read_training_data",
    "render_prompt",
    "sample_prompts",
    "with_chat_template",
]


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
