"""The server: loads the model and listens on a port."""

from __future__ import annotations

import ipaddress
import os
import socket
from pathlib import Path

import uvicorn
from transformers import PreTrainedModel

from hymba_tune.config import ServeConfig
from hymba_tune.data.training import Working
from hymba_tune.errors import ConfigError, shortened
from hymba_tune.files.checkpoints import at_checkpoint
from hymba_tune.generate import LoadableModel, find_model
from hymba_tune.inputs import check_inputs
from hymba_tune.memory import free_memory
from hymba_tune.serve.app import Service
from hymba_tune.serve.connections import Connection, HttpServer
from hymba_tune.serve.metrics import ServerMetrics
from hymba_tune.serve.reading import Limits
from hymba_tune.serve.worker import Worker


class Server:
    """An HTTP server for one model; it binds its port before the weights load.

    Args:
        config: The model, the address and the limits.
        working: Shows progress.

    Raises:
        HymbaTuneError: If the model or the port cannot be used.
    """

    def __init__(self, config: ServeConfig, working: Working) -> None:
        check_inputs(config)
        loadable = find_model(at_checkpoint(config.model, config.checkpoint), config, config.chat_template)
        self.name = loadable.source.published or Path(loadable.source.name).resolve().name
        """The model's name in requests: that on the Hub, or the name of its folder."""
        self.local = _is_local(config.host)
        """Whether the server accepts local connections only."""
        self.note = loadable.note
        """A note for the user on how the adapters were merged, if there is one."""
        self._socket = _listen(config.host, config.port)
        try:
            with working(f"loading {loadable.source.name}"):
                model = loadable.load()
            metrics = ServerMetrics()
            self.worker = _worker(model, loadable, config, metrics)
            limits = _limits(self.worker, loadable, config)
        except BaseException:
            self._socket.close()
            raise
        self._service = Service(self.name, loadable.tokenizer, self.worker, limits, metrics)
        key = None if config.api_key is None else os.environ[config.api_key]
        self._server = HttpServer(
            uvicorn.Config(
                self._service.app(local=self.local, origins=config.cors, key=key),
                http=Connection,
                log_level="error",
                access_log=False,
                server_header=False,
                lifespan="off",
                timeout_graceful_shutdown=5,
            ),
            self.worker.stop,
        )
        self._socket.listen()  # clients that connect before `run` begins wait for it

    @property
    def url(self) -> str:
        """The base URL for OpenAI's clients."""
        host, port = self._socket.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"

    def run(self) -> None:
        """Serve until interrupted, or until `stop` is called."""
        try:
            self._server.run(sockets=[self._socket])
        finally:
            self.worker.stop()
            self.worker.join()
            self._service.close()
            self._socket.close()

    def stop(self) -> None:
        """End `run`; called from another thread."""
        self._server.should_exit = True


def _worker(model: PreTrainedModel, loadable: LoadableModel, config: ServeConfig, metrics: ServerMetrics) -> Worker:
    """Start the worker, with the memory that the settings give it or a part of what is free."""
    free = free_memory(loadable.device)

    def nbytes(gigabytes: float | None, default: int) -> int:
        return default if gigabytes is None else int(gigabytes * 2**30)

    return Worker(
        model,
        loadable.tokenizer,
        batch_size=config.batch_size,
        queue=config.queue,
        cache_bytes=nbytes(config.cache_memory, free // 2),
        chunk=config.prefill_chunk,
        prefix_bytes=nbytes(config.prefix_memory, free // 10),
        cuda_graphs=config.cuda_graphs,
        metrics=metrics,
    )


def _limits(worker: Worker, loadable: LoadableModel, config: ServeConfig) -> Limits:
    """The limits of requests: the model's context, or the largest one whose cache fits into --cache-memory.

    Raises:
        ConfigError: If not even a text of two tokens fits.
    """
    context = worker.longest_text(int(loadable.config.max_position_embeddings))
    if context < 2:
        worker.stop()
        given = "" if config.cache_memory is None else f" {config.cache_memory:g}"
        raise ConfigError(
            f"--cache-memory{given}: the cache of a text of two tokens does not fit.",
            expected="gigabytes of memory that is free once the model is loaded",
            fix="a larger --cache-memory, or a machine with more free memory",
        )
    return Limits(context, min(config.max_new_tokens, context - 1), config.queue, config.max_body * 1024)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except (socket.gaierror, UnicodeError) as error:  # UnicodeError: no name of a host can be written so
        raise ConfigError(
            f"--host {shortened(host)}: no such address.", expected="an address of this machine", fix="--host 127.0.0.1"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"--host {host} --port {port}: cannot listen on this address: {error.strerror or error}.",
            fix="--port 0, which uses a free port",
        ) from error
    return listener


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
