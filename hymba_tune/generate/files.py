"""A file of prompts, answered into a file of answers; what was written before an interruption is kept."""

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
from hymba_tune.generate.decoding import Sampling, Writing, write_texts
from hymba_tune.generate.opening import LoadableModel, find_model
from hymba_tune.inputs import check_inputs
from hymba_tune.registry import lasting_name

ANSWER = "model_answer"
"""Unlike the names of columns that data usually has: rows keep theirs."""


def answer_file(config: ChatConfig, working: Working) -> tuple[int, int]:
    """Answer every row of ``--from``, several at a time, into ``--to``: the row, and its answer.

    The answers stand in the order of the rows. They are written to a file beside ``--to``, which takes its place at the
    end; the same command goes on from there if it was stopped.

    Args:
        config: The files, the model, and how it answers.
        working: Told what is done.

    Returns:
        Rows answered now, and rows that had been answered before.

    Raises:
        HymbaTuneError: If a row or the model cannot be used, before any weights load.
    """
    check_inputs(config)
    source, target = _files(config)
    found = find_model(config.model, config)
    names = Names.parse(as_mapping(config.map), FIELDS)
    with working("reading the prompts") as progress:
        for count, _ in enumerate(_prompts(source, names, config.system), start=1):
            progress(count)
    part = target.with_name(f".{target.name}.{_key(source, config)}.part")
    with locked(target.with_name(f".{target.name}.lock"), f"--to {target}"):
        done = _answer_rest(config, found, source, names, part, working)
        with write_errors("--to", target):
            put_in_place(part, target, overwrite=config.overwrite)
    return done


def _answer_rest(
    config: ChatConfig, found: LoadableModel, source: Source, names: Names, part: Path, working: Working
) -> tuple[int, int]:
    """Answer the rows that ``part`` does not hold yet into it."""
    known = _whole_lines(part)
    with working(f"loading {found.source.name}"):
        model = found.load()
    sampling = Sampling(config.temperature, config.top_p)
    rows: dict[int, Any] = {}

    def texts() -> Iterator[Writing]:
        for number, (row, prompt) in enumerate(_prompts(source, names, config.system)):
            if number < known:
                continue
            rows[number] = row
            seed = None if config.seed is None else config.seed + number
            ids = encode_prompt(prompt, found.tokenizer)
            yield Writing(ids, config.max_new_tokens, replace(sampling, seed=seed), number=number)

    done = known
    answers: dict[int, str] = {}
    with (
        write_errors("--to", part),
        part.open("a", encoding="utf-8") as out,
        working(f"answering {source.name}") as progress,
    ):
        for written in write_texts(model, found.tokenizer, texts(), batch_size=config.batch_size):
            answers[written.number] = written.text(found.tokenizer).strip()
            while done in answers:
                row = rows.pop(done) | {ANSWER: answers.pop(done)}
                out.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
                out.flush()
                done += 1
                progress(done)
    return done - known, known


def _files(config: ChatConfig) -> tuple[Source, Path]:
    assert config.to is not None
    inputs = local_files([str(config.prompts)])
    check_file("--to", config.to, overwrite=config.overwrite, inputs=inputs)
    return open_source(str(config.prompts)), config.to


def _prompts(source: Source, names: Names, system: str | None) -> Iterator[tuple[dict[str, Any], Conversation]]:
    """Rows and what they ask, behind the system prompt where they have none of their own."""
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
    """The same for the same prompts, model and way to answer."""
    content = source.content() if source.content else source.name
    settings = config.model_dump(
        mode="json", include={"system", "max_new_tokens", "temperature", "top_p", "seed", "map"}
    )
    told = json.dumps([content, lasting_name(config.model), settings])
    return hashlib.sha256(told.encode()).hexdigest()[:12]


def _whole_lines(part: Path) -> int:
    """Rows answered before, after cutting off what was half written."""
    if not part.is_file():
        return 0
    raw = part.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    if len(whole) < len(raw):
        os.truncate(part, len(whole))
    return whole.count(b"\n")
