from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest
import torch

from hymba_tune.memory import keep_freed_memory, peak_memory

FAULTS = """
import json, resource, sys
import torch
from hymba_tune.memory import keep_freed_memory

def take():
    blocks = [torch.ones(2**22) for _ in range(32)]
    while blocks:
        blocks.pop(0)

made = keep_freed_memory() if sys.argv[1] == "keep" else None
take()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
take()
print(json.dumps([made, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before]))
"""


def page_faults(how: str, monkeypatch: pytest.MonkeyPatch) -> tuple[bool | None, int]:
    """Of taking 32 blocks of 16 MB which had been taken and freed before."""
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    made, faults = json.loads(subprocess.check_output([sys.executable, "-c", FAULTS, how]))
    return made, faults


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library manages memory in its own way")
def test_memory_taken_again_is_not_asked_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    _, usual = page_faults("leave", monkeypatch)
    made, kept = page_faults("keep", monkeypatch)
    assert made
    assert kept < usual / 2


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_settings_of_the_users_own_are_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "")
    assert not keep_freed_memory()


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()


def test_peak_is_at_least_what_is_held() -> None:
    held = torch.ones(2**24)
    assert peak_memory(torch.device("cpu")) > held.nbytes
