"""Loads a teacher's targets from a folder, or computes the missing ones."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from hymba_tune.adapters import folders_of, tokenizer_of, weights_of
from hymba_tune.checkpoint import choose_device, choose_dtype, load_config
from hymba_tune.config import DistillCaptureConfig, TeacherOptions, as_mapping
from hymba_tune.data import cache_folder, with_chat_template
from hymba_tune.data.mixes import local_files
from hymba_tune.distill.alignment_report import check_aligned
from hymba_tune.distill.cache import (
    FLAG,
    SHARD,
    SHARDS,
    TARGETS,
    VERSION,
    WIDE,
    Key,
    TargetCache,
    check_key,
    fill,
    is_full,
    key_digest,
    shard_path,
)
from hymba_tune.distill.outputs import TeacherSpec
from hymba_tune.distill.pair import TokenizerPair, make_pair
from hymba_tune.distill.preflight import Preflight, run_preflight
from hymba_tune.distill.rows import AlignedData, alignment, read_rows
from hymba_tune.distill.server import find_server
from hymba_tune.distill.tables import count_first_tokens, pair_key, same_tokenizer
from hymba_tune.distill.target_maker import TargetMaker
from hymba_tune.distill.teacher import find_teacher, parameters_of, read_tokenizer, smaller_than
from hymba_tune.distributed.processes import agree, first_of_node, from_main, gathered, join, leave
from hymba_tune.errors import ConfigError
from hymba_tune.files import LOCK, check_folder, locked, make_folders, remove_empty, replacing, write_errors
from hymba_tune.formatting import format_bytes
from hymba_tune.inputs import check_inputs
from hymba_tune.registry import TEACHERS, ModelSource, resolve_model
from hymba_tune.train.screen import Screen

PINNED = {"date_string": "26 Jul 2024"}
"""Template values that default to today's date, so that the same data would give other rows on another day."""
READ_ROWS = 1000
MARGIN = 1.1
"""Required disk space relative to the estimate."""


def pair_of(options: TeacherOptions, student: PreTrainedTokenizerBase, teacher: TeacherSpec) -> TokenizerPair:
    """Create the pair of tokenizers according to the settings.

    Raises:
        ConfigError: If a template or an end token cannot be used.
        DataError: If a tokenizer's tokens do not determine the bytes of a text.
    """
    tokenizer = with_chat_template(teacher.tokenizer, options.teacher_chat_template, flag="--teacher-chat-template")
    template = str(tokenizer.chat_template)
    values = {name: value for name, value in PINNED.items() if name in template}
    return make_pair(
        student,
        tokenizer,
        teacher_end=options.teacher_end,
        teacher_system=options.teacher_system,
        teacher_system_as=options.teacher_system_as,
        teacher_template=values | as_mapping(options.teacher_template),
        teacher_outputs=teacher.config.get_text_config().vocab_size if teacher.config is not None else None,
    )


def load_target_maker(
    options: TeacherOptions,
    rows: datasets.Dataset,
    pair: TokenizerPair,
    teacher: TeacherSpec,
    *,
    vocabulary: int,
    device: torch.device,
) -> TargetMaker:
    """Load a teacher, and create its target maker.

    Args:
        options: The settings of the teacher.
        rows: The rows from `read_rows`, in which first student tokens are counted.
        pair: The two tokenizers.
        teacher: The teacher, not loaded.
        vocabulary: The rows of the student's output layer.
        device: The device of the teacher and the targets.
    """
    return TargetMaker.of(
        teacher.load(device, choose_dtype(options.teacher_dtype, device)),
        pair,
        None if same_tokenizer(pair) else count_first_tokens(map(alignment, rows)),
        vocabulary=vocabulary,
        top_k=options.top_k,
        temperature=options.temperature,
        device=device,
        tables_dir=cache_folder("pairs"),
    )


def cache_key(
    options: TeacherOptions, rows: datasets.Dataset, pair: TokenizerPair, teacher: TeacherSpec, *, vocabulary: int
) -> Key:
    """Return everything that determines the targets, by names that a user understands."""

    def template(side: PreTrainedTokenizerBase) -> str:
        return _digest(str(side.chat_template))

    return {
        "version": VERSION,
        "teacher": teacher.fingerprint,
        "quantization": teacher.quantize,
        "pair of tokenizers": pair_key(pair),
        "student's chat template": template(pair.student.tokenizer),
        "teacher's chat template": template(pair.teacher.tokenizer),
        "teacher's system message": pair.teacher_system,
        "role of the teacher's system message": pair.teacher_system_as,
        "vocabulary": vocabulary,
        "top_k": min(options.top_k, vocabulary),
        "temperature": options.temperature,
        "data": _digest_rows(rows),
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _digest_rows(rows: datasets.Dataset) -> str:
    """Return the SHA-256 of the rows in both sides' tokens."""
    names = [name for name in rows.column_names if name not in ("row", "place")]
    table, digest = rows.select_columns(names).with_format("arrow"), hashlib.sha256(json.dumps(names).encode())
    for begin in range(0, len(rows), READ_ROWS):
        part = table[begin : begin + READ_ROWS]
        for name in names:
            lists = part[name].combine_chunks()
            digest.update(lists.value_lengths().to_numpy(zero_copy_only=False).tobytes())
            digest.update(np.ascontiguousarray(lists.flatten().to_numpy(zero_copy_only=False)).tobytes())
    return digest.hexdigest()


def open_targets(
    options: TeacherOptions,
    data: AlignedData,
    pair: TokenizerPair,
    teacher: TeacherSpec,
    *,
    vocabulary: int,
    device: torch.device,
    screen: Screen,
    overwrite: Iterable[Path] | None = None,
) -> TargetCache:
    """Open the teacher's targets of all rows. The teacher is loaded only if some are missing.

    All processes of a run call it together, and each computes a part of what is missing.

    Args:
        options: The settings of the teacher and its targets.
        data: The rows in both sides' tokens.
        pair: The two tokenizers.
        teacher: The teacher, not loaded.
        vocabulary: The rows of the student's output layer.
        device: The device of the teacher.
        screen: Shows the progress.
        overwrite: Replace other targets in the named folder, unless that would remove one of these inputs.

    Raises:
        ConfigError: If the named folder has other targets, or its disk is too small.
        TrainingError: If a value of the preflight is below its minimum.
    """
    check_aligned(data.alignment, options.min_aligned)
    with screen.working("reading the data of the targets"):
        key = from_main(
            partial(cache_key, options, data.rows, pair, teacher, vocabulary=vocabulary),
            "reading the data of the targets",
        )
    folder = options.teacher_cache or cache_folder("targets") / key_digest(key)
    what = "looking at the folder of the targets"
    replaces = from_main(lambda: overwrite is not None and _holds_others(folder, key), what)
    if not replaces:
        check_key(folder, key)
        # Machines may have folders of their own, so that each process looks, and all of them go on in the same way.
        if all(gathered(is_full(folder))):
            screen.note(f"the teacher's targets are in {folder} already: it is not loaded")
            return TargetCache(folder)
    with ExitStack() as held:
        if options.teacher_cache is not None:  # in the user's cache the name of a folder is made of its key
            hold = partial(_held, folder, key, overwrite if replaces else None)
            from_main(lambda: held.enter_context(hold()), what)
        return _capture(options, data, pair, teacher, folder, key, vocabulary=vocabulary, device=device, screen=screen)


def _holds_others(folder: Path, key: Key) -> bool:
    try:
        check_key(folder, key)
    except ConfigError:
        return True
    return False


@contextmanager
def _held(folder: Path, key: Key, replaced: Iterable[Path] | None) -> Iterator[None]:
    """Lock the folder of the targets, and move other targets in it aside.

    Other processes may fill the folder at the same time, but none may replace what it holds.

    Args:
        folder: The folder, which need not exist.
        key: Everything that determines the targets.
        replaced: Inputs that must not be removed with the targets that the folder holds; None if it holds no others.
    """
    with write_errors(FLAG, folder):
        made = make_folders(folder)
    try:
        with locked(folder / LOCK, f"{FLAG} {folder}", shared=replaced is None):
            if replaced is None:
                check_key(folder, key)
                yield
            else:
                check_folder(folder, TARGETS, flag=FLAG, overwrite=True, inputs=replaced)
                with replacing(folder, TARGETS, lambda: any(folder.glob(SHARDS))):
                    yield
    finally:
        remove_empty(made)


def _capture(
    options: TeacherOptions,
    data: AlignedData,
    pair: TokenizerPair,
    teacher: TeacherSpec,
    folder: Path,
    key: Key,
    *,
    vocabulary: int,
    device: torch.device,
    screen: Screen,
) -> TargetCache:
    """Load the teacher, check that it fits, and fill a folder with its targets."""
    maker, preflight = try_teacher(options, data, pair, teacher, vocabulary=vocabulary, device=device, screen=screen)
    screen.banner(preflight.lines() | {"folder": str(folder)})
    check_preflight(options, preflight)
    check_space(folder, preflight, len(data.rows))
    with screen.working("computing the teacher's targets", len(data.rows)) as progress:
        return fill(folder, key, data.rows, maker, progress)


def try_teacher(
    options: TeacherOptions,
    data: AlignedData,
    pair: TokenizerPair,
    teacher: TeacherSpec,
    *,
    vocabulary: int,
    device: torch.device,
    screen: Screen,
) -> tuple[TargetMaker, Preflight]:
    """Load a teacher and try it on a few rows; see `open_targets` for the arguments."""
    with screen.working("loading the teacher"):
        maker = load_target_maker(options, data.rows, pair, teacher, vocabulary=vocabulary, device=device)
    what = "trying the teacher on a few rows"
    with screen.working(what):
        wide = vocabulary > WIDE
        preflight = from_main(lambda: run_preflight(maker, data.rows, data.alignment, pair, wide=wide), what)
    return maker, preflight


def check_preflight(options: TeacherOptions, preflight: Preflight) -> None:
    """Check the preflight against the minimum values of the settings; see `Preflight.check`."""
    preflight.check(
        min_aligned=options.min_aligned,
        min_probability=options.min_teacher_probability,
        min_end=options.min_end_probability,
    )


def check_space(folder: Path, preflight: Preflight, rows: int) -> None:
    """Check that the disk has room for the missing targets.

    Raises:
        ConfigError: If it does not.
    """
    missing = sum(not shard_path(folder, shard).is_file() for shard in range(-(-rows // SHARD)))
    needed = MARGIN * preflight.bytes * missing / max(-(-rows // SHARD), 1)
    there = next(path for path in [folder, *folder.absolute().parents] if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise ConfigError(
            f"{FLAG} {folder}: its disk has {format_bytes(free)} free.",
            expected=f"{format_bytes(needed)} for the teacher's targets",
            fix=f"free {format_bytes(needed - free)}, or {FLAG} on another disk, or a lower --top-k",
        )


def run_capture(config: DistillCaptureConfig, screen: Screen) -> TargetCache:
    """Capture a teacher's targets for later runs of distillation; several processes share the work.

    Raises:
        HymbaTuneError: If an input or a setting cannot be used.
    """
    check_inputs(config)
    device = choose_device(config.device)
    join(device, start_timeout=config.start_timeout, step_timeout=config.step_timeout)
    try:
        return _capture_all(config, device, screen)
    finally:
        leave()


def _capture_all(config: DistillCaptureConfig, device: torch.device, screen: Screen) -> TargetCache:
    with first_of_node("finding the models"):
        source = resolve_model(config.model)
        tokenizer = with_chat_template(tokenizer_of(source), config.chat_template)
        student = load_config(weights_of(source))
        teacher = open_teacher(config)
    if warning := smaller_than(teacher, parameters_of(student)):
        screen.note(warning)
    pair = pair_of(config, tokenizer, teacher)
    screen.banner(
        {
            "teacher": f"{teacher.name} · {len(pair.teacher.spelling):,} tokens"
            + (f" · {teacher.quantize}" if teacher.quantize else ""),
            "student": f"{source.name} · {student.vocab_size:,} tokens",
            **({"bias": teacher.bias} if teacher.bias else {}),
        }
    )
    with first_of_node("reading the data"):
        data = read_rows(
            config,
            pair,
            context=teacher.context,
            seed=config.seed,
            prompts=0,
            working=screen.working,
            normalize=config.normalize,
        )
    agree({"the data": data.report.fingerprint})
    return open_targets(
        config,
        data,
        pair,
        teacher,
        vocabulary=student.vocab_size,
        device=device,
        screen=screen,
        overwrite=_inputs(config, source) if config.overwrite else None,
    )


def _inputs(config: DistillCaptureConfig, source: ModelSource) -> list[Path]:
    files = [*config.data, *config.eval_data]
    return [*folders_of(source), Path(config.teacher).expanduser(), *local_files(files)]


def open_teacher(options: TeacherOptions) -> TeacherSpec:
    """Find the teacher; `check_inputs` has checked that there is one.

    Raises:
        HymbaTuneError: If the teacher cannot be used; see `find_teacher` and `find_server`.
    """
    if not options.served:
        return find_teacher(options.teacher, options.teacher_quantize)
    name = str(options.teacher_tokenizer)
    folder = Path(name).expanduser()
    if not (folder / "tokenizer.json").is_file():
        folder = resolve_model(name, flag="--teacher-tokenizer", aliases=TEACHERS).folder
    return find_server(options.teacher, read_tokenizer(folder, name), options.top_k)
