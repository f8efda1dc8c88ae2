"""Answers that the teacher generates for the data, cached on disk, for sequence-level distillation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from hymba_tune.config import DistillConfig, OnBadRow
from hymba_tune.data import Conversation, Message
from hymba_tune.data.building import stopped
from hymba_tune.data.chat import Rendered, render_prompt, tokenize
from hymba_tune.data.converting import TARGETS
from hymba_tune.data.encoding import read_question, readings
from hymba_tune.data.sources import Source
from hymba_tune.distill.alignment_report import CAUSES
from hymba_tune.distill.outputs import Teacher
from hymba_tune.distill.pair import TokenizerPair, conversation_for_teacher, left_out, without_output
from hymba_tune.distributed.shared_files import make_once, make_together
from hymba_tune.errors import ConfigError, DataError
from hymba_tune.files import atomic_write, remove_leftovers, write_text

BATCH = 16
"""Prompts in a batch."""
SHARD = 4
"""Batches in a shard, which is the most work that an interruption can lose."""
SHARDS = "?????.jsonl"
"""The pattern of the shards' names."""
ANSWERS, PART = "answers.jsonl", "answers.part.jsonl"
"""The finished data; and all answers, with a line for each conversation, null where it has no answer.

Until they are finished, shards have the answers of `SHARD` batches each, also with a line for each conversation.
"""


class Questions(NamedTuple):
    """What the teacher is to answer.

    Attributes:
        key: A digest of what determines the answers: the teacher's prompts and the generation settings.
        conversations: The number of conversations.
        texts: The number of plain texts, which have no answer.
    """

    key: str
    conversations: int
    texts: int


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
    """Generates the teacher's answer to each conversation: in place of its last answer, or to its last question.

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

    def questions(self, progress: Callable[[int], None]) -> Questions:
        """Read what the teacher is to answer.

        Args:
            progress: Called with the number of conversations read so far.

        Raises:
            DataError: If there are no conversations.
        """
        config = self._config
        digest = hashlib.sha256()
        conversations = texts = 0
        for talk, prompt in self._examples():
            if talk is None:
                texts += 1
                continue
            conversations += 1
            digest.update(json.dumps(prompt).encode())
            progress(conversations)
        if not conversations:
            raise DataError(
                "--loss seq: the data has no conversations, only texts.",
                expected="conversations whose answers the teacher generates",
                fix="--loss auto, which trains on texts as well",
            )
        settings: list[Any] = [self._teacher(), config.teacher_quantize, config.teacher_dtype, config.answer_tokens]
        settings += [config.answer_temperature, config.seed, BATCH, *self._ends]
        digest.update(json.dumps(settings).encode())
        return Questions(digest.hexdigest(), conversations, texts)

    def write(
        self, folder: Path, questions: Questions, load: Callable[[], Teacher], progress: Callable[[int], None]
    ) -> TeacherGenerations:
        """Generate the missing answers, together with all processes that do so. A complete folder needs no teacher.

        Args:
            folder: The folder of these questions.
            questions: What the teacher is to answer.
            load: Loads the teacher.
            progress: Called with the number of conversations answered so far, by whatever process.
        """
        if not (folder / ANSWERS).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            _Generating(self, folder, questions.conversations, load, progress).generate()
        rows, prompted = _lines(folder / ANSWERS), _lines(folder / PART)
        if not rows:
            raise DataError(
                f"The teacher ended none of its {len(prompted):,} answers within --answer-tokens "
                f"{self._config.answer_tokens:,}.",
                expected="answers that end",
                fix="a larger --answer-tokens; or --teacher-end, if its chat template ends answers with another token",
            )
        return TeacherGenerations(folder / ANSWERS, len(rows), len(prompted) - len(rows), questions.texts)

    def talks(self) -> Iterator[tuple[Conversation, list[int]]]:
        """Yield the conversations of the data that can be used, with the teacher's prompts."""
        return ((talk, prompt) for talk, prompt in self._examples() if talk is not None)

    def answer(self, teacher: Teacher, prompts: Sequence[list[int]], number: int) -> list[str | None]:
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

    def _examples(self) -> Iterator[tuple[Conversation | None, list[int]]]:
        """Yield the usable examples of the data: a conversation with the teacher's prompt, or None for a text."""
        config = self._config
        rows = readings(
            self._sources,
            self._pair.student.tokenizer,
            learn=config.learn,
            seed=config.seed,
            parse_row=read_question,
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
            else:
                yield reading.example if isinstance(reading.example, Conversation) else None, prompt


@dataclass
class _Generating:
    """The work of one process on the answers; see `TeacherGenerator.write`."""

    generator: TeacherGenerator
    folder: Path
    count: int
    load: Callable[[], Teacher]
    progress: Callable[[int], None]
    done: int = 0

    def __post_init__(self) -> None:
        self._size = SHARD * BATCH
        self._paths = [self.folder / f"{shard:05}.jsonl" for shard in range(-(-self.count // self._size))]
        self._talks, self._next = self.generator.talks(), 0

    @cached_property
    def _teacher(self) -> Teacher:
        return self.load()

    def generate(self) -> None:
        make_together(self._paths, self._is_complete, self._make, self._count)
        make_once(self.folder / ANSWERS, self._close)

    def _is_complete(self, shard: int) -> bool:
        return self._paths[shard].is_file() or (self.folder / ANSWERS).is_file()

    def _make(self, shard: int) -> None:
        self._count()
        lines: list[str] = []
        talks = self._read(shard)
        for begin in range(0, len(talks), BATCH):
            batch = talks[begin : begin + BATCH]
            number = shard * SHARD + begin // BATCH
            answers = self.generator.answer(self._teacher, [prompt for _, prompt in batch], number)
            rows = [_row(talk, answer) for (talk, _), answer in zip(batch, answers, strict=True)]
            lines += [json.dumps(row, ensure_ascii=False) for row in rows]
            self.progress(self.done + len(lines))
        with atomic_write(self._paths[shard], alone=False) as part:
            part.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def _read(self, shard: int) -> list[tuple[Conversation, list[int]]]:
        """Return the conversations of a shard; the data is read anew only for a shard that lies before the last one."""
        if shard < self._next:
            self._talks, self._next = self.generator.talks(), 0
        skipped, self._next = self._size * (shard - self._next), shard + 1
        return list(islice(self._talks, skipped, skipped + self._size))

    def _count(self) -> None:
        complete = sum(1 for _ in self.folder.glob(SHARDS))
        self.done = min(self.count, self._size * complete)
        self.progress(self.done)

    def _close(self) -> None:
        lines = [line for path in self._paths for line in _lines(path)]
        write_text(self.folder / PART, "".join(f"{line}\n" for line in lines))
        write_text(self.folder / ANSWERS, "".join(f"{line}\n" for line in lines if line != "null"))
        for path in self._paths:
            remove_leftovers(path)
            path.unlink()


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
