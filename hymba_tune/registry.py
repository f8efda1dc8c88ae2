"""Which models there are and where: names that people type, to folders on this machine."""

from __future__ import annotations

import difflib
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

from hymba_tune.errors import CheckpointError, ConfigError, HubError

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
MODEL_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model", "README.md")
"""What is downloaded of a repository: no code, and no pickles."""
TOKENIZER_FILES = ("*.json", "*.jinja", "tokenizer.model")


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
    """

    name: str
    folder: Path
    adapter: Path | None = None
    base: str | None = None
    quantized: str | None = None
    dtype: str | None = None
    published: str | None = None


def resolve_model(
    name: str,
    files: Sequence[str] = MODEL_FILES,
    *,
    flag: str = "--model",
    aliases: Mapping[str, str] = ALIASES,
) -> ModelSource:
    """Find a model: an alias, a run directory, a folder, or a Hub id, which is downloaded.

    Args:
        name: What a user calls it; a Hub id may have a branch, a tag or a commit behind it, ``owner/name@revision``.
        files: Which of its files are needed, as patterns.
        flag: What it was given as.
        aliases: Names that stand for Hub ids.

    Raises:
        ConfigError: If the name is none of these.
        CheckpointError: If a folder holds no model.
        HubError: If the Hub cannot be reached, or refuses.
    """
    if name == NANO:
        return ModelSource(NANO, Path(str(resources.files("hymba_tune.assets") / NANO)), published=NANO)
    path = Path(name).expanduser()
    if path.is_dir():
        return _local(name, path)
    typed, _, revision = name.partition("@")
    hub_id = aliases.get(typed.lower(), typed)
    if not is_hub_id(hub_id) or (hub_id == typed and path.parent.is_dir()):
        beside = path.parent.iterdir() if path.parent.is_dir() else ()
        near = difflib.get_close_matches(name, [NANO, *aliases, *(str(p) for p in beside if p.is_dir())], n=1)
        raise ConfigError(
            f"{flag} {name}: no such folder, and not the name of a model.",
            expected=f"a folder, a run directory, a Hub id (owner/name), or one of {', '.join([NANO, *aliases])}",
            fix=f"{flag} {near[0] if near else NANO}",
        )
    folder = _download(hub_id, revision or None, files, flag)
    return _downloaded(f"{hub_id}@{revision}" if revision else hub_id, folder)


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


def _downloaded(name: str, folder: Path) -> ModelSource:
    """A model or an adapter of the Hub; a run's record there says nothing that is believed here."""
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
        base = _base_of_adapter(folder)
        if base and base.lower() not in (NANO, *ALIASES) and not is_hub_id(base):
            raise CheckpointError(
                f"The adapter {name} belongs to {base}, a folder of the machine it was made on.",
                expected="a model of the Hub as base_model_name_or_path in its adapter_config.json",
                fix="download it, correct that line, and name the folder",
            )
        return ModelSource(name, folder, adapter=folder, base=base, published=name)
    return ModelSource(name, folder, published=name)


def _base_of_adapter(folder: Path) -> str:
    return str(_read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or "")


def _run(path: Path) -> ModelSource:
    run = _read_json(path / "run.json")
    if (path / "model" / "config.json").is_file():
        return ModelSource(path.name, path / "model")
    adapter = path / ADAPTER
    if (adapter / ADAPTER_CONFIG).is_file():
        told = {name: run.get(name) for name in ("quantized", "dtype")}
        return ModelSource(path.name, adapter, adapter=adapter, base=str(run["model"]), **told)
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


def _download(hub_id: str, revision: str | None, files: Sequence[str], flag: str) -> Path:
    offer = f"{flag} {NANO} (packaged, needs no network), or the path of a downloaded folder"
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(files)))
    except GatedRepoError as error:
        raise HubError(
            f"{hub_id} is gated on the Hub.",
            fix=f"ask for access at https://huggingface.co/{hub_id}, then: hf auth login",
        ) from error
    except LocalEntryNotFoundError as error:
        raise HubError(f"Cannot reach the Hub for {hub_id}, and it is not in the cache.", fix=offer) from error
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
