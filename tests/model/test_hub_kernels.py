from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from hymba_tune.model.hub_kernels import VERSIONS, hub_kernel


@pytest.fixture(autouse=True)
def _clear_cache() -> Iterator[None]:
    hub_kernel.cache_clear()
    yield
    hub_kernel.cache_clear()


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Install a stand-in for the package."""
    module = ModuleType("kernels")
    monkeypatch.setitem(sys.modules, "kernels", module)
    return module


def test_without_the_package_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kernels", None)
    assert hub_kernel("mamba-ssm") is None


def test_each_kernel_is_requested_once_with_its_version_from_trusted_publishers_only(kernels: ModuleType) -> None:
    requests: list[object] = []

    def get_kernel(repo_id: str, **options: object) -> ModuleType:
        requests.append((repo_id, options))  # there must be no option that allows untrusted publishers
        return kernels

    kernels.get_kernel = get_kernel  # type: ignore[attr-defined]
    assert all(hub_kernel(name) is kernels for name in (*VERSIONS, *VERSIONS))
    assert requests == [(f"kernels-community/{name}", {"version": version}) for name, version in VERSIONS.items()]


@pytest.mark.parametrize("error", [ValueError("not from a trusted publisher"), FileNotFoundError("no variant")])
def test_an_unavailable_kernel_is_none(kernels: ModuleType, error: Exception) -> None:
    def get_kernel(*_: object, **__: object) -> ModuleType:
        raise error

    kernels.get_kernel = get_kernel  # type: ignore[attr-defined]
    assert hub_kernel("causal-conv1d") is None
