"""Downloads of models, adapters and data from a local test Hub, and refusals."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from hymba_tune.config import ChatConfig, ExportConfig
from hymba_tune.errors import CheckpointError, ConfigError, HubError
from hymba_tune.generate import Chat
from hymba_tune.hub import export
from hymba_tune.registry import resolve_model
from tests.cli.conftest import Command
from tests.conftest import ROOT
from tests.hub.inputs import NAME, logits, publish
from tests.hub.server import TOKEN, Failure, Hub, Repository
from tests.hub.silent import silent

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # from the client's HTTP library


def test_uploaded_model_is_downloaded_unchanged(hub: Hub, small_model: Path, tmp_path: Path) -> None:
    """A folder that was exported before is uploaded unchanged, and its card names its base model after the download."""
    about = {"license": "apache-2.0", "base_model": "nvidia/Hymba-1.5B-Base"}
    out = tmp_path / "out"
    export(ExportConfig(model=str(small_model), out=out, **about), silent)  # type: ignore[arg-type]
    done = export(ExportConfig(model=str(out), push=NAME, private=True), silent)
    assert (done.folder, done.difference, done.address) == (out, None, f"{hub.address}/{NAME}")
    assert hub.repositories[NAME].private
    assert torch.equal(logits(NAME), logits(str(small_model)))
    again = export(ExportConfig(model=NAME, out=tmp_path / "again", format="hymba", dtype="bfloat16"), silent)
    card = (again.folder / "README.md").read_text()
    assert f"base_model: {NAME}" in card
    assert "license: apache-2.0" in card


def test_uploaded_adapter_answers_as_its_run_does(
    hub: Hub, small_model: Path, finished_run: Path, tmp_path: Path
) -> None:
    publish(hub, small_model, "me/base")
    config = ExportConfig(
        model=str(finished_run),
        out=tmp_path / "out",
        adapter_only=True,
        push="me/adapter",
        license="mit",
        base_model="me/base",
    )
    assert export(config, silent).address == f"{hub.address}/me/adapter"
    assert torch.equal(logits("me/adapter"), logits(str(finished_run)))
    options = {"temperature": 0.0, "max_new_tokens": 4, "dtype": "float32"}
    answers = [Chat(ChatConfig(model=name, **options)).reply("Hi") for name in ("me/adapter", str(finished_run))]  # type: ignore[arg-type]
    assert answers[0] == answers[1]


def test_revision_is_downloaded(hub: Hub, small_model: Path, tmp_path: Path) -> None:
    publish(hub, small_model)
    changed = Path(shutil.copytree(small_model, tmp_path / "changed"))
    settings = json.loads((changed / "config.json").read_text()) | {"rope_theta": 20000.0}
    (changed / "config.json").write_text(json.dumps(settings))
    publish(hub, changed, branch="v2")
    assert torch.equal(logits(f"{NAME}@v2"), logits(str(changed)))
    assert not torch.equal(logits(NAME), logits(f"{NAME}@v2"))
    with pytest.raises(HubError, match=r"me/my-hymba has no branch, tag or commit v3 on the Hub"):
        resolve_model(f"{NAME}@v3")


def test_private_model_needs_the_token(hub: Hub, small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(hub, small_model, private=True)
    with monkeypatch.context() as logged_out:
        logged_out.delenv("HF_TOKEN")
        with pytest.raises(HubError, match=r"me/my-hymba: no such model on the Hub, or it is private"):
            resolve_model(NAME)
    assert resolve_model(NAME).folder.is_dir()


def test_interrupted_download_resumes(hub: Hub, small_model: Path) -> None:
    publish(hub, small_model)
    hub.failures = [Failure("GET", r"/resolve/.*safetensors", times=1)]
    try:
        resolve_model(NAME)
    except HubError as error:
        assert "Cannot load me/my-hymba from the Hub" in str(error)  # noqa: PT017 (some versions of the client retry by themselves)
    assert torch.equal(logits(NAME), logits(str(small_model)))


def test_neither_code_nor_pickles_nor_archives_are_downloaded(hub: Hub, small_model: Path) -> None:
    publish(hub, small_model)
    unwanted = ("pytorch_model.bin", "modeling_hymba.py", "model.zip", "optimizer.pt", "scaler.pkl")
    hub.repositories[NAME].branches["main"] |= dict.fromkeys(unwanted, b"evil")
    folder = resolve_model(NAME).folder
    assert not [
        name for name in unwanted if (folder / name).exists() or any(name in request for request in hub.requests)
    ]


@pytest.mark.parametrize("name", ["../../../../outside.json", "/outside.json", "sub/../../../../../outside.json"])
def test_file_name_outside_of_the_folder_is_refused(name: str, hub: Hub, small_model: Path, tmp_path: Path) -> None:
    publish(hub, small_model)
    hub.repositories[NAME].branches["main"][name] = b"{}"
    with pytest.raises(HubError, match="Cannot load me/my-hymba from the Hub"):
        resolve_model(NAME)
    assert not list(tmp_path.parent.rglob("outside.json"))


def test_model_with_only_pickled_weights_is_refused(hub: Hub, small_model: Path) -> None:
    publish(hub, small_model)
    files = hub.repositories[NAME].branches["main"]
    files["pytorch_model.bin"] = files.pop("model.safetensors")
    with pytest.raises(CheckpointError, match=r"no weights\.\n  expected   model\.safetensors"):
        logits(NAME)


def test_nothing_is_published_without_a_license_and_a_base_model(hub: Hub, small_model: Path, tmp_path: Path) -> None:
    options = {"model": str(small_model), "out": tmp_path / "out", "push": NAME}
    with pytest.raises(ConfigError, match=r"the base model of this model is not known\.(.|\n)*--base-model"):
        export(ExportConfig(**options), silent)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"the license of me/base is not known\.(.|\n)*--license"):
        export(ExportConfig(**options, base_model="me/base"), silent)  # type: ignore[arg-type]
    assert not list(tmp_path.glob("out*"))
    local = export(ExportConfig(model=str(small_model), out=tmp_path / "out"), silent).folder
    with pytest.raises(ConfigError, match=r"the base model of this model is not known"):
        export(ExportConfig(model=str(local), push=NAME), silent)
    assert not hub.repositories


def test_changed_folder_is_not_uploaded(hub: Hub, small_model: Path, tmp_path: Path) -> None:
    options = {"license": "mit", "base_model": "me/base"}
    out = export(ExportConfig(model=str(small_model), out=tmp_path / "out", **options), silent).folder  # type: ignore[arg-type]
    (out / "scan.py").write_text("import os")
    with pytest.raises(CheckpointError, match=r"scan\.py has changed since the export"):
        export(ExportConfig(model=str(out), push=NAME), silent)
    assert not hub.repositories


def test_token_is_neither_printed_nor_written(
    hub: Hub, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An upload from the command line fails, which prints the command to retry, and then succeeds."""
    monkeypatch.chdir(tmp_path)
    hub.failures = [Failure("PUT", "/signed/", times=99)]
    broken = command("export", "hymba-nano", "--out", "nano", "--push", NAME)
    assert broken.code == 2
    assert f"to fix     hymba-tune export nano --push {NAME}" in broken.err
    assert len(broken.err.strip().splitlines()) == 2
    hub.failures = []
    done = command("export", "nano", "--push", NAME)
    assert done.code == 0, done.err
    assert f"uploaded      {hub.address}/{NAME}" in done.out
    taken = command("export", "nano", "--push", NAME)
    assert taken.code == 2
    assert "the name is taken" in taken.err
    output = "".join(result.out + result.err for result in (broken, done, taken))
    assert TOKEN not in output
    assert "verysecret" not in output
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]


DATA = """
from hymba_tune.data import open_source
rows = list(open_source("me/rows"))
print(len(rows), rows[0].value["prompt"], rows[0].place)
"""


def test_data_is_downloaded(hub: Hub, questions: Path, tmp_path: Path) -> None:
    """A subprocess is needed, because datasets reads the address of the Hub when it is imported."""
    hub.repositories["me/rows"] = Repository(branches={"main": {"train.jsonl": questions.read_bytes()}})
    here = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}
    done = subprocess.run(
        [sys.executable, "-c", DATA],
        cwd=ROOT,
        env=os.environ | here | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "24 I see one cats. What do I see? me/rows, row 1"


TASK = """
from hymba_tune.cli.main import main
main(["eval", "hymba-nano", "--tasks", "arc_easy", "--json"])
"""


@pytest.mark.slow
def test_packaged_task_is_downloaded_by_its_name(hub: Hub, tmp_path: Path) -> None:
    """This is slow, because lm-eval lists thousands of tasks first."""
    choices = {"text": ["a stone", "a dog"], "label": ["A", "B"]}
    rows = [{"id": str(n), "question": f"Animal {n}?", "choices": choices, "answerKey": "B"} for n in range(8)]
    splits = ("train", "validation", "test")
    parts = [{"split": split, "path": f"{split}.jsonl"} for split in splits]
    card = f"---\n{yaml.safe_dump({'configs': [{'config_name': 'ARC-Easy', 'data_files': parts}]})}---\n"
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    files = {"README.md": card.encode()} | {f"{split}.jsonl": lines for split in splits}
    hub.repositories["allenai/ai2_arc"] = Repository(branches={"main": files})
    here = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}
    done = subprocess.run(
        [sys.executable, "-c", TASK],
        cwd=tmp_path,
        env=os.environ | here,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "fatal" not in done.stderr
    (model,) = json.loads(done.stdout)["models"]
    assert model["tasks"]["arc_easy"].keys() == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
