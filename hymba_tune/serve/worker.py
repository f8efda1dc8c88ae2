"""The thread that runs the model for all requests."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hymba_tune.generate import Decoder, Generation


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
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int, queue: int
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        self._queue = queue
        self._changed = threading.Condition()
        self._waiting: deque[Generation] = deque()
        self._calls: deque[tuple[Callable[[PreTrainedModel], Any], Future[Any]]] = deque()
        self._dropped: list[Generation] = []
        self._jobs: dict[Generation, Job] = {}
        self._stopping = False
        self._decoder = Decoder(model, tokenizer)
        self.largest_batch = 0
        """The largest number of sequences in the batch so far."""
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
        while True:
            with self._changed:
                self._changed.wait_for(self._has_work)
                if self._stopping:
                    return
                dropped = self._dropped
                self._dropped = []
                for generation in dropped:
                    self._jobs.pop(generation, None)
                    with suppress(ValueError):
                        self._waiting.remove(generation)

                calls = [self._calls.popleft()] if self._calls else []
                free = self._batch_size - len(self._decoder.active)
                new = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]

            for compute, result in calls:
                self._compute(compute, result)
            self._generate(new, dropped)

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
        """Generate the first token of new sequences, and a further one of all: new ones never hold up the others."""
        batch = [*self._decoder.active, *new]
        error: Exception | None = None
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
            self._decoder = Decoder(self._model, self._tokenizer)
        self._report(batch, error)

    def _report(self, batch: list[Generation], error: Exception | None) -> None:
        """Notify the requests of a batch of their new tokens, or of the error of a text or of the whole batch."""
        with self._changed:
            jobs = {generation: job for generation in batch if (job := self._jobs.get(generation))}
            for generation in jobs:
                if generation.finish_reason or error:
                    del self._jobs[generation]
        for generation, job in jobs.items():
            job.error = job.error or generation.error or error
        for job in dict.fromkeys(jobs.values()):
            job.on_change()
