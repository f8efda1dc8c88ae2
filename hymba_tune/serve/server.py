"""From settings to a server that listens."""

from __future__ import annotations

import ipaddress
import socket

import uvicorn

from hymba_tune.config import ServeConfig
from hymba_tune.data.training import Working
from hymba_tune.errors import ConfigError
from hymba_tune.generate import find_model
from hymba_tune.inputs import check_inputs
from hymba_tune.serve.app import Limits, Service
from hymba_tune.serve.worker import Worker


class Server:
    """A model that listens. Its port is taken before the weights load.

    Args:
        config: Which model, where, and within which limits.
        working: Told what is done.

    Raises:
        HymbaTuneError: If the model or the port cannot be used.
    """

    def __init__(self, config: ServeConfig, working: Working) -> None:
        check_inputs(config)
        found = find_model(config.model, config, config.chat_template)
        self._socket = _listen(config.host, config.port)
        try:
            with working(f"loading {found.source.name}"):
                model = found.load()
        except BaseException:
            self._socket.close()
            raise
        self.name = found.source.name
        self.local = _is_local(config.host)
        """Whether only this machine reaches it."""
        self.note = found.note
        """What is worth knowing of how its adapters were folded in."""
        self.worker = Worker(model, found.tokenizer, batch_size=config.batch_size, queue=config.queue)
        context = int(found.config.max_position_embeddings)
        limits = Limits(context, min(config.max_new_tokens, context - 1), config.max_body * 1024)
        app = Service(self.name, found.tokenizer, self.worker, limits).app(local=self.local)
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                server_header=False,
                lifespan="off",
                timeout_graceful_shutdown=5,
                limit_concurrency=config.queue + config.batch_size + 64,
            )
        )

    @property
    def url(self) -> str:
        """Where it listens, as OpenAI's clients take it."""
        host, port = self._socket.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"

    def run(self) -> None:
        """Serve until interrupted, or until `stop`."""
        try:
            self._server.run(sockets=[self._socket])
        finally:
            self.worker.stop()
            self._socket.close()

    def stop(self) -> None:
        """End `run`, which is on another thread."""
        self._server.should_exit = True


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
        except OSError:
            listening.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"--host {host} --port {port}: cannot listen there: {error.strerror or error}.",
            fix="--port 0 takes a free one",
        ) from error
    return listening


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
