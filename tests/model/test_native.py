"""The C++ is compiled once, cached, shared by processes, and replaced by torch if it is not available."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore, destroy_process_group, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from hymba_tune.model import native, native_cache
from hymba_tune.model.attention_native import native_attention
from hymba_tune.model.convolution_native import native_conv1d
from hymba_tune.model.documents import Documents, find_documents
from hymba_tune.model.elementwise_native import native_rms_norm
from hymba_tune.model.native import Library
from hymba_tune.model.scan import SCAN, selective_scan
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
    monkeypatch.setattr(SCAN, "_choices", {})
    LIBRARY.load.cache_clear()
    yield tmp_path / "hymba-tune" / "native"
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


TINY = 'extern "C" void share_threads(void *) {}'


@pytest.fixture
def tiny(cache_folder: Path) -> Library:
    """A library that compiles in no time, into an empty cache."""
    assert not cache_folder.exists()
    if not any(map(shutil.which, native.COMPILERS)):
        pytest.skip("no C++ compiler")
    return Library("tiny", TINY)


def test_cache_is_private(cache_folder: Path, tiny: Library) -> None:
    cache_folder.mkdir(parents=True, mode=0o777)
    cache_folder.chmod(0o777)
    assert tiny.unavailable_reason() is None
    (library,) = cache_folder.iterdir()
    assert [path.stat().st_mode & 0o777 for path in (cache_folder, library)] == [0o700, 0o700]


@pytest.fixture
def kept(cache_folder: Path, tiny: Library) -> Path:
    """The library in the cache."""
    assert tiny.unavailable_reason() is None
    tiny.load.cache_clear()
    return next(cache_folder.iterdir())


def replace_content(library: Path, content: bytes) -> None:
    library.unlink()  # its own memory is that of this process
    library.write_bytes(content)


SPOILED: dict[str, Callable[[Path], object]] = {
    "other content": lambda library: replace_content(library, library.read_bytes() + b"x"),
    "no content": lambda library: replace_content(library, b""),
    "writable by others": lambda library: library.chmod(0o777),
    "a link": lambda library: library.symlink_to(library.rename(library.parent.parent / "elsewhere.so")),
}


@pytest.mark.parametrize("name", SPOILED)
def test_library_that_cannot_be_trusted_is_compiled_again(
    name: str, kept: Path, tiny: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    SPOILED[name](kept)
    opened: list[Path] = []
    commands: list[list[str]] = []
    output, checked = native._output, Library._checked
    monkeypatch.setattr(native, "_output", lambda command: commands.append(command) or output(command))
    monkeypatch.setattr(Library, "_checked", lambda self, path: opened.append(path) or checked(self, path))
    assert tiny.unavailable_reason() is None
    assert (len(opened), len(commands)) == (1, 2)  # compiled, and only the new one is opened


def test_folder_of_another_user_is_not_used(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native_cache.cache_folder() == cache_folder
    monkeypatch.setattr("os.geteuid", lambda: cache_folder.stat().st_uid + 1)
    other = native_cache.cache_folder()
    assert other != cache_folder
    assert other.stat().st_mode & 0o777 == 0o700


def test_library_of_another_user_is_not_used(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache_folder.mkdir(parents=True)
    (cache_folder / "built.so").touch()
    stored = native_cache.store_library(cache_folder / "built.so", cache_folder, "scan-0")
    assert list(native_cache.find_libraries(cache_folder, "scan-0")) == [stored]
    monkeypatch.setattr("os.geteuid", lambda: stored.stat().st_uid + 1)
    assert list(native_cache.find_libraries(cache_folder, "scan-0")) == []


def test_library_without_a_function_counts_as_missing(kept: Path, tiny: Library, tmp_path: Path) -> None:
    built = tmp_path / "built.so"
    compiler = next(filter(shutil.which, native.COMPILERS))
    subprocess.run([compiler, "-shared", "-x", "c++", "/dev/null", "-o", str(built)], check=True)
    stem = kept.name.rpartition("-")[0]
    kept.unlink()
    empty = native_cache.store_library(built, kept.parent, stem)
    assert list(native_cache.find_libraries(kept.parent, stem)) == [empty]
    assert tiny.unavailable_reason() is None
    assert sorted(kept.parent.iterdir()) == sorted([empty, kept])


@pytest.mark.usefixtures("tiny")
def test_compiler_that_leaves_a_function_out_is_reported() -> None:
    library = Library("tiny", TINY + '// extern "C" void gone(')
    assert "undefined symbol: gone" in str(library.unavailable_reason())
