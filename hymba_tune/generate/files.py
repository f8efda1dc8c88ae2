"""Batch inference from a file of prompts to a file of answers; an interrupted run resumes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hymba_tune.config import ChatConfig, as_mapping
from hymba_tune.data import Conversation, Message, RowError, Source, encode_prompt, open_source
from hymba_tune.data.formats import Names
from hymba_tune.data.mixes import local_files
from hymba_tune.data.prompts import FIELDS, parse_prompt
from hymba_tune.data.training import Working
from hymba_tune.errors import DataError
from hymba_tune.files import check_file, locked, put_in_place, write_errors
from hymba_tune.files.checkpoints import at_checkpoint
from hymba_tune.generate.decoding import generate_texts
from hymba_tune.generate.generation import Generation
from hymba_tune.generate.opening import LoadableModel, find_model
from hymba_tune.generate.sampling import Sampling
from hymba_tune.inputs import check_inputs
from hymba_tune.registry import lasting_name

ANSWER = "model_answer"
"""The column of the answers; a name that input data rarely has, so that rows keep their own columns."""


def answer_file(config: ChatConfig, working: Working) -> tuple[int, int]:
    """Answer every row of ``--from`` in batches, and write each row with its answer to ``--to``.

    The answers are in the order of the rows. They are written to a partial file in the folder of ``--to``, which is
    renamed to ``--to`` at the end. If the command is interrupted, running it again resumes from the partial file.

    Args:
        config: The files, the model and the generation settings.
        working: Shows progress.

    Returns:
        The number of rows answered by this call, and of rows answered before.

    Raises:
        HymbaTuneError: If a row or the model cannot be used; raised before any weights load.
    """
    check_inputs(config)
    source, target = _files(config)
    loadable = find_model(at_checkpoint(config.model, config.checkpoint), config)
    names = Names.parse(as_mapping(config.map), FIELDS)
    with working("reading the prompts") as progress:
        for count, _ in enumerate(_prompts(source, names, config.system), start=1):
            progress(count)
    part = target.with_name(f".{target.name}.{_key(source, config)}.part")
    with locked(target.with_name(f".{target.name}.lock"), f"--to {target}"):
        counts = _answer_rest(config, loadable, source, names, part, working)
        with write_errors("--to", target):
            put_in_place(part, target, overwrite=config.overwrite)
    return counts


def _answer_rest(
    config: ChatConfig, loadable: LoadableModel, source: Source, names: Names, part: Path, working: Working
) -> tuple[int, int]:
    """Answer the rows that are not in the partial file yet, and append them to it."""
    answered_before = _whole_lines(part)
    with working(f"loading {loadable.source.name}"):
        model = loadable.load()
    sampling = Sampling(config.temperature, config.top_p)
    rows: dict[int, Any] = {}

    def generations() -> Iterator[Generation]:
        for number, (row, prompt) in enumerate(_prompts(source, names, config.system)):
            if number < answered_before:
                continue
            rows[number] = row
            seed = None if config.seed is None else config.seed + number
            ids = encode_prompt(prompt, loadable.tokenizer)
            yield Generation(ids, config.max_new_tokens, replace(sampling, seed=seed), number=number)

    done = answered_before
    answers: dict[int, str] = {}
    with (
        write_errors("--to", part),
        part.open("a", encoding="utf-8") as out,
        working(f"answering {source.name}") as progress,
    ):
        for generation in generate_texts(
            model,
            loadable.tokenizer,
            generations(),
            batch_size=config.batch_size,
            cuda_graphs=config.cuda_graphs,
        ):
            answers[generation.number] = generation.text(loadable.tokenizer).strip()
            while done in answers:
                row = rows.pop(done) | {ANSWER: answers.pop(done)}
                out.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
                out.flush()
                done += 1
                progress(done)
    return done - answered_before, answered_before


def _files(config: ChatConfig) -> tuple[Source, Path]:
    assert config.to is not None
    inputs = local_files([str(config.prompts)])
    check_file("--to", config.to, overwrite=config.overwrite, inputs=inputs)
    return open_source(str(config.prompts)), config.to


def _prompts(source: Source, names: Names, system: str | None) -> Iterator[tuple[dict[str, Any], Conversation]]:
    """Each row and its prompt; the system prompt is added to prompts without one."""
    for row in source:
        try:
            if row.error:
                raise row.error
            prompt = parse_prompt(row.value, names)
        except DataError as problem:
            raise RowError(row.place, problem) from problem
        if system and prompt.messages[0].role != "system":
            prompt = replace(prompt, messages=(Message("system", system), *prompt.messages))
        assert isinstance(row.value, Mapping)
        yield dict(row.value), prompt


def _key(source: Source, config: ChatConfig) -> str:
    """A hash of the prompts, the model and the generation settings."""
    content = source.content() if source.content else source.name
    settings = config.model_dump(
        mode="json", include={"system", "max_new_tokens", "temperature", "top_p", "seed", "map"}
    )
    key = json.dumps([content, lasting_name(at_checkpoint(config.model, config.checkpoint)), settings])
    return hashlib.sha256(key.encode()).hexdigest()[:12]


def _whole_lines(part: Path) -> int:
    """The number of complete rows in a partial file; an incomplete last line is removed."""
    if not part.is_file():
        return 0
    raw = part.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    if len(whole) < len(raw):
        os.truncate(part, len(whole))
    return whole.count(b"\n")
