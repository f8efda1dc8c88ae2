from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hymba_tune.errors import CheckpointError, ConfigError, HubError
from hymba_tune.registry import ALIASES, fetch_weights, has_weights, lasting_name, loadable_name, resolve_model


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Mock:
    """A mock of the Hub that returns a folder for every download."""
    (tmp_path / "downloaded").mkdir()
    download = Mock(return_value=str(tmp_path / "downloaded"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return download


def save_run(folder: Path, *results: str, model: str = "hymba-nano") -> Path:
    for result in results:
        (folder / result).parent.mkdir(parents=True, exist_ok=True)
        (folder / result).write_text("{}")
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"model": model}))
    return folder


@pytest.mark.parametrize("name", [*ALIASES, "Hymba-1.5B"])
def test_alias_is_downloaded_under_its_full_name(name: str, hub: Mock, tmp_path: Path) -> None:
    source = resolve_model(name)
    assert hub.call_args.args == (ALIASES[name.lower()],)
    assert (source.name, source.folder) == (ALIASES[name.lower()], tmp_path / "downloaded")


SETTINGS = ("config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja", "README.md")
WEIGHTS = ("model.safetensors", "adapter_model.safetensors")
NEVER = ("modeling_hymba.py", "pytorch_model.bin", "model.pt", "adapter_model.bin", "training_args.bin", "a.zip")


def downloaded(hub: Mock) -> set[str]:
    """Return the file patterns of the last download."""
    wanted = hub.call_args.kwargs["allow_patterns"]
    return {name for name in SETTINGS + WEIGHTS + NEVER if any(fnmatch(name, pattern) for pattern in wanted)}


def test_weights_are_downloaded_separately_and_code_and_pickles_never(hub: Mock) -> None:
    source = resolve_model("me/my-hymba@v2")
    assert downloaded(hub) == set(SETTINGS)
    fetch_weights(source)
    assert downloaded(hub) == set(WEIGHTS)
    # The commit is that of the downloaded settings, although the branch may have moved since.
    assert (hub.call_args.args, hub.call_args.kwargs["revision"]) == (("me/my-hymba",), "downloaded")


def test_weights_of_a_folder_are_not_downloaded(hub: Mock, small_model: Path) -> None:
    for name in (str(small_model), "hymba-nano"):
        fetch_weights(resolve_model(name))
    assert not hub.called


@pytest.mark.usefixtures("hub")
def test_weights_on_this_machine_are_recognized(small_model: Path, tmp_path: Path) -> None:
    assert has_weights(resolve_model(str(small_model)))
    source = resolve_model("me/my-hymba")
    assert not has_weights(source)
    (tmp_path / "downloaded" / "model-00001-of-00002.safetensors").touch()
    assert has_weights(source)


def save_adapter(folder: Path, base: str | None) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("base", ["hymba-nano", "nvidia/Hymba-1.5B-Base", "hymba-1.5b"])
def test_adapter_of_the_hub_names_its_base(base: str, tmp_path: Path) -> None:
    save_adapter(tmp_path / "downloaded", base)
    source = resolve_model("me/my-adapter")
    assert (source.adapter, source.base) == (tmp_path / "downloaded", base)


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("base", ["/home/me/model", "../model", "runs/a/model", "./x"])
def test_adapter_from_the_hub_may_not_name_a_folder_as_its_base(base: str, tmp_path: Path) -> None:
    save_adapter(tmp_path / "downloaded", base)
    with pytest.raises(CheckpointError, match=rf"The base model of the adapter me/my-adapter is {base}, a folder on"):
        resolve_model("me/my-adapter")


@pytest.mark.usefixtures("hub")
def test_adapter_names_a_revision_of_its_base_as_peft_does(tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({"base_model_name_or_path": "me/it", "revision": "refs/pr/1"}))
    assert resolve_model(str(tmp_path)).base == "me/it@refs/pr/1"
    path.write_text(json.dumps({"base_model_name_or_path": str(tmp_path), "revision": "v2"}))
    assert resolve_model(str(tmp_path)).base == str(tmp_path)
    for revision in ("../../x", "/x", "x y"):
        path.write_text(json.dumps({"base_model_name_or_path": "me/it", "revision": revision}))
        with pytest.raises(
            CheckpointError, match=r"adapter_config\.json: revision is .*\n  expected   a branch, a tag"
        ):
            resolve_model(str(tmp_path))


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("folder", ["/home/me/site-packages", "C:/lib"])
def test_packaged_model_of_another_machine_is_the_one_of_this(folder: str, tmp_path: Path) -> None:
    save_adapter(tmp_path, f"{folder}/hymba_tune/assets/hymba-nano")
    assert resolve_model(str(tmp_path)).base == "hymba-nano"
    save_adapter(tmp_path / "downloaded", f"{folder}/hymba_tune/assets/hymba-nano")
    assert resolve_model("me/my-adapter").base == "hymba-nano"


def test_names_for_other_libraries(tmp_path: Path, small_model: Path) -> None:
    """Other libraries know neither aliases, nor hymba-nano, nor runs, nor revisions in names."""
    nano = resolve_model("hymba-nano").folder
    run = save_run(tmp_path / "full", "model/config.json")
    upper = save_run(tmp_path / "lora", "adapter/adapter_config.json")
    for name, expected in {
        "hymba-nano": (str(nano), None),
        str(small_model): (str(small_model), None),
        str(run): (str(run / "model"), None),
        str(upper): (str(upper), None),
        "Hymba-1.5B": ("nvidia/Hymba-1.5B-Base", None),
        "hymba-1.5b@v2": ("nvidia/Hymba-1.5B-Base", "v2"),
        "me/it@refs/pr/1": ("me/it", "refs/pr/1"),
    }.items():
        assert loadable_name(name) == expected
    assert lasting_name("hymba-1.5b@v2") == "nvidia/Hymba-1.5B-Base@v2"


@pytest.mark.usefixtures("hub")
def test_downloaded_run_record_is_ignored(tmp_path: Path) -> None:
    save_run(tmp_path / "downloaded", "config.json", "adapter/adapter_config.json", model="/home/me/secret")
    source = resolve_model("me/my-model")
    assert (source.folder, source.adapter, source.base) == (tmp_path / "downloaded", None, None)


@pytest.mark.parametrize("revision", ["v2", "refs/pr/1", "0123abc"])
def test_revision_is_downloaded(revision: str, hub: Mock) -> None:
    source = resolve_model(f"me/it@{revision}")
    assert (hub.call_args.args, hub.call_args.kwargs["revision"]) == (("me/it",), revision)
    assert source.published == f"me/it@{revision}"
    assert resolve_model(f"hymba-1.5b@{revision}").published == f"nvidia/Hymba-1.5B-Base@{revision}"


def test_packaged_model_needs_no_network(hub: Mock) -> None:
    source = resolve_model("hymba-nano")
    assert json.loads((source.folder / "config.json").read_text())["model_type"] == "hymba"
    assert not hub.called


def test_folder_takes_precedence_over_the_hub(hub: Mock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "me/model").mkdir(parents=True)
    (tmp_path / "me/model/config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert resolve_model("me/model").folder == Path("me/model")
    assert not hub.called


def test_run_with_an_adapter_names_its_base(tmp_path: Path) -> None:
    source = resolve_model(str(save_run(tmp_path / "mine", "adapter/adapter_config.json")))
    assert (source.name, source.base) == ("mine", "hymba-nano")
    assert source.folder == source.adapter == tmp_path / "mine/adapter"


def test_run_with_a_model_is_that_model(tmp_path: Path) -> None:
    source = resolve_model(str(save_run(tmp_path / "mine", "model/config.json")))
    assert (source.name, source.folder) == ("mine", tmp_path / "mine/model")
    assert source.adapter is None


def test_unfinished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"mine: this run has no model yet\.(.|\n)*sft --resume .*mine"):
        resolve_model(str(save_run(tmp_path / "mine")))


def test_adapter_folder_names_its_base(finished_run: Path, small_model: Path) -> None:
    source = resolve_model(str(finished_run / "adapter"))
    assert source.base == str(small_model)
    assert source.adapter == finished_run / "adapter"


@pytest.mark.parametrize("value", [3, ["x"], {"x": 1}, True])
def test_base_of_the_wrong_type_is_refused(value: object, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": value}))
    with pytest.raises(
        CheckpointError, match=r"adapter_config\.json: base_model_name_or_path is .*\n  expected   a text"
    ):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("field", ["model", "quantized", "dtype"])
def test_run_record_of_the_wrong_type_is_refused(field: str, tmp_path: Path) -> None:
    run = save_run(tmp_path / "mine", "adapter/adapter_config.json")
    (run / "run.json").write_text(json.dumps({"model": "hymba-nano", field: ["x"]}))
    with pytest.raises(CheckpointError, match=rf"run\.json: {field} is .*a list"):
        resolve_model(str(run))


def test_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no model in this folder\.\n  expected   a config\.json"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("file", ["run.json", "adapter_config.json"])
@pytest.mark.parametrize("text", ["{", "3", "[]", '[["model", "x"]]', "[" * 100_000])
def test_unreadable_record_is_refused(file: str, text: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text(text)
    with pytest.raises(CheckpointError, match=rf"{file} cannot be read"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "near"),
    [("hymba-nono", "hymba-nano"), ("hymba-1.5b-instrct", "hymba-1.5b-instruct"), ("runs/secnd", "runs/second")],
)
def test_unknown_name_suggests_a_near_one(
    name: str, near: str, hub: Mock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs/second").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"no such folder, and no model(.|\n)*--model {near}$"):
        resolve_model(name)
    assert not hub.called


@pytest.mark.parametrize("name", ["./mine/model", "../model", "/no/such/model", "~/no-such-model", "a/b/c", "runs/x"])
def test_missing_path_is_not_requested_from_the_hub(
    name: str, hub: Mock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"--model {name}: no such folder"):
        resolve_model(name)
    assert not hub.called


def test_model_outside_the_cache_is_refused_offline() -> None:
    with pytest.raises(HubError, match=r"Cannot reach the Hub for nvidia/Hymba-1\.5B-Base(.|\n)*--model hymba-nano"):
        resolve_model("hymba-1.5b")


def http_error(kind: type[HfHubHTTPError]) -> HfHubHTTPError:
    return kind("refused", response=Mock(headers={}))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (http_error(GatedRepoError), r"me/it is gated on the Hub\.(.|\n)*https://huggingface\.co/me/it, then: hf auth"),
        (
            http_error(RevisionNotFoundError),
            r"me/it has no branch, tag or commit v2 on the Hub\.(.|\n)*--model me/it",
        ),
        (http_error(RepositoryNotFoundError), r"me/it: no such model on the Hub, or it is private(.|\n)*hymba-nano"),
        (LocalEntryNotFoundError("offline"), r"Cannot reach the Hub for me/it(.|\n)*--model hymba-nano"),
        (http_error(HfHubHTTPError), r"Cannot load me/it from the Hub: refused(.|\n)*--model hymba-nano"),
        (HFValidationError("no id"), r"Cannot load me/it from the Hub: no id(.|\n)*--model hymba-nano"),
        (OSError(28, "No space left"), r"Cannot load me/it from the Hub: .*No space left(.|\n)*--model hymba-nano"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_refusals_of_the_hub_are_explained(error: Any, message: str, hub: Mock) -> None:
    hub.side_effect = error
    with pytest.raises(HubError, match=message):
        resolve_model("me/it@v2")
