"""Functions in several processes that meet. They fork from the server of `tests.train.processes`."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch

from tests.train.processes import FORKS, TIMEOUT_SECONDS


def in_processes(count: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call a function in processes that a launcher could have started.

    Args:
        count: The number of processes.
        function: The function, of a module that can be imported.
        args: Its arguments.

    Returns:
        What it returned in each, or the error that it raised there.
    """
    return collect(start_in_processes(count, function, *args))


def start_in_processes(count: int, function: Callable[..., Any], *args: Any) -> list[tuple[Any, Any]]:
    """Start them; return each with the connection that `collect` reads."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    started = []
    for rank in range(count):
        receiver, sender = FORKS.Pipe(duplex=False)
        process = FORKS.Process(target=_as_rank, args=(rank, count, port, sender, function, args))
        process.start()
        sender.close()
        started.append((process, receiver))
    return started


def collect(started: list[tuple[Any, Any]]) -> list[Any]:
    """Wait for the processes, and return what the function returned, or the error that it raised."""
    try:
        results = [pipe.recv() if pipe.poll(TIMEOUT_SECONDS) else None for _, pipe in started]
    finally:
        for process, _ in started:
            process.join(TIMEOUT_SECONDS if process.is_alive() else None)
            process.kill()
    return results


def _as_rank(rank: int, count: int, port: int, pipe: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    if count > 1:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in ranks.items()} | {"MASTER_ADDR": "127.0.0.1"}
    try:
        pipe.send(function(*args))
    except BaseException as error:
        pipe.send(error)
