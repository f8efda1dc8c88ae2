"""The thread on which the model computes, for all requests together."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hymba_tune.generate import Decoder, Writing


class QueueFullError(Exception):
    """More texts wait than may."""


@dataclass(eq=False)
class Job:
    """A request's texts.

    Attributes:
        texts: Written on the worker's thread.
        on_change: Called there whenever one of them has grown or ended.
        error: What went wrong, if something did; the texts stay as they were.
    """

    texts: Sequence[Writing]
    on_change: Callable[[], None]
    error: str | None = None

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return self.error is not None or all(text.ended for text in self.texts)


class Worker:
    """Writes up to ``batch_size`` texts side by side; further ones join as others end.

    Args:
        model: In evaluation mode; nobody else may use it.
        tokenizer: Whose end token ends a text.
        batch_size: Texts at a time.
        queue: Texts that may wait.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int, queue: int
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._batch_size, self._queue = batch_size, queue
        self._changed = threading.Condition()
        self._waiting: deque[Writing] = deque()
        self._calls: deque[tuple[Callable[[PreTrainedModel], Any], Future[Any]]] = deque()
        self._dropped: list[Writing] = []
        self._jobs: dict[Writing, Job] = {}
        self._stopping = False
        self._decoder = Decoder(model, tokenizer)
        self.most_at_once = 0
        """The most texts that were written side by side so far."""
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Let a request's texts be written.

        Raises:
            QueueFullError: If too many wait.
        """
        with self._changed:
            if len(self._waiting) + len(job.texts) > self._queue:
                raise QueueFullError
            self._waiting.extend(job.texts)
            self._jobs.update(dict.fromkeys(job.texts, job))
            self._changed.notify()

    def call(self, compute: Callable[[PreTrainedModel], Any]) -> Future[Any]:
        """Let something else be computed with the model, between two tokens.

        Raises:
            QueueFullError: If too many wait.
        """
        with self._changed:
            if len(self._calls) >= self._queue:
                raise QueueFullError
            result: Future[Any] = Future()
            self._calls.append((compute, result))
            self._changed.notify()
            return result

    def drop(self, job: Job) -> None:
        """Write no more of a request's texts: nobody waits for them."""
        with self._changed:
            self._dropped += [text for text in job.texts if text in self._jobs]
            self._changed.notify()

    @property
    def busy(self) -> bool:
        """Whether texts are being written or wait."""
        with self._changed:
            return bool(self._jobs)

    def stop(self) -> None:
        """End the thread after what it is at."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._has_work)
                if self._stopping:
                    return
                dropped, self._dropped = self._dropped, []
                for text in dropped:
                    self._jobs.pop(text, None)
                    with suppress(ValueError):
                        self._waiting.remove(text)
                calls = [self._calls.popleft()] if self._calls else []
                room = self._batch_size - len(self._decoder.texts)
                new = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
            for text in dropped:
                self._decoder.drop(text)
            for compute, result in calls:
                self._compute(compute, result)
            self._write(new)

    def _has_work(self) -> bool:
        return bool(self._stopping or self._waiting or self._calls or self._dropped or self._decoder.texts)

    def _compute(self, compute: Callable[[PreTrainedModel], Any], result: Future[Any]) -> None:
        if not result.set_running_or_notify_cancel():
            return
        try:
            result.set_result(compute(self._model))
        except Exception as error:  # whoever asked for it is told; the others go on
            result.set_exception(error)

    def _write(self, new: list[Writing]) -> None:
        """One token more: of the new texts if there are any, else of all."""
        texts = [*self._decoder.texts, *new]
        self.most_at_once = max(self.most_at_once, len(texts))
        error = None
        try:
            if new:
                self._decoder.add(new)
            elif texts:
                self._decoder.step()
        except Exception as problem:  # out of memory, most likely: these texts fail, and the next begin afresh
            error = f"{type(problem).__name__}: {problem}"
            self._decoder = Decoder(self._model, self._tokenizer)
        with self._changed:
            jobs = dict.fromkeys(job for text in texts if (job := self._jobs.get(text)))
            for text in texts:
                if text.ended or error:
                    self._jobs.pop(text, None)
        for job in jobs:
            job.error = job.error or error
            job.on_change()
