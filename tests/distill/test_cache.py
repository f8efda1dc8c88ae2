"""Targets on disk: read as written, whoever is killed meanwhile, and refused where they do not fit."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pyarrow as pa
import pytest
import torch

from hymba_tune.distill import cache
from hymba_tune.distill.cache import TargetCache, check_key, encode, fill, is_full, key_digest
from hymba_tune.distill.target_maker import CaptureStats
from hymba_tune.distill.targets import Targets
from hymba_tune.errors import CheckpointError, ConfigError, DataError
from tests.conftest import ROOT
from tests.distill.random_targets import KEY, K, RandomMaker, numbered_rows, random_targets


def ignore(_: int) -> None:
    """Progress that nobody looks at."""


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "SHARD", 5)


def same(one: Targets, other: Targets, halves: bool) -> bool:
    """Whether these are the same; logarithms in sixteen bits."""
    rounded = [(lambda values: values.half().float()) if halves else lambda values: values][0]
    pairs = [(one.at, other.at), (one.top.student_tokens, other.top.student_tokens), (one.spans, other.spans)]
    logs = [
        (one.top.log_probs, other.top.log_probs),
        (one.top.rest_mass, other.top.rest_mass),
        (one.span_log_likelihoods, other.span_log_likelihoods),
    ]
    return all(torch.equal(a, b) for a, b in pairs) and all(torch.equal(rounded(a), rounded(b)) for a, b in logs)


@pytest.mark.usefixtures("small_shards")
def test_read_as_written_in_any_order(tmp_path: Path) -> None:
    seen: list[int] = []
    made = fill(tmp_path / "it", KEY, numbered_rows(13), RandomMaker(), seen.append)
    assert len(made) == 13
    assert seen[-1] == 13
    assert seen == sorted(seen)
    for row in (12, 0, 7, 5, 6, 1):
        assert same(made[row], random_targets(row % 7, row), halves=True)
    copy = pickle.loads(pickle.dumps(made))
    assert same(copy[4], made[4], halves=False)
    assert made.stats.tokens == sum(row % 7 for row in range(13))
    with pytest.raises(IndexError, match="row 13 of 13"):
        made[13]


@pytest.mark.usefixtures("small_shards")
def test_shuffled_reads_decode_each_row_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = fill(tmp_path / "it", KEY, numbered_rows(13), RandomMaker(), ignore)
    decompress = Mock(side_effect=pa.decompress)
    monkeypatch.setattr(cache.pa, "decompress", decompress)
    order = random.Random(0).sample(range(13), 13)
    for row in order:
        assert same(made[row], random_targets(row % 7, row), halves=True)
    # A token takes 4 bytes for its position, K tokens and their probabilities, and its rest mass; a span takes 10.
    sizes = [(row % 7) * (4 + K * (2 + 2) + 2 + 10) for row in order]
    assert [call.args[1] for call in decompress.call_args_list] == sizes


def test_changed_byte_of_a_row_is_found(tmp_path: Path) -> None:
    fill(tmp_path, KEY, numbered_rows(4), RandomMaker(), ignore)
    path = tmp_path / "00000.arrow"
    content = bytearray(path.read_bytes())
    stored = pa.ipc.open_file(path).get_batch(0)["content"][3].as_buffer().to_pybytes()
    content[content.index(stored) + len(stored) // 2] ^= 1
    path.write_bytes(content)
    cached = TargetCache(tmp_path)
    for row in (0, 1, 2):
        assert same(cached[row], random_targets(row, row), halves=True)
    with pytest.raises(CheckpointError, match=r"00000\.arrow cannot be read: its checksum differs"):
        cached[3]


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    targets = random_targets(3, 0, vocabulary=200_000)
    cache.write_shard(tmp_path / "00000.arrow", [encode(targets, wide=True)], CaptureStats())
    (tmp_path / "key.json").write_text(json.dumps(KEY | {"vocabulary": 200_000}))
    (tmp_path / "done.json").write_text(json.dumps({"rows": 1, "kept": vars(CaptureStats())}))
    assert same(TargetCache(tmp_path)[0], targets, halves=True)
    assert int(targets.top.student_tokens.max()) > 65536


def test_bytes_a_token(tmp_path: Path) -> None:
    """Worse than any teacher's: student_tokens drawn evenly from the whole vocabulary."""
    rows = [encode(random_targets(100, seed), wide=False) for seed in range(16)]
    cache.write_shard(tmp_path / "it.arrow", rows, CaptureStats())
    assert (tmp_path / "it.arrow").stat().st_size / 1600 <= 128


@pytest.mark.usefixtures("small_shards")
def test_complete_shards_are_not_computed_again(tmp_path: Path) -> None:
    folder, rows = tmp_path / "it", numbered_rows(13)
    fill(folder, KEY, rows, RandomMaker(), ignore)
    before = contents(folder)
    (folder / "00001.arrow").unlink()
    (folder / "00002.arrow").write_bytes(before["00002.arrow"][:200])  # torn
    (folder / "done.json").unlink()
    (folder / "00001.arrow.0123abcd.partial").write_bytes(b"left behind")
    maker = Mock(side_effect=RandomMaker())
    assert not is_full(folder)
    fill(folder, KEY, rows, maker, ignore)
    assert [len(call.args[0]) for call in maker.call_args_list] == [5, 3]
    assert contents(folder) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".partial"}


SLOWLY = """
import sys, time
from pathlib import Path
from hymba_tune.distill import cache
from tests.distill.random_targets import KEY, K, RandomMaker, numbered_rows
cache.SHARD = 5
print("ready", flush=True)
cache.fill(Path(sys.argv[1]), KEY, numbered_rows(60), RandomMaker(), lambda _: time.sleep(0.004))
"""


def test_killed_at_any_moment_it_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "SHARD", 5)
    expected = contents(fill(tmp_path / "whole", KEY, numbered_rows(60), RandomMaker(), ignore).folder)
    draw, folder, kills = random.Random(0), tmp_path / "killed", 0
    for _ in range(30):
        process = subprocess.Popen(
            [sys.executable, "-c", SLOWLY, str(folder)], stdout=subprocess.PIPE, cwd=ROOT, env={**os.environ}
        )
        assert process.stdout
        process.stdout.readline()
        try:
            process.wait(timeout=draw.uniform(0.02, 0.2))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        process.stdout.close()
        if kills >= 3 or is_full(folder):
            break
    assert kills
    fill(folder, KEY, numbered_rows(60), RandomMaker(), ignore)
    assert contents(folder) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"teacher": "b" * 64},
            r"made with another teacher\.\n  expected   teacher bbbbbbbbbbbb…, which it has as aaaa",
        ),
        ({"top_k": 8}, r"made with another top_k\.\n  expected   top_k 8, which it has as 32"),
        ({"temperature": 2.0, "data": "e"}, r"made with another temperature and another data\."),
        ({"newer": 1}, r"made with another newer\."),
    ],
)
def test_another_key_is_refused_by_what_differs(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    fill(tmp_path / "it", KEY, numbered_rows(3), RandomMaker(), ignore)
    with pytest.raises(ConfigError, match=message):
        check_key(tmp_path / "it", KEY | change)
    with pytest.raises(ConfigError, match=message):
        fill(tmp_path / "it", KEY | change, numbered_rows(3), RandomMaker(), ignore)
    check_key(tmp_path / "it", KEY)
    assert key_digest(KEY) != key_digest(KEY | change)


def test_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("Dear")
    with pytest.raises(ConfigError, match="is not a folder of targets"):
        check_key(tmp_path, KEY)
    with pytest.raises(ConfigError, match="is not a folder of targets"):
        check_key(tmp_path / "letter.txt", KEY)


@pytest.mark.parametrize(
    ("name", "content"),
    [("key.json", b"{"), ("done.json", b"[]"), ("done.json", b"{}"), ("00000.arrow", b"ARROW1"), ("00000.arrow", None)],
)
def test_damaged_files_are_named(name: str, content: bytes | None, tmp_path: Path) -> None:
    fill(tmp_path, KEY, numbered_rows(3), RandomMaker(), ignore)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name} cannot be read(.|\n)*capture again"):
        TargetCache(tmp_path)[0]


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(cache, "write_shard", Mock(side_effect=full))
    with pytest.raises(DataError, match=r"The disk of .*it is full(.|\n)*continues from the completed shards"):
        fill(tmp_path / "it", KEY, numbered_rows(3), RandomMaker(), ignore)
    assert not is_full(tmp_path / "it")
