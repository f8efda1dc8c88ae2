"""A model behind OpenAI's interface: chats and completions, streamed or whole, several requests written at once."""

from hymba_tune.serve.server import Server

__all__ = ["Server"]
