"""What the doctor finds, and how it says it."""

from __future__ import annotations

import json

import huggingface_hub
import pytest
import torch

from hymba_tune import doctor
from hymba_tune.config import DoctorConfig
from hymba_tune.doctor import examine
from hymba_tune.errors import ConfigError
from hymba_tune.model.scan_native import LIBRARY
from tests.cli.conftest import Command, command  # noqa: F401 (a fixture)


def test_names_versions_device_and_kernels() -> None:
    found = examine(DoctorConfig(device="cpu", dtype="float32"))
    assert found.versions["torch"] == torch.__version__
    assert found.versions["mamba-ssm"] is None
    assert found.device == "cpu"
    assert found.memory_bytes > 2**30
    assert found.kernels["scan"].taken == ("torch" if LIBRARY.missing() else "native")
    assert "it runs on cuda, not on cpu" in found.kernels["scan"].obstacles["triton"]
    assert found.kernels["attention"].taken == ("blocks" if LIBRARY.missing() else "native")


def test_without_a_compiler_it_says_so_and_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LIBRARY, "load", lambda: "no C++ compiler; install g++")
    scan = examine(DoctorConfig(device="cpu", dtype="float32")).kernels["scan"]
    assert (scan.taken, scan.obstacles["native"]) == ("torch", "no C++ compiler; install g++")


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="--device cuda:99: this machine has"):
        examine(DoctorConfig(device="cuda:99"))


@pytest.mark.parametrize(
    ("token", "whoami", "said"),
    [
        (None, None, "not logged in"),
        ("hf_secret", {"name": "me"}, "logged in as me"),
        ("hf_secret", ConnectionError("no route"), "a token is stored, but the Hub did not confirm it"),
    ],
)
def test_the_hub_is_asked_only_with_a_token_which_is_never_shown(
    token: str | None, whoami: object, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask() -> object:
        if isinstance(whoami, Exception):
            raise whoami
        assert whoami is not None
        return whoami

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(doctor.huggingface_hub, "get_token", lambda: token)
    monkeypatch.setattr(doctor.huggingface_hub, "whoami", ask)
    found = examine(DoctorConfig(device="cpu")).hub
    assert said in found
    assert "secret" not in found


def test_table_and_json_say_the_same(command: Command) -> None:  # noqa: F811
    table = command("doctor", "--device", "cpu")
    assert table.code == 0
    assert "offline (HF_HUB_OFFLINE)" in table.out
    as_json = command("doctor", "--device", "cpu", "--json")
    facts = json.loads(as_json.out)
    for name, choice in facts["kernels"].items():
        assert name in table.out
        assert all(kernel in table.out for kernel in [choice["taken"], *choice["usable"], *choice["obstacles"]])
