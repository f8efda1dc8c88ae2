"""Checks of a Hub model run in order: settings first, then data, and weights last."""

from __future__ import annotations

import json
import re
from pathlib import Path
from unittest.mock import DEFAULT, Mock
from urllib.parse import urlsplit

import pytest
import torch
from huggingface_hub import constants

from hymba_tune.adapters import open_model
from hymba_tune.checkpoint import load_weights
from hymba_tune.config import DPOConfig
from hymba_tune.errors import ConfigError, HubError
from hymba_tune.registry import ModelSource, resolve_model
from hymba_tune.train.memory_estimate import estimate_memory
from hymba_tune.train.preference import run_dpo
from hymba_tune.train.screen import Screen
from tests.cli.conftest import Command
from tests.distill.teachers import save_teacher
from tests.hub.inputs import logits, publish
from tests.hub.server import Hub
from tests.preferences import save_pairs
from tests.runs import ANSWER_TOKENS

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # from the client's HTTP library


@pytest.fixture(autouse=True)
def _here(
    hub: Hub, small_model: Path, questions: Path, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Provide a folder with good and bad rows, and a student, a teacher and an adapter on the Hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hymba_tune.train.samples.SAMPLE_TOKENS", ANSWER_TOKENS)
    publish(hub, small_model, "me/small")
    publish(hub, save_teacher(tmp_path / "teacher"), "me/teacher")
    (tmp_path / "adapter").mkdir()
    settings = json.loads((finished_run / "adapter/adapter_config.json").read_text())
    (tmp_path / "adapter/adapter_config.json").write_text(
        json.dumps(settings | {"base_model_name_or_path": "me/small"})
    )
    for file in (finished_run / "adapter").glob("*"):
        if file.name != "adapter_config.json":
            (tmp_path / "adapter" / file.name).symlink_to(file)
    publish(hub, tmp_path / "adapter", "me/adapter")
    (tmp_path / "good.jsonl").symlink_to(questions)
    (tmp_path / "bad.jsonl").write_text(questions.read_text() + '{"nothing": 1}\n')
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "One?"}\n{"nothing": 1}\n')


def weight_requests(hub: Hub) -> list[str]:
    return [request for request in hub.requests if request.endswith(".safetensors")]


TRAINED = ("sft", "dpo", "kto", "distill --teacher me/teacher", "distill capture --teacher me/teacher")


@pytest.mark.parametrize(
    "words",
    [
        *(f"{verb} --data nofile.jsonl" for verb in TRAINED),
        "sft --data good.jsonl --eval-data nofile.jsonl",
        "sft --data good.jsonl --chat-template nofile",
        "plan --data nofile.jsonl",
        "chat me/small --from nofile.jsonl --to out.jsonl",
        "chat me/small --against ./gone",
        "eval me/small --data nofile.jsonl",
        "quantize me/small --data nofile.jsonl",
        "serve me/small --chat-template nofile",
        "data check nofile.jsonl --model me/small",
        "data preview good.jsonl --model me/small --chat-template nofile",
    ],
)
def test_missing_local_files_are_not_requested_from_the_hub(words: str, hub: Hub, command: Command) -> None:
    result = command(*words.split())
    assert result.code == 2
    assert "nofile" in result.err or "./gone" in result.err
    assert not hub.requests


REFUSED = {
    **{f"{verb} --model me/small --data bad.jsonl": "bad.jsonl, line " for verb in TRAINED},
    "distill --teacher me/teacher --model me/small --data bad.jsonl --loss seq": "line 25",
    **{f"{verb} --model me/small --data good.jsonl --targets q_proj": "called q_proj" for verb in ("sft", "plan")},
    "distill --teacher me/teacher --model me/small --data good.jsonl --targets q_proj": "called q_proj",
    "distill --teacher me/teacher --model me/small --data good.jsonl --loss kl": "compares the same tokens",
    "sft --model me/small --data good.jsonl --kernels scan=fast": "--kernels: ",
    "sft --model me/small --data good.jsonl --max-length 600 --strict-length --packing --keep best --eval-split 0": (
        "no data is held out"
    ),
    "plan --model me/small --data bad.jsonl --kernels scan=fast": "--kernels: ",
    "chat me/small --from prompts.jsonl --to out.jsonl": "line 2",
    "chat me/small --against me/gone": "me/gone: no such model on the Hub",
    "eval me/small --data bad.jsonl": "line 25",
    "eval me/small --data good.jsonl --answers gsm8k": "contains a part to compare",
    "eval me/adapter --data bad.jsonl --base": "line 25",
    "quantize me/small --data bad.jsonl": "line 25",
    "quantize me/small --scheme int8 --skip q_proj": "--skip q_proj",
    "export me/small --adapter-only": "has no adapter",
    "merge me/small --out new": "has no adapter",
    "merge me/adapter --out new --onto dequantized": "me/adapter is not known to be trained on quantized",
    "serve me/small --host {host} --port {port}": "cannot listen on this address",
    "data check bad.jsonl --model me/small": "",
}


@pytest.mark.parametrize("words", REFUSED)
def test_refused_settings_download_no_weights(words: str, hub: Hub, command: Command) -> None:
    here = urlsplit(hub.address)
    result = command(*words.format(host=here.hostname, port=here.port).split())
    assert result.code == 2
    assert REFUSED[words] in result.err
    assert any("config.json" in request for request in hub.requests)
    assert not weight_requests(hub)


@pytest.mark.parametrize(
    "words",
    [
        "sft --data good.jsonl",
        "sft --data good.jsonl --packing --max-length 100",
        "sft --data good.jsonl --method full --optimizer adafactor --lr-ssm 1e-5",
        "sft --data good.jsonl --model me/adapter",
        "dpo --data pairs.jsonl --method full",
        "kto --data pairs.jsonl",
        "distill --data good.jsonl --teacher me/teacher",
        "distill --data good.jsonl --teacher me/teacher --on-policy 0.5 --loss seq",
    ],
)
def test_dry_run_needs_no_weights(words: str, hub: Hub, command: Command, tmp_path: Path) -> None:
    save_pairs(tmp_path / "pairs.jsonl")
    model = () if "--model" in words else ("--model", "me/small")
    before = sorted(tmp_path.iterdir())
    result = command(*words.split(), *model, "--dry-run", "--steps", "3")
    assert result.code == 0, result.err
    assert "3 steps" in result.out
    assert not weight_requests(hub)
    assert sorted(path for path in tmp_path.iterdir() if path.name != "cache") == before
    assert ("its weights are not on this machine" in result.out) == ("--teacher" in words)


def test_weights_are_downloaded_after_the_rows_are_checked(
    hub: Hub, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student's weights are downloaded after the teacher's targets are computed."""
    estimate = Mock(wraps=estimate_memory, side_effect=lambda *_: hub.requests.append("GET memory") or DEFAULT)
    monkeypatch.setattr("hymba_tune.train.flow.estimate_memory", estimate)
    words = "--model me/small --teacher me/teacher --data good.jsonl --steps 1 --max-length 64 --dtype float32"
    untrained = ("--teacher-dtype", "float32", "--min-teacher-probability", 0, "--min-end-probability", 0)
    result = command("distill", *words.split(), *untrained)
    assert result.code == 0, result.err
    downloads = [
        re.sub(r"/resolve/\w+", "", request).removeprefix("GET ")
        for request in hub.requests
        if request.startswith("GET ")
    ]
    assert [
        request.removeprefix("GET ")
        for request in downloads
        if request.endswith(("/config.json", ".safetensors", "memory"))
    ] == [
        "/me/small/config.json",
        "/me/teacher/config.json",
        "memory",
        "/me/teacher/model.safetensors",
        "/me/small/model.safetensors",
    ]


def test_adapter_is_downloaded_with_its_base(hub: Hub, finished_run: Path) -> None:
    assert logits("me/adapter").equal(logits(str(finished_run)))
    assert len(weight_requests(hub)) > 1


def test_weights_are_of_the_same_commit_as_the_checked_settings(hub: Hub, small_model: Path) -> None:
    source = resolve_model("me/small")
    files = dict(hub.repositories["me/small"].branches["main"])
    hub.repositories["me/small"].branches |= {"main": files | {"model.safetensors": b"newer"}, "before": files}
    model = open_model(source, dtype=torch.float32, device=CPU)
    assert (
        model.num_parameters()
        == load_weights(ModelSource("here", small_model), dtype=torch.float32, device=CPU).num_parameters()
    )


def test_missing_weights_are_reported_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_model("me/small")
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    source = resolve_model("me/small")
    with pytest.raises(HubError, match=r"Cannot reach the Hub for me/small, which is not completely in the cache\."):
        load_weights(source, dtype=torch.float32, device=CPU)
    assert not hub.requests


def test_continuing_an_adapter_is_refused_without_a_request_to_the_hub(hub: Hub, tmp_path: Path) -> None:
    config = DPOConfig(model="me/adapter", start="continue", data=[str(save_pairs(tmp_path / "pairs.jsonl"))])
    with pytest.raises(ConfigError, match="me/adapter is not a run with an adapter to train further"):
        run_dpo(config, Screen())
    assert not hub.requests
