"""Functions in several processes that meet. They fork from the server of `tests.train.processes`."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch

from hymba_tune.config import DPOConfig, KTOConfig, ORPOConfig, RewardConfig, SFTConfig, TrainingConfig
from hymba_tune.footprint import Footprint
from hymba_tune.train import flow
from hymba_tune.train.memory_estimate import MemoryEstimate
from hymba_tune.train.orpo import run_orpo
from hymba_tune.train.preference import run_dpo, run_kto
from hymba_tune.train.reward import run_reward
from hymba_tune.train.screen import Screen
from hymba_tune.train.sft import run_sft
from tests.train.processes import FORKS, TIMEOUT_SECONDS


def in_processes(count: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call a function in processes that a launcher could have started.

    Args:
        count: The number of processes.
        function: The function, of a module that can be imported.
        args: Its arguments.

    Returns:
        What it returned in each, or the error that it raised there; an EOFError for one that was killed.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    started = []
    for rank in range(count):
        receiver, sender = FORKS.Pipe(duplex=False)
        process = FORKS.Process(target=_as_rank, args=(rank, count, port, sender, function, args))
        process.start()
        sender.close()
        started.append((process, receiver))
    try:
        results = [_received(pipe) if pipe.poll(TIMEOUT_SECONDS) else None for _, pipe in started]
    finally:
        for process, _ in started:
            process.join(TIMEOUT_SECONDS if process.is_alive() else None)
            process.kill()
    return results


def _received(pipe: Any) -> Any:
    try:
        return pipe.recv()
    except EOFError as error:
        return error


def _as_rank(rank: int, count: int, port: int, pipe: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    if count > 1:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in ranks.items()} | {"MASTER_ADDR": "127.0.0.1"}
    try:
        pipe.send(function(*args))
    except BaseException as error:
        pipe.send(error)


RUNS: dict[type, Any] = {
    SFTConfig: run_sft,
    DPOConfig: run_dpo,
    KTOConfig: run_kto,
    ORPOConfig: run_orpo,
    RewardConfig: run_reward,
}


def train(config: TrainingConfig, screen: Screen | None = None) -> None:
    """Train as one of the processes, without what takes longest: the estimate of memory, answers and the report."""
    estimate = MemoryEstimate(Footprint(0, 0, 0, 0, 0, 0), extra_bytes=0, has=1, on_gpu=False)
    with (
        patch.object(flow, "estimate_memory", return_value=estimate),
        patch.object(flow, "answer_samples", return_value=None),
        patch("hymba_tune.report.write_report"),
    ):
        RUNS[type(config)](config, screen or Screen())
