"""Data: from files in any of the known formats to rows of token ids with loss on the answers only."""

from hymba_tune.data.chat import IGNORED, Encoded, encode, encode_prompt, render_prompt
from hymba_tune.data.dataset import DataReport, build_dataset, sample_prompts, split_dataset
from hymba_tune.data.formats import Conversation, Text
from hymba_tune.data.messages import Message
from hymba_tune.data.rows import Place, Row, RowError
from hymba_tune.data.sources import Source, open_source, open_sources
from hymba_tune.data.templates import HYMBA_TEMPLATE, with_chat_template

__all__ = [
    "HYMBA_TEMPLATE",
    "IGNORED",
    "Conversation",
    "DataReport",
    "Encoded",
    "Message",
    "Place",
    "Row",
    "RowError",
    "Source",
    "Text",
    "build_dataset",
    "encode",
    "encode_prompt",
    "open_source",
    "open_sources",
    "render_prompt",
    "sample_prompts",
    "split_dataset",
    "with_chat_template",
]
