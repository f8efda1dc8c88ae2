from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from hymba_tune.model.hub_kernels import VERSIONS, hub_kernel


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    hub_kernel.cache_clear()
    yield
    hub_kernel.cache_clear()


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A stand-in for the package."""
    module = ModuleType("kernels")
    monkeypatch.setitem(sys.modules, "kernels", module)
    return module


def test_without_the_package_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kernels", None)
    assert hub_kernel("mamba-ssm") is None


def test_asks_once_for_a_version_of_a_trusted_publisher(kernels: ModuleType) -> None:
    asked: list[object] = []

    def get_kernel(repo_id: str, **options: object) -> ModuleType:
        asked.append((repo_id, options))  # nothing that would let other publishers in
        return kernels

    kernels.get_kernel = get_kernel  # type: ignore[attr-defined]
    assert all(hub_kernel(name) is kernels for name in (*VERSIONS, *VERSIONS))
    assert asked == [(f"kernels-community/{name}", {"version": version}) for name, version in VERSIONS.items()]


@pytest.mark.parametrize("error", [ValueError("not from a trusted publisher"), FileNotFoundError("no variant")])
def test_what_cannot_be_had_is_none(kernels: ModuleType, error: Exception) -> None:
    def get_kernel(*_: object, **__: object) -> ModuleType:
        raise error

    kernels.get_kernel = get_kernel  # type: ignore[attr-defined]
    assert hub_kernel("causal-conv1d") is None
