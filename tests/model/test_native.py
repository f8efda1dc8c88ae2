"""How C++ is built, kept, shared and done without."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore, destroy_process_group, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from hymba_tune.model import native
from hymba_tune.model.attention_native import native_attention
from hymba_tune.model.convolution_native import native_conv1d
from hymba_tune.model.documents import Documents, find_documents
from hymba_tune.model.elementwise_native import native_rms_norm
from hymba_tune.model.native import Library
from hymba_tune.model.scan import selective_scan
from hymba_tune.model.scan_inputs import ScanInputs
from hymba_tune.model.scan_native import LIBRARY, native_scan
from hymba_tune.model.scan_native_source import SOURCE

SCANNED = torch.ones(3, 17), torch.ones(3, 17), -torch.ones(17, 5), torch.ones(3, 5), torch.ones(3, 5)


def documents(tokens: int) -> Documents:
    return find_documents((1, tokens), torch.device("cpu"), num_meta=0)


@pytest.fixture
def native_code() -> None:
    """Skips where there is no compiler, which other tests here do without."""
    if reason := LIBRARY.unavailable_reason():
        pytest.skip(reason)


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and no library loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    LIBRARY.load.cache_clear()
    yield tmp_path / "hymba-tune"
    LIBRARY.load.cache_clear()


@pytest.mark.usefixtures("cache_folder")
def test_without_a_compiler_torch_is_taken_and_the_reason_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    reason = LIBRARY.unavailable_reason()
    assert reason == ("no C++ compiler: no-such-compiler was not found; install g++ or clang++, or name one in $CXX")
    assert selective_scan(*SCANNED, backend="auto")[0].equal(selective_scan(*SCANNED, backend="torch")[0])
    with pytest.raises(ValueError, match=r"native cannot be used: no C\+\+ compiler: no-such-compiler"):
        selective_scan(*SCANNED, backend="native")
    with pytest.raises(RuntimeError, match=r"native scan cannot run: no C\+\+ compiler: no-such-compiler"):
        native_scan(ScanInputs(*SCANNED, None, None, None, None, (0, 3)))


@pytest.mark.usefixtures("native_code")
@pytest.mark.parametrize("operation", ["scan", "convolution", "elementwise", "attention"])
def test_tensors_without_memory_are_refused(operation: str) -> None:
    weight, x = torch.ones(17, device="meta"), torch.ones(3, 17)
    heads = x[:, None]
    computations: dict[str, tuple[str, Callable[[], object]]] = {
        "scan": ("D", lambda: native_scan(ScanInputs(*SCANNED, weight, None, None, None, (0, 3)))),
        "convolution": ("bias", lambda: native_conv1d(x, torch.ones(17, 4), weight)),
        "elementwise": ("weight", lambda: native_rms_norm(x, weight, 1e-6)),
        "attention": ("v", lambda: native_attention(heads, heads, heads.to("meta"), documents(3), None)),
    }
    name, compute = computations[operation]
    with pytest.raises(RuntimeError, match=f"native {operation} cannot read '{name}': .* on meta has no memory"):
        compute()


@pytest.mark.usefixtures("native_code")
def test_a_shard_is_refused() -> None:
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    weight = distribute_tensor(torch.ones(17), init_device_mesh("cpu", (1,)))
    try:
        with pytest.raises(
            RuntimeError, match=r"native elementwise cannot read 'weight': .* \(17,\) on cpu has no memory"
        ):
            native_rms_norm(torch.ones(3, 17), weight, 1e-6)
    finally:
        destroy_process_group()


@pytest.mark.usefixtures("cache_folder")
@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo out of paper >&2; exit 1", "failed: out of paper"),
        ("for last; do :; done; echo junk > $last", "invalid ELF header|file too short|slice|not valid"),
    ],
)
def test_a_compiler_that_fails_is_reported(
    script: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(ValueError, match=f"native cannot be used: .*({reason})"):
        selective_scan(*SCANNED, backend="native")
    selective_scan(*SCANNED, backend="auto")


@pytest.mark.usefixtures("native_code")
def test_compiled_once_and_kept(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert LIBRARY.unavailable_reason() is None
    assert [path.suffix for path in cache_folder.iterdir()] == [".so"]
    LIBRARY.load.cache_clear()
    asked: list[list[str]] = []
    output = native._output
    monkeypatch.setattr(native, "_output", lambda command: asked.append(command) or output(command))
    assert LIBRARY.unavailable_reason() is None
    assert ["-E" in command for command in asked] == [True]  # only what the compiler and the CPU are


@pytest.mark.usefixtures("native_code")
def test_another_constant_is_another_library(cache_folder: Path) -> None:
    for chunk in (8, 16):
        assert Library("scan", SOURCE, CHUNK=chunk, GROUP=64).unavailable_reason() is None
    assert len(list(cache_folder.iterdir())) == 2


@pytest.mark.usefixtures("native_code")
def test_a_cache_that_cannot_be_written_is_done_without(
    cache_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert LIBRARY.unavailable_reason() is None
    assert not cache_folder.exists()


@pytest.mark.usefixtures("native_code")
def test_two_processes_may_compile_at_once(cache_folder: Path) -> None:
    code = "from hymba_tune.model.scan_native import LIBRARY; raise SystemExit(LIBRARY.unavailable_reason())"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert [path.suffix for path in cache_folder.iterdir()] == [".so"]
