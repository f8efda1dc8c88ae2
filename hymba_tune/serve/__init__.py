"""A server with OpenAI's HTTP API: chat and text completions, whole or streamed, with batched generation."""

from hymba_tune.serve.server import Server

__all__ = ["Server"]
