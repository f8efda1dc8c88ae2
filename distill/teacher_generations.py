"""Answers that the teacher generates for the data, cached on disk, for sequence-level distillation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from hymba_tune.config import DistillConfig, OnBadRow
from hymba_tune.data import Conversation, Message
from hymba_tune.data.building import stopped
from hymba_tune.data.chat import Rendered, render_prompt, tokenize
from hymba_tune.data.converting import TARGETS
from hymba_tune.data.encoding import readings
from hymba_tune.data.sources import Source
from hymba_tune.distill.alignment_report import CAUSES
from hymba_tune.distill.outputs import Teacher
from hymba_tune.distill.pair import TokenizerPair, conversation_for_teacher, left_out, without_output
from hymba_tune.errors import ConfigError, DataError
from hymba_tune.files import LOCK, locked, write_text

BATCH = 16
"""Prompts in a batch."""
ANSWERS, PART = "answers.jsonl", "answers.part.jsonl"
"""The finished data; and the file in progress, with a line for each conversation, null where it has no answer."""


@dataclass(frozen=True)
class TeacherGenerations:
    """A file of answers that a teacher generated.

    Attributes:
        path: The conversations, each with the generated answer at its end. The loss covers that answer only.
        rows: The number of conversations.
        left_out: The number of conversations whose answer did not end or is not a text.
        texts: The number of plain texts, which have no answer.
    """

    path: Path
    rows: int
    left_out: int
    texts: int


class TeacherGenerator:
    """Generates the teacher's answer to each conversation of the data, in place of its last answer.

    Args:
        config: The run's settings.
        sources: The sources of the run's data.
        pair: The two tokenizers.
        teacher: A function that returns the teacher's fingerprint. It is called after the data has been read, because
            it may download the teacher's weights.

    Raises:
        ConfigError: If a source has a weight above 1.
    """

    def __init__(
        self, config: DistillConfig, sources: Sequence[Source], pair: TokenizerPair, teacher: Callable[[], str]
    ) -> None:
        if repeated := next((source for source in sources if source.weight > 1), None):
            raise ConfigError(
                f"--loss seq generates one answer for each conversation, and {repeated.name} has weight "
                f"{repeated.weight:g}.",
                fix="--weights of at most 1",
            )
        self._config, self._sources, self._pair, self._teacher = config, sources, pair, teacher
        self._ends = pair.teacher.ends
        self._texts = 0

    def key(self, progress: Callable[[int], None]) -> str:
        """Return a digest of what determines the answers: the teacher's prompts and the generation settings."""
        config = self._config
        digest = hashlib.sha256()
        number = 0
        for number, (_, prompt) in enumerate(self._talks(), start=1):
            digest.update(json.dumps(prompt).encode())
            progress(number)
        if not number:
            raise DataError(
                "--loss seq: the data has no conversations, only texts.",
                expected="conversations whose answers the teacher generates",
                fix="--loss auto, which trains on texts as well",
            )
        settings: list[Any] = [self._teacher(), config.teacher_quantize, config.teacher_dtype, config.answer_tokens]
        settings += [config.answer_temperature, config.seed, BATCH, *self._ends]
        digest.update(json.dumps(settings).encode())
        return digest.hexdigest()

    def write(self, folder: Path, load: Callable[[], Teacher], progress: Callable[[int], None]) -> TeacherGenerations:
        """Generate the missing answers. A complete folder needs no teacher.

        Args:
            folder: The folder of this `key`.
            load: Loads the teacher.
            progress: Called with the number of conversations answered so far.
        """
        if not (folder / ANSWERS).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            with locked(folder / LOCK, f"The folder of the teacher's answers, {folder},"):
                self._continue(folder / PART, load, progress)
            rows = [line for line in _lines(folder / PART) if line != "null"]
            write_text(folder / ANSWERS, "".join(f"{row}\n" for row in rows))
        rows, prompted = _lines(folder / ANSWERS), _lines(folder / PART)
        if not rows:
            raise DataError(
                f"The teacher ended none of its {len(prompted):,} answers within --answer-tokens "
                f"{self._config.answer_tokens:,}.",
                expected="answers that end",
                fix="a larger --answer-tokens; or --teacher-end, if its chat template ends answers with another token",
            )
        return TeacherGenerations(folder / ANSWERS, len(rows), len(prompted) - len(rows), self._texts)

    def _continue(self, part: Path, load: Callable[[], Teacher], progress: Callable[[int], None]) -> None:
        done = len(_lines(part)) // BATCH * BATCH
        _truncate(part, done)  # an interruption may have left half a batch
        talks, teacher = islice(self._talks(), done, None), None
        with part.open("a", encoding="utf-8") as file:
            while batch := list(islice(talks, BATCH)):
                teacher = teacher or load()
                answers = self._answer(teacher, [prompt for _, prompt in batch], done // BATCH)
                for (talk, _), answer in zip(batch, answers, strict=True):
                    file.write(json.dumps(_row(talk, answer), ensure_ascii=False) + "\n")
                file.flush()
                done += len(batch)
                progress(done)

    def _answer(self, teacher: Teacher, prompts: Sequence[list[int]], number: int) -> list[str | None]:
        """Generate answers to a batch of prompts. The seed depends on the number of the batch only."""
        config = self._config
        seed = int(hashlib.sha256(f"{config.seed} {number}".encode()).hexdigest()[:15], 16)
        return teacher.generate(
            prompts,
            ends=self._ends,
            max_new_tokens=config.answer_tokens,
            temperature=config.answer_temperature,
            seed=seed,
            decode=self._decode,
        )

    def _decode(self, answer: list[int]) -> str | None:
        spelling = self._pair.teacher.spelling
        if answer[-1] not in self._ends or max(answer) >= len(spelling):
            return None
        try:
            return spelling.spell(answer[:-1]).decode().strip() or None
        except UnicodeDecodeError:
            return None

    def _prompt(self, talk: Conversation) -> list[int]:
        """Return the teacher's tokens up to the last answer.

        Raises:
            DataError: If the chat template refuses the conversation or leaves out a text of it, or the teacher cannot
                read a token.
        """
        before = replace(talk, messages=talk.messages[: _last_answer(talk)])
        prompt = conversation_for_teacher(before, self._pair)
        tokenizer, fix = self._pair.teacher.tokenizer, f"likely, {CAUSES['template']}"
        try:
            text = render_prompt(prompt, tokenizer)
        except DataError as error:
            raise DataError(f"for the teacher, {error.what}", fix=fix) from error
        if missing := left_out(prompt, text):
            raise DataError(
                f"the teacher's chat template leaves out {missing}", fix=f"likely, {CAUSES['text left out']}"
            )
        ids = tokenize([Rendered(text, ())], tokenizer)[0].input_ids
        if problem := without_output(ids, self._pair):
            raise DataError(problem, fix=f"likely, {CAUSES['no output']}")
        return ids

    def _talks(self) -> Iterator[tuple[Conversation, list[int]]]:
        """Yield the conversations of the data that can be used, with the teacher's prompts."""
        config, self._texts = self._config, 0
        rows = readings(
            self._sources,
            self._pair.student.tokenizer,
            learn=config.learn,
            seed=config.seed,
        )
        for reading in rows:
            prompt: list[int] = []
            if not reading.problem and isinstance(reading.example, Conversation):
                try:
                    prompt = self._prompt(reading.example)
                except DataError as problem:
                    reading.problem = problem
            if reading.problem:
                if config.on_bad_row is OnBadRow.stop:
                    raise stopped(reading, rows)
            elif isinstance(reading.example, Conversation):
                yield reading.example, prompt
            else:
                self._texts += 1


def _last_answer(talk: Conversation) -> int:
    return max(index for index, message in enumerate(talk.messages) if message.role == "assistant")


def _row(talk: Conversation, answer: str | None) -> dict[str, Any] | None:
    """Return a conversation with this answer as its last one, which is the only one with a loss."""
    if answer is None:
        return None
    before = (
        replace(message, weight=float(message.role != "assistant")) for message in talk.messages[: _last_answer(talk)]
    )
    return TARGETS["messages"].row(replace(talk, messages=(*before, Message("assistant", answer))))


def _lines(path: Path) -> list[str]:
    """Return the complete lines of a file; none if it does not exist."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    return text[: text.rfind("\n") + 1].split("\n")[:-1]


def _truncate(path: Path, lines: int) -> None:
    """Truncate a file to its first lines, if it exists."""
    if path.is_file():
        with path.open("rb+") as file:
            for _ in range(lines):
                file.readline()
            file.truncate()
