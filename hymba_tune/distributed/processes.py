"""How the processes of a run meet, wait for each other, and share what one of them makes.

Every function here is called by all processes at the same places, in the same order; with one process each is the
obvious thing. What takes long in one process is waited for by polling a store, not in a collective operation, so that
the others can tell work from death by the heartbeat.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from hymba_tune.distributed import watch
from hymba_tune.distributed.environment import is_main, local_rank, node, rank, world_size
from hymba_tune.distributed.launch import PREFIX, restarts
from hymba_tune.errors import ConfigError, HymbaTuneError, TrainingError

T = TypeVar("T")
START_TIMEOUT, STEP_TIMEOUT = 300.0, 600.0
"""Seconds that the start may take, and that a process may be silent or late for a step."""
POLL = 0.05
"""Seconds between two looks at the store."""
LEAVE_SECONDS = 5.0
"""Seconds for which the process that serves the store waits for the others, which may still read an error in it."""


@dataclass
class _Group:
    """What a process knows of the others.

    Attributes:
        store: The store that all processes read and write.
        step_timeout: Seconds after which a silent process counts as lost.
        points: The number of points passed so far: the same in all processes, so it names the keys of a point.
    """

    store: Any
    step_timeout: float
    points: int = 0

    def next_point(self) -> str:
        """Return the prefix of the keys of the next point."""
        self.points += 1
        return f"point/{self.points}"


_group: _Group | None = None


def join(device: torch.device, *, start_timeout: float = START_TIMEOUT, step_timeout: float = STEP_TIMEOUT) -> None:
    """Meet the other processes, and form the process group in which they train.

    Args:
        device: The device of this process.
        start_timeout: Seconds to wait for the others.
        step_timeout: Seconds that an operation of all processes may take.

    Raises:
        ConfigError: If no process answers at the address, or some are missing; the message names them.
    """
    global _group
    if world_size() == 1 or _group is not None:
        return
    _group = _Group(_open_store(start_timeout), step_timeout)
    watch.start().attend(_group.store, step_timeout)
    key = _group.next_point()
    _group.store.set(f"{key}/{rank()}", b"")
    missing = _wait_for_keys([f"{key}/{other}" for other in range(world_size())], start_timeout)
    if missing:
        raise ConfigError(
            f"{_listed(missing)} did not start within {start_timeout:.0f} s, of {world_size()} processes at "
            f"{_address()}.",
            expected="every machine to be started with the same --nnodes and --rendezvous, and its own --node-rank",
            fix="start the missing ones, or a longer --start-timeout",
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo",
        store=PrefixStore("group", _group.store),
        rank=rank(),
        world_size=world_size(),
        timeout=timedelta(seconds=step_timeout),
    )


def leave() -> None:
    """End the heartbeat and the process group, if there is one."""
    global _group
    if _group is not None:
        watch.start().leave()
        if is_main():
            with suppress(RuntimeError):  # the store may be gone
                _wait_for_keys([f"left/{other}" for other in range(world_size())], LEAVE_SECONDS)
        _group = None
    if dist.is_initialized():
        dist.destroy_process_group()


def reach(point: str) -> None:
    """Wait until every process has come to a point.

    Args:
        point: What has been done by then, for the message: ``the checkpoint of step 40``.

    Raises:
        TrainingError: If a process has been silent for the step's time-out; it names the process.
    """
    if _group is not None:
        key = _group.next_point()
        _group.store.set(f"{key}/{rank()}", b"")
        for other in range(world_size()):
            _wait_for(f"{key}/{other}", other, point)


def from_main(make: Callable[[], T], what: str) -> T:
    """Return what the first process makes, in all of them; where it raises an error, raise the same in all.

    Args:
        make: Makes the value, which must be small and can be pickled; called in the first process only.
        what: What is made, for the message if the first process is lost: ``reading the data``.
    """
    if _group is None:
        return make()
    key = _group.next_point()
    if is_main():
        with _sharing_errors(key):
            value = make()
        _group.store.set(key, pickle.dumps((value, None)))
        return value
    _wait_for(key, 0, what)
    value, error = pickle.loads(_group.store.get(key))
    if error is not None:
        raise error
    return value


@contextmanager
def first_of_node(what: str) -> Iterator[None]:
    """Let the first process of each machine go first: it makes what is cached on disk, and the others find it there.

    Args:
        what: What the block does, for the message if the first process is lost.
    """
    if _group is None:
        yield
        return
    key = f"{_group.next_point()}/{node()}"
    if local_rank() == 0:
        with _sharing_errors(key):
            yield
        _group.store.set(key, pickle.dumps((None, None)))
        return
    _wait_for(key, rank() - local_rank(), what)
    _, error = pickle.loads(_group.store.get(key))
    if error is not None:
        raise error
    yield


@contextmanager
def together(what: str) -> Iterator[None]:
    """Raise an error of the block in all processes, whichever it happens in: the others would wait for that one.

    Args:
        what: What the block does, for the message if a process is lost: ``writing the weights``.
    """
    if _group is None:
        yield
        return
    key = _group.next_point()
    with _sharing_errors(f"{key}/{rank()}"):
        yield
    _group.store.set(f"{key}/{rank()}", pickle.dumps((None, None)))
    for other in range(world_size()):
        _wait_for(f"{key}/{other}", other, what)
        _, error = pickle.loads(_group.store.get(f"{key}/{other}"))
        if error is not None:
            raise error


def gathered(value: T) -> list[T]:
    """Return the values of all processes, in the order of their ranks. The value must be small and can be pickled."""
    if _group is None:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def sums(values: Mapping[str, float]) -> dict[str, float]:
    """Return numbers by name, added over all processes; a process may lack some of the names."""
    total: dict[str, float] = {}
    for part in gathered({name: float(value) for name, value in values.items()}):
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total


def added(values: Sequence[float]) -> list[float]:
    """Return numbers, each added over all processes: one small operation, for what is decided at every step."""
    if _group is None:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def gathered_values(values: Tensor, most: int) -> Tensor:
    """Return the values of all processes, in the order of their ranks; each may have another number of them.

    Args:
        values: ``(n,)``, or a single value, of this process.
        most: The most values that a process may have: the same in all.
    """
    own = values.detach().reshape(-1)
    if _group is None:
        return own
    # In one operation: how many there are, and then the values, which float64 holds exactly.
    sent = torch.zeros(1 + most, dtype=torch.float64, device=own.device)
    sent[0] = len(own)
    sent[1 : 1 + len(own)] = own
    received = [torch.empty_like(sent) for _ in range(world_size())]
    dist.all_gather(received, sent)
    return torch.cat([part[1 : 1 + int(part[0])] for part in received]).to(values.dtype)


def agree(facts: Mapping[str, str]) -> None:
    """Check that all processes have the same facts.

    Args:
        facts: Versions and digests by what they are of: ``torch``, ``the data``.

    Raises:
        ConfigError: If one differs; it names the process.
    """
    everywhere = gathered(dict(facts))
    for name, mine in everywhere[0].items():
        for other, theirs in enumerate(everywhere):
            if theirs.get(name) != mine:
                raise ConfigError(
                    f"{name}: rank {other} has {theirs.get(name)}, rank 0 has {mine}.",
                    expected="the same on every machine",
                    fix="install the same versions and copy the same files to every machine",
                )


def _open_store(timeout: float) -> Any:
    """Return the store of the run: the launcher's, or one that the first process serves."""
    host, port = _address().rsplit(":", 1)
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = TCPStore(
            host,
            int(port),
            is_master=is_main() and not served,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
        )
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"No process answers at {host}:{port}, where rank {rank()} is to meet the others, within {timeout:.0f} s.",
            expected="the first machine to run, and its port to be open to this one",
            fix="check --rendezvous, or MASTER_ADDR and MASTER_PORT",
        ) from error
    return PrefixStore(f"{PREFIX}/{restarts()}", store)


def _address() -> str:
    return f"{os.environ.get('MASTER_ADDR', '127.0.0.1')}:{os.environ.get('MASTER_PORT', '29500')}"


def _wait_for_keys(keys: list[str], timeout: float) -> list[int]:
    """Wait until all keys are set; return the places of those that are not in time."""
    assert _group is not None
    until = time.monotonic() + timeout
    while not _group.store.check(keys):
        if time.monotonic() > until:
            return [place for place, key in enumerate(keys) if not _group.store.check([key])]
        time.sleep(POLL)
    return []


def _wait_for(key: str, other: int, what: str) -> None:
    """Wait until another process has set a key, as long as its heart beats."""
    assert _group is not None
    beats, last_beat = -1, time.monotonic()
    while not _group.store.check([key]):
        if (now := _group.store.add(f"beat/{other}", 0)) != beats:
            beats, last_beat = now, time.monotonic()
        if time.monotonic() - last_beat > _group.step_timeout:
            raise TrainingError(
                f"{_listed([other])} has been silent for {_group.step_timeout:.0f} s, and rank {rank()} waits for it "
                f"({what}).",
                expected="every process to run",
                fix="look at its machine; --resume the run from its last checkpoint",
            )
        time.sleep(POLL)


def _listed(ranks: list[int]) -> str:
    """Return ``rank 1 (host b)``, with the host of each process that has named its own."""
    assert _group is not None
    named = []
    for one in ranks:
        known = _group.store.check([f"host/{one}"])
        host = f" (on {_group.store.get(f'host/{one}').decode()})" if known else ""
        named.append(f"rank {one}{host}")
    return ", ".join(named)


@contextmanager
def _sharing_errors(key: str) -> Iterator[None]:
    """Raise an error of the block in the processes that wait for the key, too."""
    assert _group is not None
    try:
        yield
    except Exception as error:
        # An error of the system keeps its number, by which a full disk is recognized.
        kinds = (HymbaTuneError, OSError)
        shared = error if isinstance(error, kinds) else TrainingError(f"rank {rank()} failed: {error}")
        _group.store.set(key, pickle.dumps((None, shared)))
        raise
