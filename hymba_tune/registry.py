"""Model names: turns a name that a user types into a folder on this machine."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from hymba_tune.errors import CheckpointError, ConfigError, HubError, command, nearest
from hymba_tune.files.checkpoints import CHECKPOINTS

ALIASES = {
    "hymba-1.5b": "nvidia/Hymba-1.5B-Base",
    "hymba-1.5b-base": "nvidia/Hymba-1.5B-Base",
    "hymba-1.5b-instruct": "nvidia/Hymba-1.5B-Instruct",
}
TEACHERS = {
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama-3.2-1b-instruct": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B",
    "llama-3.2-3b-instruct": "meta-llama/Llama-3.2-3B-Instruct",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama-3.1-8b-instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
    "qwen2.5-0.5b-instruct": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B",
    "qwen2.5-1.5b-instruct": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen2.5-3b": "Qwen/Qwen2.5-3B",
    "qwen2.5-3b-instruct": "Qwen/Qwen2.5-3B-Instruct",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "qwen2.5-7b-instruct": "Qwen/Qwen2.5-7B-Instruct",
    **ALIASES,
}
"""Aliases of teachers for distillation."""
NANO = "hymba-nano"
"""The packaged model."""
PACKAGED = ("hymba_tune", "assets", NANO)
"""The end of its path, by which adapters name it for other libraries. On another machine the rest differs."""
REVISION = re.compile(r"[\w.-]+(/[\w.-]+)*")
"""The form of a branch, a tag or a commit."""
RUNS = Path("runs")
"""The folder of runs. A name in it is no name on the Hub, even where there is no such folder."""
ADAPTER = "adapter"
"""The folder of the adapter in a run directory."""
ADAPTER_CONFIG = "adapter_config.json"
SETTINGS_FILES = ("*.json", "*.jinja", "tokenizer.model", "README.md")
"""Files of a repository that are downloaded first: configuration, tokenizer and model card."""
WEIGHT_FILES = ("*.safetensors",)
"""Files that are downloaded once everything else has been checked. Code and pickles are never downloaded."""


@dataclass(frozen=True)
class ModelSource:
    """A model on this machine.

    Attributes:
        name: The name that the user typed, or the name of the run.
        folder: The folder of the configuration, the tokenizer and, if there is no adapter, the weights.
        adapter: The folder of the adapter, if the model is one.
        base: The base model of the adapter, by the name in the run's record or in the adapter's configuration.
        quantized: The scheme in which the base weights were quantized during training, if the run's record states one.
        dtype: The dtype in which the run computed, if a run's record states it.
        published: The name under which every machine finds the model: its Hub id, or hymba-nano.
        hub_id: The Hub repository of which the folder is a snapshot; `fetch_weights` downloads its weights.
    """

    name: str
    folder: Path
    adapter: Path | None = None
    base: str | None = None
    quantized: str | None = None
    dtype: str | None = None
    published: str | None = None
    hub_id: str | None = None


def resolve_model(name: str, *, flag: str = "--model", aliases: Mapping[str, str] = ALIASES) -> ModelSource:
    """Find a model by its alias, run directory, folder or Hub id.

    The configuration, the tokenizer and the card of a Hub model are downloaded. Its weights are not: see
    `fetch_weights`.

    Args:
        name: The name that the user typed. A Hub id may be followed by a branch, a tag or a commit:
            ``owner/name@revision``.
        flag: The flag with that name, for messages.
        aliases: The Hub ids of aliases.

    Raises:
        ConfigError: If the name is none of these.
        CheckpointError: If the folder contains no model.
        HubError: If the Hub cannot be reached, or refuses.
    """
    local = find_local(name, flag=flag, aliases=aliases)
    if local is not None:
        return local
    hub_id, revision = hub_name(name, aliases)
    fix = f"{flag} {NANO} (packaged, needs no network), or the path of a downloaded folder"
    folder = _download(hub_id, revision or None, SETTINGS_FILES, fix)
    return _downloaded(hub_id, revision, folder)


def find_local(name: str, *, flag: str = "--model", aliases: Mapping[str, str] = ALIASES) -> ModelSource | None:
    """Find a model on this machine, without a request to the Hub.

    Args:
        name: The name that the user typed, as for `resolve_model`.
        flag: The flag with that name, for messages.
        aliases: The Hub ids of aliases.

    Returns:
        The model; None if the name is a Hub id, or an alias of one.

    Raises:
        ConfigError: If the name is neither a folder nor a Hub id.
        CheckpointError: If the folder contains no model.
    """
    if name == NANO:
        return ModelSource(NANO, Path(str(resources.files("hymba_tune.assets") / NANO)), published=NANO)
    path = Path(name).expanduser()
    if path.is_dir():
        return _local(name, path)
    hub_id, _ = hub_name(name, aliases)
    is_alias = hub_id != name.partition("@")[0]
    if not is_hub_id(hub_id) or ((path.parent.is_dir() or path.parent == RUNS) and not is_alias):
        neighbors = path.parent.iterdir() if path.parent.is_dir() else ()
        near = nearest(name, [NANO, *aliases, *(str(p) for p in neighbors if p.is_dir())])
        raise ConfigError(
            f"{flag} {name}: no such folder, and no model of this name.",
            expected=f"a folder, a run directory, a Hub id (owner/name), or one of {', '.join([NANO, *aliases])}",
            fix=f"{flag} {near or NANO}",
        )
    return None


def fetch_weights(source: ModelSource) -> None:
    """Download the weights of a model or an adapter on the Hub, unless they are on this machine already.

    Args:
        source: The model from `resolve_model`. Nothing happens if it is not from the Hub.

    Raises:
        HubError: If the Hub cannot be reached, or refuses.
    """
    if source.hub_id is not None:
        # The folder is named by its commit, so the weights are those of the configuration that was checked.
        _download(source.hub_id, source.folder.name, WEIGHT_FILES, "try again; the download resumes where it stopped")


def has_weights(source: ModelSource) -> bool:
    """Return whether the weights of a model are on this machine, judging by their file names."""
    return source.hub_id is None or any(source.folder.glob(WEIGHT_FILES[0]))


def run_directory(folder: Path) -> Path | None:
    """The run that a folder of weights belongs to: its result, or one of its checkpoints; None if there is none."""
    folder = folder.resolve()
    run = folder.parent.parent if folder.parent.name == CHECKPOINTS else folder.parent
    inside = folder.parent.name == CHECKPOINTS or folder.name in (ADAPTER, "model")
    return run if inside and (run / "run.json").is_file() else None


def hub_name(name: str, aliases: Mapping[str, str] = ALIASES) -> tuple[str, str]:
    """Return the Hub id of a name, with an alias resolved, and the revision after its ``@``; empty if there is none."""
    typed, _, revision = name.partition("@")
    return aliases.get(typed.lower(), typed), revision


def is_hub_id(name: str) -> bool:
    """Return whether a name has the form ``owner/name`` that the Hub accepts."""
    if name.count("/") != 1:
        return False
    from huggingface_hub.errors import HFValidationError  # takes a while, and a name of a folder needs none of it
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def lasting_name(name: str) -> str:
    """Return a name for the same model that is valid in every working directory: an absolute path, or a Hub id."""
    path = Path(name).expanduser()
    return str(path.resolve()) if name != NANO and path.is_dir() else _with_revision(*hub_name(name))


def loadable_name(name: str, *, flag: str = "--model") -> tuple[str, str | None]:
    """Return the name and the revision by which transformers and PEFT load a model, instead of the user's name.

    Args:
        name: The name that the user typed, as for `resolve_model`.
        flag: The flag with that name, for messages.

    Returns:
        An absolute path and None, or a Hub id and its revision, if the name states one. Other libraries cannot load a
        run whose result is an adapter as a base model; it keeps its path.

    Raises:
        ConfigError: If the name is neither a folder nor a Hub id.
        CheckpointError: If the folder contains no model.
    """
    local = find_local(name, flag=flag)
    if local is None:
        hub_id, revision = hub_name(name)
        return hub_id, revision or None
    return str((local.folder if local.adapter is None else Path(name).expanduser()).resolve()), None


def _with_revision(hub_id: str, revision: str | None) -> str:
    return f"{hub_id}@{revision}" if revision else hub_id


def _local(name: str, path: Path) -> ModelSource:
    if (path / "run.json").is_file():
        return _run(path)
    if path.resolve().parent.name == CHECKPOINTS and (run := run_directory(path)) is not None:
        return _checkpoint(run, path)
    if (path / "config.json").is_file():
        return ModelSource(name, path)
    if (path / ADAPTER_CONFIG).is_file():
        if path.resolve().name == ADAPTER and (path.resolve().parent / "run.json").is_file():
            return _run(path.resolve().parent)
        return ModelSource(name, path, adapter=path, base=_base_of_adapter(path))
    raise CheckpointError(
        f"{path}: no model in this folder.",
        expected="a config.json with weights, an adapter_config.json, or the run.json of a run",
        fix="pass the folder that contains one of these files",
    )


def _downloaded(hub_id: str, revision: str, folder: Path) -> ModelSource:
    """Return a model or an adapter from the Hub. A run.json in its repository is not trusted, and so is ignored."""
    name = _with_revision(hub_id, revision)
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
        base = _base_of_adapter(folder)
        if base and base.lower() not in (NANO, *ALIASES) and not is_hub_id(base):
            raise CheckpointError(
                f"The base model of the adapter {name} is {base}, a folder on the machine where it was trained.",
                expected="a Hub model as base_model_name_or_path in its adapter_config.json",
                fix="download the adapter, correct that line, and pass the folder",
            )
        return ModelSource(name, folder, adapter=folder, base=base, published=name, hub_id=hub_id)
    return ModelSource(name, folder, published=name, hub_id=hub_id)


def _base_of_adapter(folder: Path) -> str:
    """Return the base model of an adapter without a run, by a name that `resolve_model` takes; empty if it has none."""
    path = folder / ADAPTER_CONFIG
    settings = _read_json(path)
    base, revision = (_text(settings, field, path) for field in ("base_model_name_or_path", "revision"))
    if revision and (not REVISION.fullmatch(revision) or ".." in revision):
        raise CheckpointError(
            f"{path}: revision is {revision[:80]!r}.", expected="a branch, a tag or a commit, or null"
        )
    if not base or Path(base).is_dir() or not is_hub_id(base):
        return NANO if base and Path(base).parts[-3:] == PACKAGED else base or ""
    return _with_revision(base, revision)


def _run(path: Path) -> ModelSource:
    run = _read_json(path / "run.json")
    if (path / "model" / "config.json").is_file():
        return ModelSource(path.name, path / "model")
    adapter = path / ADAPTER
    if (adapter / ADAPTER_CONFIG).is_file():
        return _adapter_of(path, path.name, adapter, run)
    raise CheckpointError(
        f"{path}: this run has no model yet.",
        expected="an adapter/ or model/ folder, which is written at the end of a run",
        fix=f"finish it: {command(run.get('verb', 'sft'), '--resume', path)}; chat, eval, merge and export also take "
        "its last checkpoint: --checkpoint last",
    )


def _checkpoint(run: Path, path: Path) -> ModelSource:
    """A checkpoint of a run: an adapter, or all weights."""
    name = f"{run.name}-{path.resolve().name}"
    if (path / ADAPTER_CONFIG).is_file():
        return _adapter_of(run, name, path, _read_json(run / "run.json"))
    return ModelSource(name, path)


def _adapter_of(run: Path, name: str, adapter: Path, facts: Mapping[str, Any]) -> ModelSource:
    record = {fact: _text(facts, fact, run / "run.json") for fact in ("model", "quantized", "dtype")}
    return ModelSource(name, adapter, adapter=adapter, base=record.pop("model"), **record)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(contents, dict):
            raise ValueError(f"it is a JSON {type(contents).__name__}, not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", fix="copy or download it again") from error
    return contents


def _text(contents: Mapping[str, Any], name: str, path: Path) -> str | None:
    """Return a text in the contents of a file; None if it is missing or null."""
    value = contents.get(name)
    if value is not None and not isinstance(value, str):
        raise CheckpointError(
            f"{path}: {name} is {str(value)[:80]!r}, a {type(value).__name__}.",
            expected="a text, or null",
            fix="copy or download it again",
        )
    return value


def _download(hub_id: str, revision: str | None, files: Sequence[str], fix: str) -> Path:
    """Download files of a repository and return the folder of the snapshot; errors suggest ``fix``."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(files)))
    except GatedRepoError as error:
        raise HubError(
            f"{hub_id} is gated on the Hub.",
            fix=f"ask for access at https://huggingface.co/{hub_id}, then: hf auth login",
        ) from error
    except LocalEntryNotFoundError as error:
        raise HubError(f"Cannot reach the Hub for {hub_id}, which is not completely in the cache.", fix=fix) from error
    except RevisionNotFoundError as error:
        raise HubError(
            f"{hub_id} has no branch, tag or commit {revision} on the Hub.", fix=f"--model {hub_id} for its main branch"
        ) from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"{hub_id}: no such model on the Hub, or it is private.",
            fix=f"check the name, or hf auth login; or {fix}",
        ) from error
    except Exception as error:  # an invalid name, a full disk, or any error of the HTTP transport
        raise HubError(f"Cannot load {hub_id} from the Hub: {error}", fix=fix) from error
