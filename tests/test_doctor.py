"""The diagnosis of `hymba-tune doctor`, and its output."""

from __future__ import annotations

import json
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch

import hymba_tune.cli.doctor as command_doctor
from hymba_tune import doctor
from hymba_tune.config import DoctorConfig
from hymba_tune.doctor import examine
from hymba_tune.errors import ConfigError
from hymba_tune.model.scan import SCAN
from hymba_tune.model.scan_native import LIBRARY
from tests.cli.conftest import Command, command  # noqa: F401 (a fixture)


def test_names_versions_device_and_kernels() -> None:
    diagnosis = examine(DoctorConfig(device="cpu", dtype="float32"))
    assert diagnosis.versions["torch"] == torch.__version__
    assert diagnosis.versions["mamba-ssm"] is None
    assert diagnosis.device == "cpu"
    assert diagnosis.memory_bytes > 2**30
    assert diagnosis.kernels["scan"].taken == ("torch" if LIBRARY.unavailable_reason() else "native")
    assert "it runs on cuda, not on cpu" in diagnosis.kernels["scan"].obstacles["triton"]
    assert diagnosis.kernels["attention"].taken == ("blocks" if LIBRARY.unavailable_reason() else "native")


def test_a_missing_compiler_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LIBRARY, "load", lambda: "no C++ compiler; install g++")
    monkeypatch.setattr(SCAN, "_choices", {})
    scan = examine(DoctorConfig(device="cpu", dtype="float32")).kernels["scan"]
    assert (scan.taken, scan.obstacles["native"]) == ("torch", "no C++ compiler; install g++")


def test_a_device_that_does_not_exist_is_rejected() -> None:
    with pytest.raises(ConfigError, match="--device cuda:99: this machine has"):
        examine(DoctorConfig(device="cuda:99"))


@pytest.mark.parametrize(
    ("hip", "details"), [(None, ["sm_90", f"CUDA {torch.version.cuda}"]), ("7.0", ["gfx942", "ROCm 7.0"])]
)
def test_a_gpu_is_described_in_its_makers_terms(
    monkeypatch: pytest.MonkeyPatch, hip: str | None, details: list[str]
) -> None:
    facts = SimpleNamespace(name="GPU", total_memory=1, major=9, minor=0, gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: facts)
    assert doctor._describe_cuda(torch.device("cuda")) == ("GPU", 1, details)


@pytest.mark.parametrize(
    ("extra", "architecture", "variables"),
    [
        ("mamba", "sm_89", "MAMBA_KEEP_CUDA_BUILD=TRUE"),
        ("mamba", "gfx942", "HIP_ARCHITECTURES=gfx942"),
        ("flash", "sm_89", "MAX_JOBS=4 FLASH_ATTN_CUDA_ARCHS=80"),
        ("flash", "sm_120", "MAX_JOBS=4 FLASH_ATTN_CUDA_ARCHS=120"),
        ("flash", "gfx1100", "MAX_JOBS=4 GPU_ARCHS=gfx1100"),
    ],
)
def test_kernels_are_built_for_the_card(extra: str, architecture: str, variables: str) -> None:
    assert (
        doctor.build_command(extra, architecture)
        == f"{variables} pip install --no-build-isolation 'hymba-tune[{extra}]'"
    )


def test_a_card_gets_the_commands_of_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert examine(DoctorConfig(device="cpu")).builds == {}
    monkeypatch.setattr(doctor, "choose_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(doctor, "choose_kernels", lambda *_: {})
    monkeypatch.setattr(doctor, "_describe_cuda", lambda _: ("GPU", 1, ["sm_90", "CUDA 13.0"]))
    monkeypatch.setattr(doctor, "_version", lambda library: None if library == "causal-conv1d" else "1")
    diagnosis = examine(DoctorConfig(dtype="bfloat16"))
    assert list(diagnosis.builds) == ["mamba"]
    with command_doctor.console.capture() as shown:
        command_doctor._show(diagnosis)
    assert diagnosis.builds["mamba"] in shown.get()


@pytest.mark.parametrize(
    ("token", "whoami", "message"),
    [
        (None, None, "not logged in"),
        ("hf_secret", {"name": "me"}, "logged in as me"),
        ("hf_secret", ConnectionError("no route"), "a token is stored, but the Hub did not confirm it"),
    ],
)
def test_the_hub_gets_a_request_only_with_a_token_which_is_never_shown(
    token: str | None, whoami: object, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer() -> object:
        if isinstance(whoami, Exception):
            raise whoami
        assert whoami is not None
        return whoami

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(doctor.huggingface_hub, "get_token", lambda: token)
    monkeypatch.setattr(doctor.huggingface_hub, "whoami", answer)
    login = examine(DoctorConfig(device="cpu")).hub
    assert message in login
    assert "secret" not in login


def test_table_and_json_have_the_same_kernels(command: Command) -> None:  # noqa: F811
    table = command("doctor", "--device", "cpu")
    assert table.code == 0
    assert "offline (HF_HUB_OFFLINE)" in table.out
    as_json = command("doctor", "--device", "cpu", "--json")
    facts = json.loads(as_json.out)
    for name, choice in facts["kernels"].items():
        assert name in table.out
        assert all(kernel in table.out for kernel in [choice["taken"], *choice["usable"], *choice["obstacles"]])
    for name, status in facts["platforms"].items():
        assert status.partition(":")[0] in ("works", "refused", "unknown")
        assert name in table.out
        assert " ".join(status.split()[:3]) in table.out
