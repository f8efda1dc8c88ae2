"""Which models there are and where: names that people type, to folders on this machine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from hymba_tune.errors import CheckpointError, ConfigError, HubError, nearest

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
"""Models that others are distilled from."""
NANO = "hymba-nano"
"""The packaged model."""
ADAPTER = "adapter"
"""Folder of a run's adapter."""
ADAPTER_CONFIG = "adapter_config.json"
SETTINGS_FILES = ("*.json", "*.jinja", "tokenizer.model", "README.md")
"""Files of a repository that are downloaded first: configuration, tokenizer and model card."""
WEIGHT_FILES = ("*.safetensors",)
"""Files that are downloaded once everything else has been checked. Code and pickles are never downloaded."""


@dataclass(frozen=True)
class ModelSource:
    """A model on this machine.

    Attributes:
        name: What the user called it, or the run's name.
        folder: Its configuration, tokenizer and, without an adapter, its weights.
        adapter: Folder of the adapter that a run trained.
        base: The model that the adapter belongs to, as the run named it.
        quantized: The scheme in which that model's weights were stored while the run trained, if in fewer bits.
        dtype: What the run computed in.
        published: The name under which any machine finds it: its Hub id, or hymba-nano.
        hub_id: The repository that the folder is a snapshot of; `fetch_weights` downloads its weights.
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
    """Find a model: an alias, a run directory, a folder, or a Hub id.

    The configuration, the tokenizer and the card of a Hub model are downloaded. Its weights are not: see
    `fetch_weights`.

    Args:
        name: What a user calls it; a Hub id may have a branch, a tag or a commit behind it, ``owner/name@revision``.
        flag: The flag that names it.
        aliases: Names that stand for Hub ids.

    Raises:
        ConfigError: If the name is none of these.
        CheckpointError: If a folder holds no model.
        HubError: If the Hub cannot be reached, or refuses.
    """
    found = find_local(name, flag=flag, aliases=aliases)
    if found is not None:
        return found
    hub_id, revision = _hub_name(name, aliases)
    offer = f"{flag} {NANO} (packaged, needs no network), or the path of a downloaded folder"
    folder = _download(hub_id, revision or None, SETTINGS_FILES, offer)
    return _downloaded(hub_id, revision, folder)


def find_local(name: str, *, flag: str = "--model", aliases: Mapping[str, str] = ALIASES) -> ModelSource | None:
    """Find a model on this machine, without a look at the Hub.

    Args:
        name: What a user calls it, as for `resolve_model`.
        flag: The flag that names it.
        aliases: Names that stand for Hub ids.

    Returns:
        The model; None if the name is a Hub id, or an alias of one.

    Raises:
        ConfigError: If the name is neither.
        CheckpointError: If a folder holds no model.
    """
    if name == NANO:
        return ModelSource(NANO, Path(str(resources.files("hymba_tune.assets") / NANO)), published=NANO)
    path = Path(name).expanduser()
    if path.is_dir():
        return _local(name, path)
    hub_id, _ = _hub_name(name, aliases)
    renamed = hub_id != name.partition("@")[0]
    if not is_hub_id(hub_id) or (path.parent.is_dir() and not renamed):
        beside = path.parent.iterdir() if path.parent.is_dir() else ()
        near = nearest(name, [NANO, *aliases, *(str(p) for p in beside if p.is_dir())])
        raise ConfigError(
            f"{flag} {name}: no such folder, and not the name of a model.",
            expected=f"a folder, a run directory, a Hub id (owner/name), or one of {', '.join([NANO, *aliases])}",
            fix=f"{flag} {near or NANO}",
        )
    return None


def fetch_weights(source: ModelSource) -> None:
    """Download the weights of a model or an adapter of the Hub that are not on this machine yet.

    Args:
        source: Of `resolve_model`; nothing happens for a model that does not come from the Hub.

    Raises:
        HubError: If the Hub cannot be reached, or refuses.
    """
    if source.hub_id is not None:
        # The folder is named by its commit, so the weights are those of the configuration that was checked.
        _download(source.hub_id, source.folder.name, WEIGHT_FILES, "try again: what was downloaded is kept")


def has_weights(source: ModelSource) -> bool:
    """Whether the weights of a model are on this machine, as far as their files tell."""
    return source.hub_id is None or any(source.folder.glob(WEIGHT_FILES[0]))


def _hub_name(name: str, aliases: Mapping[str, str]) -> tuple[str, str]:
    """Return the Hub id of a name, with an alias resolved, and the revision after its ``@``."""
    typed, _, revision = name.partition("@")
    return aliases.get(typed.lower(), typed), revision


def is_hub_id(name: str) -> bool:
    """Whether a name has the form ``owner/name``, as the Hub takes it."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def lasting_name(name: str) -> str:
    """The name under which `resolve_model` finds the same model from anywhere: an absolute path, or a Hub id."""
    path = Path(name).expanduser()
    return str(path.resolve()) if name != NANO and path.is_dir() else ALIASES.get(name.lower(), name)


def _local(name: str, path: Path) -> ModelSource:
    if (path / "run.json").is_file():
        return _run(path)
    if (path / "config.json").is_file():
        return ModelSource(name, path)
    if (path / ADAPTER_CONFIG).is_file():
        if path.resolve().name == ADAPTER and (path.resolve().parent / "run.json").is_file():
            return _run(path.resolve().parent)
        return ModelSource(name, path, adapter=path, base=_base_of_adapter(path))
    raise CheckpointError(
        f"{path}: no model in this folder.",
        expected="a config.json with weights, an adapter_config.json, or the run.json of a run",
        fix="name the folder that holds one of these",
    )


def _downloaded(hub_id: str, revision: str, folder: Path) -> ModelSource:
    """A model or an adapter of the Hub; a run's record there says nothing that is believed here."""
    name = f"{hub_id}@{revision}" if revision else hub_id
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
        base = _base_of_adapter(folder)
        if base and base.lower() not in (NANO, *ALIASES) and not is_hub_id(base):
            raise CheckpointError(
                f"The adapter {name} belongs to {base}, a folder of the machine it was made on.",
                expected="a model of the Hub as base_model_name_or_path in its adapter_config.json",
                fix="download it, correct that line, and name the folder",
            )
        return ModelSource(name, folder, adapter=folder, base=base, published=name, hub_id=hub_id)
    return ModelSource(name, folder, published=name, hub_id=hub_id)


def _base_of_adapter(folder: Path) -> str:
    return str(_read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or "")


def _run(path: Path) -> ModelSource:
    run = _read_json(path / "run.json")
    if (path / "model" / "config.json").is_file():
        return ModelSource(path.name, path / "model")
    adapter = path / ADAPTER
    if (adapter / ADAPTER_CONFIG).is_file():
        trained = {name: run.get(name) for name in ("quantized", "dtype")}
        return ModelSource(path.name, adapter, adapter=adapter, base=str(run["model"]), **trained)
    raise CheckpointError(
        f"{path}: this run has no model yet.",
        expected="an adapter/ or model/ folder, written when a run ends",
        fix=f"finish it: hymba-tune {run.get('verb', 'sft')} --resume {path}",
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", fix="copy or download it again") from error


def _download(hub_id: str, revision: str | None, files: Sequence[str], offer: str) -> Path:
    """The folder of a repository's snapshot, with these of its files; the offer says what else can be done."""
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(files)))
    except GatedRepoError as error:
        raise HubError(
            f"{hub_id} is gated on the Hub.",
            fix=f"ask for access at https://huggingface.co/{hub_id}, then: hf auth login",
        ) from error
    except LocalEntryNotFoundError as error:
        raise HubError(f"Cannot reach the Hub for {hub_id}, and not all of it is in the cache.", fix=offer) from error
    except RevisionNotFoundError as error:
        raise HubError(
            f"{hub_id} has no branch, tag or commit {revision} on the Hub.", fix=f"--model {hub_id} for its main branch"
        ) from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"{hub_id}: no such model on the Hub, or it is private.",
            fix=f"check the name, or hf auth login; or {offer}",
        ) from error
    except Exception as error:  # a name it refuses, a full disk, and whatever the transport below raises midway
        raise HubError(f"Cannot load {hub_id} from the Hub: {error}", fix=offer) from error
