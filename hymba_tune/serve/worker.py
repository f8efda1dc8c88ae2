"""The thread that runs the model for all requests."""

from __future__ import annotations

import sys
import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hymba_tune.generate import ChunkedDecoder, Generation
from hymba_tune.serve.metrics import ServerMetrics


class QueueFullError(Exception):
    """The queue has no room for a request."""


class StoppedError(Exception):
    """The worker stops: it ends all requests and accepts no more."""


@dataclass(eq=False)
class Job:
    """A request's generations.

    Attributes:
        generations: Generated on the worker's thread.
        on_change: Called on that thread when a generation has new tokens or is finished.
        error: The error, if one occurred; the generations keep the tokens that they have.
    """

    generations: Sequence[Generation]
    on_change: Callable[[], None]
    error: Exception | None = None

    @property
    def done(self) -> bool:
        """Whether all generations are finished, or an error occurred."""
        return self.error is not None or all(one.finish_reason for one in self.generations)

    def fail(self, error: Exception) -> None:
        """End the request with an error, unless it has one."""
        self.error = self.error or error
        self.on_change()


class Worker:
    """Generates in one batch of up to ``batch_size`` sequences; waiting ones join as others finish.

    Args:
        model: A model in evaluation mode; only this worker may use it.
        tokenizer: Its end token ends a sequence.
        batch_size: Maximum number of sequences in the batch.
        queue: Maximum number of waiting sequences.
        cache_bytes: Maximum bytes of the cache when all sequences of the batch are longest. A sequence that would
            exceed it waits; one that exceeds it alone does not fit, and is the caller's to refuse.
        chunk: Maximum number of prompt tokens to compute between two steps.
        prefix_bytes: Maximum bytes of the prefixes of prompts that are kept for reuse.
        cuda_graphs: Whether steps are replayed as CUDA graphs.
        metrics: Where texts and times are counted.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        queue: int,
        cache_bytes: int = sys.maxsize,
        chunk: int = 128,
        prefix_bytes: int = 0,
        cuda_graphs: bool = False,
        metrics: ServerMetrics | None = None,
    ) -> None:
        self._model = model
        self._batch_size = batch_size
        self._queue = queue
        self._cache_bytes = cache_bytes
        self._metrics = metrics or ServerMetrics()
        self._changed = threading.Condition()
        self._waiting: deque[Generation] = deque()
        self._calls: deque[tuple[Callable[[PreTrainedModel], Any], Future[Any]]] = deque()
        self._dropped: list[Generation] = []
        self._jobs: dict[Generation, Job] = {}
        self._stopping = False
        self._decoder = ChunkedDecoder(
            model,
            tokenizer,
            chunk=chunk,
            prefix_bytes=prefix_bytes,
            cuda_graphs=cuda_graphs,
            cache_bytes=cache_bytes,
        )
        self.largest_batch = 0
        """The largest number of sequences in the batch so far."""
        self._metrics.cache_limit.set(cache_bytes)
        self._metrics.waiting.set_function(lambda: len(self._waiting))
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Add a request's generations to the queue.

        Raises:
            QueueFullError: If the queue has no room for them.
            StoppedError: If the worker stops.
        """
        with self._changed:
            self._check_running()
            if len(self._waiting) + len(job.generations) > self._queue:
                raise QueueFullError
            self._waiting.extend(job.generations)
            self._jobs.update(dict.fromkeys(job.generations, job))
            self._metrics.submitted(job.generations)
            self._changed.notify()

    def call(self, compute: Callable[[PreTrainedModel], Any]) -> Future[Any]:
        """Run another computation with the model, between two steps of generation.

        Raises:
            QueueFullError: If too many computations wait.
            StoppedError: If the worker stops.
        """
        with self._changed:
            self._check_running()
            if len(self._calls) >= self._queue:
                raise QueueFullError
            result: Future[Any] = Future()
            self._calls.append((compute, result))
            self._changed.notify()
            return result

    def drop(self, job: Job) -> None:
        """Cancel a request's generations."""
        with self._changed:
            self._dropped += [one for one in job.generations if one in self._jobs]
            self._changed.notify()

    def longest_text(self, limit: int) -> int:
        """Return the number of tokens up to a limit that a text alone may have, so that its cache fits."""
        return bisect_right(range(limit + 1), self._cache_bytes, key=self._decoder.nbytes_of_text) - 1

    @property
    def busy(self) -> bool:
        """Whether any sequence is being generated or waits."""
        with self._changed:
            return bool(self._jobs)

    def stop(self) -> None:
        """End all requests with `StoppedError`, and the thread after its current step."""
        with self._changed:
            self._stopping = True
            jobs = dict.fromkeys(self._jobs.values())
            calls = [result for _, result in self._calls]
            self._jobs.clear()
            self._calls.clear()
            self._changed.notify()
        for job in jobs:
            job.fail(StoppedError())
        for result in calls:
            if result.set_running_or_notify_cancel():
                result.set_exception(StoppedError())

    def join(self) -> None:
        """Wait until the thread has ended."""
        self._thread.join()

    def _check_running(self) -> None:
        if self._stopping:
            raise StoppedError

    def _run(self) -> None:
        device = self._model.device
        if device.type == "cuda":  # the current device is one of a thread; a new thread has cuda:0
            torch.cuda.set_device(device)
        while True:
            with self._changed:
                self._changed.wait_for(self._has_work)
                if self._stopping:
                    return
                dropped = self._dropped
                self._dropped = []
                for generation in dropped:
                    self._jobs.pop(generation, None)
                    self._metrics.ended(generation, "cancelled")
                    with suppress(ValueError):
                        self._waiting.remove(generation)

                calls = [self._calls.popleft()] if self._calls else []
                new = self._admitted()

            for compute, result in calls:
                self._compute(compute, result)
            self._generate(new, dropped)

    def _admitted(self) -> list[Generation]:
        """Take waiting sequences, in their order, as long as the batch and the cache have room for the next one."""
        active = self._decoder.active
        admitted: list[Generation] = []
        while self._waiting and len(active) + len(admitted) < self._batch_size:
            batch = [*active, *admitted, self._waiting[0]]
            if len(batch) > 1 and self._decoder.nbytes_of(batch) > self._cache_bytes:
                break
            admitted.append(self._waiting.popleft())
        return admitted

    def _has_work(self) -> bool:
        return bool(self._stopping or self._waiting or self._calls or self._dropped or self._decoder.active)

    def _compute(self, compute: Callable[[PreTrainedModel], Any], result: Future[Any]) -> None:
        if not result.set_running_or_notify_cancel():
            return
        try:
            result.set_result(compute(self._model))
        except Exception as error:  # only the caller gets the error; other requests continue
            result.set_exception(error)

    def _generate(self, new: list[Generation], dropped: list[Generation]) -> None:
        """Compute a chunk of new prompts, and generate a token of the others: new ones never hold them up."""
        batch = [*self._decoder.active, *new]
        error: Exception | None = None
        begin = time.monotonic()
        try:
            for generation in dropped:
                self._decoder.drop(generation)
            batch = [*self._decoder.active, *new]
            self.largest_batch = max(self.largest_batch, len(batch))
            if new:
                self._decoder.add(new)
            if self._decoder.active:
                self._decoder.step()
        except Exception as failure:  # most likely out of memory: this batch fails, the next starts with a new cache
            error = failure
            self._decoder.reset()
        self._metrics.stepped(batch, time.monotonic() - begin)
        self._metrics.running.set(len(self._decoder.active))
        self._metrics.cache.set(self._decoder.nbytes)
        self._metrics.prefixes.set(self._decoder.prefixes.nbytes)
        self._report(batch, error)

    def _report(self, batch: list[Generation], error: Exception | None) -> None:
        """Notify the requests of a batch of their new tokens, or of the error of a text or of the whole batch."""
        with self._changed:
            jobs = {generation: job for generation in batch if (job := self._jobs.get(generation))}
            for generation in jobs:
                if generation.finish_reason or error:
                    del self._jobs[generation]
                    self._metrics.ended(generation, generation.finish_reason or "error")
        for generation, job in jobs.items():
            job.error = job.error or generation.error or error
        for job in dict.fromkeys(jobs.values()):
            job.on_change()
