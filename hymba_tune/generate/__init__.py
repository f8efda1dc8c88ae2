"""Text generation: one streamed answer, many sequences in one batch, chat sessions, and files of prompts."""

from hymba_tune.generate.answers import answer, evaluating, write
from hymba_tune.generate.chat import Chat, ChatSession
from hymba_tune.generate.chunked import ChunkedDecoder
from hymba_tune.generate.constraints import Constraint, Grammars
from hymba_tune.generate.decoding import Decoder, generate_texts
from hymba_tune.generate.files import answer_file
from hymba_tune.generate.generation import Generation
from hymba_tune.generate.opening import LoadableModel, find_model
from hymba_tune.generate.sampling import Sampling, TokenScore, token_score

__all__ = [
    "Chat",
    "ChatSession",
    "ChunkedDecoder",
    "Constraint",
    "Decoder",
    "Generation",
    "Grammars",
    "LoadableModel",
    "Sampling",
    "TokenScore",
    "answer",
    "answer_file",
    "evaluating",
    "find_model",
    "generate_texts",
    "token_score",
    "write",
]
