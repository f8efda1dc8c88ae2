"""The worker's thread, with a decoder that only counts."""

from __future__ import annotations

from collections.abc import Sequence
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hymba_tune.generate import Generation
from hymba_tune.generate.prefixes import PrefixStore
from hymba_tune.serve import worker as module
from hymba_tune.serve.worker import Job, StoppedError, Worker

ON_CPU: Any = SimpleNamespace(device=torch.device("cpu"))


class CountingDecoder:
    """Generates numbers; a prompt of 13 fails."""

    calls: list[str]
    nbytes = 0

    def __init__(self, *_: object, **options: object) -> None:
        self.options = options
        self.active: list[Generation] = []
        self.prefixes = PrefixStore(0)

    def nbytes_of(self, generations: Sequence[Generation]) -> int:
        return sum(len(one.prompt) for one in generations)

    def reset(self) -> None:
        self.active = []

    def add(self, generations: Sequence[Generation]) -> None:
        self.calls.append("add")
        self.active += generations
        self._append(generations)

    def step(self) -> None:
        self.calls.append("step")
        self._append(self.active)

    def drop(self, _: Generation) -> None:
        raise RuntimeError("no memory")

    def _append(self, generations: Sequence[Generation]) -> None:
        for one in generations:
            one.ids.append(len(one.ids))
            if one.prompt == [13]:
                one.fail(ValueError("unlucky"))
            elif len(one.ids) == one.max_new_tokens:
                one.finish_reason = "length"
        self.active = [one for one in self.active if one.finish_reason is None]


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(CountingDecoder, "calls", [], raising=False)
    monkeypatch.setattr(module, "ChunkedDecoder", CountingDecoder)
    worker = Worker(ON_CPU, None, batch_size=4, queue=8, cache_bytes=10)  # type: ignore[arg-type]
    yield worker
    worker.stop()
    worker.join()


def test_the_thread_computes_on_the_gpu_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[torch.device] = []
    monkeypatch.setattr(module, "ChunkedDecoder", CountingDecoder)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    model: Any = SimpleNamespace(device=torch.device("cuda", 1))
    worker = Worker(model, None, batch_size=4, queue=8, cache_bytes=10)  # type: ignore[arg-type]
    worker.stop()
    worker.join()
    assert current == [torch.device("cuda", 1)]


class Waiting(Job):
    """A job that can be waited for."""

    def __init__(self, *generations: Generation) -> None:
        self._changes: SimpleQueue[None] = SimpleQueue()
        super().__init__(generations, lambda: self._changes.put(None))

    def wait(self) -> None:
        while not self.done:
            self._changes.get(timeout=60)


def test_a_failing_text_ends_its_own_request_only(worker: Worker) -> None:
    jobs = [Waiting(Generation([1], 5)), Waiting(Generation([13], 5)), Waiting(Generation([2], 5))]
    for job in jobs:
        worker.submit(job)
    for job in jobs:
        job.wait()
    assert [str(job.error) for job in jobs] == ["None", "unlucky", "None"]
    assert [len(job.generations[0].ids) for job in (jobs[0], jobs[2])] == [5, 5]


def test_new_requests_do_not_hold_up_the_others(worker: Worker) -> None:
    long = Waiting(Generation([1], 10_000_000))
    worker.submit(long)
    for _ in range(20):
        short = Waiting(Generation([2], 1))
        worker.submit(short)
        short.wait()
    worker.stop()
    worker.join()
    calls = "".join(call[0] for call in worker._decoder.calls)  # type: ignore[attr-defined]
    assert "aa" not in calls


def test_an_error_while_dropping_ends_the_batch_and_not_the_worker(worker: Worker) -> None:
    dropped = Waiting(Generation([1], 10_000_000))
    worker.submit(dropped)
    worker.drop(dropped)
    after = Waiting(Generation([2], 2))
    worker.submit(after)
    after.wait()
    worker.submit(again := Waiting(Generation([2], 2)))
    again.wait()
    assert again.error is None


def test_a_stopped_worker_ends_and_refuses_requests(worker: Worker) -> None:
    job = Waiting(Generation([1], 10_000_000))
    worker.submit(job)
    worker.stop()
    job.wait()
    assert isinstance(job.error, StoppedError)
    with pytest.raises(StoppedError):
        worker.submit(Waiting(Generation([1], 1)))
    with pytest.raises(StoppedError):
        worker.call(lambda _: None)


def test_a_text_waits_until_the_cache_has_room(worker: Worker) -> None:
    """Prompts of 6 and 5 tokens are 11 bytes here, of which 10 fit; later texts do not overtake."""
    worker.submit(long := Waiting(Generation([1] * 6, 10_000_000)))
    worker.submit(second := Waiting(Generation([2] * 5, 2)))
    worker.submit(third := Waiting(Generation([3], 2)))
    while not long.generations[0].ids:
        long._changes.get(timeout=60)
    assert not second.generations[0].ids
    worker.drop(long)
    second.wait()
    third.wait()
    assert worker.largest_batch == 2
    assert [one.generations[0].ids for one in (second, third)] == [[0, 1], [0, 1]]


def test_a_text_that_is_too_long_for_the_cache_is_generated_alone(worker: Worker) -> None:
    worker.submit(large := Waiting(Generation([1] * 99, 2)))
    large.wait()
    assert large.error is None


def test_the_decoder_gets_the_memory_and_the_graphs_of_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ChunkedDecoder", CountingDecoder)
    worker: Any = Worker(ON_CPU, None, batch_size=4, queue=8, cache_bytes=10, cuda_graphs=True)  # type: ignore[arg-type]
    worker.stop()
    worker.join()
    assert worker._decoder.options == {"chunk": 128, "prefix_bytes": 0, "cuda_graphs": True, "cache_bytes": 10}
