"""What a model writes: one answer as it comes, many texts at once, and whole conversations."""

from hymba_tune.generate.answers import answer, write
from hymba_tune.generate.chat import Chat, ChatSession
from hymba_tune.generate.decoding import Decoder, Sampling, TokenScore, Writing, token_score, write_texts
from hymba_tune.generate.files import answer_file
from hymba_tune.generate.opening import LoadableModel, find_model

__all__ = [
    "Chat",
    "ChatSession",
    "Decoder",
    "LoadableModel",
    "Sampling",
    "TokenScore",
    "Writing",
    "answer",
    "answer_file",
    "find_model",
    "token_score",
    "write",
    "write_texts",
]
