"""The C++ is compiled once, cached, shared by processes, and replaced by torch if it is not available."""

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

SCAN_INPUTS = torch.ones(3, 17), torch.ones(3, 17), -torch.ones(17, 5), torch.ones(3, 5), torch.ones(3, 5)


def documents(tokens: int) -> Documents:
    return find_documents((1, tokens), torch.device("cpu"), num_meta=0)


@pytest.fixture
def native_code() -> None:
    """Skip if there is no compiler; other tests in this file need none."""
    if reason := LIBRARY.unavailable_reason():
        pytest.skip(reason)


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Use an empty cache folder, with no library loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    LIBRARY.load.cache_clear()
    yield tmp_path / "hymba-tune"
    LIBRARY.load.cache_clear()


@pytest.mark.usefixtures("cache_folder")
def test_without_a_compiler_torch_is_used_and_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    reason = LIBRARY.unavailable_reason()
    assert reason == ("no C++ compiler: no-such-compiler was not found; install g++ or clang++, or name one in $CXX")
    assert selective_scan(*SCAN_INPUTS, backend="auto")[0].equal(selective_scan(*SCAN_INPUTS, backend="torch")[0])
    with pytest.raises(ValueError, match=r"native cannot be used: no C\+\+ compiler: no-such-compiler"):
        selective_scan(*SCAN_INPUTS, backend="native")
    with pytest.raises(RuntimeError, match=r"native scan cannot run: no C\+\+ compiler: no-such-compiler"):
        native_scan(ScanInputs(*SCAN_INPUTS, None, None, None, None, (0, 3)))


@pytest.mark.usefixtures("native_code")
@pytest.mark.parametrize("operation", ["scan", "convolution", "elementwise", "attention"])
def test_tensors_without_memory_are_refused(operation: str) -> None:
    weight = torch.ones(17, device="meta")
    x = torch.ones(3, 17)
    heads = x[:, None]
    computations: dict[str, tuple[str, Callable[[], object]]] = {
        "scan": ("D", lambda: native_scan(ScanInputs(*SCAN_INPUTS, weight, None, None, None, (0, 3)))),
        "convolution": ("bias", lambda: native_conv1d(x, torch.ones(17, 4), weight)),
        "elementwise": ("weight", lambda: native_rms_norm(x, weight, 1e-6)),
        "attention": ("v", lambda: native_attention(heads, heads, heads.to("meta"), documents(3), None)),
    }
    name, compute = computations[operation]
    with pytest.raises(RuntimeError, match=f"native {operation} cannot read '{name}': .* on meta has no memory"):
        compute()


@pytest.mark.usefixtures("native_code")
def test_a_sharded_tensor_is_refused() -> None:
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
        selective_scan(*SCAN_INPUTS, backend="native")
    selective_scan(*SCAN_INPUTS, backend="auto")


@pytest.mark.usefixtures("native_code")
def test_the_library_is_compiled_once_and_cached(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert LIBRARY.unavailable_reason() is None
    assert [path.suffix for path in cache_folder.iterdir()] == [".so"]
    LIBRARY.load.cache_clear()
    commands: list[list[str]] = []
    output = native._output
    monkeypatch.setattr(native, "_output", lambda command: commands.append(command) or output(command))
    assert LIBRARY.unavailable_reason() is None
    assert ["-E" in command for command in commands] == [True]  # only the query for the compiler and the CPU


@pytest.mark.usefixtures("native_code")
def test_another_constant_gives_another_library(cache_folder: Path) -> None:
    for chunk in (8, 16):
        assert Library("scan", SOURCE, CHUNK=chunk, GROUP=64).unavailable_reason() is None
    assert len(list(cache_folder.iterdir())) == 2


@pytest.mark.usefixtures("native_code")
def test_without_a_writable_cache_the_library_is_compiled_elsewhere(
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
