"""Digests of the base model of an adapter, by which a base that changed after training is found."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hymba_tune.checkpoint import weight_files
from hymba_tune.errors import CheckpointError
from hymba_tune.files import read_json
from hymba_tune.registry import ModelSource, has_weights, run_directory

FACT = "base_digest"
"""The name of the digest in ``run.json``."""


def base_digest(files: list[Path], *, whole: bool = False) -> dict[str, Any]:
    """Digest the weights of a model. They may be divided among files in any way.

    Args:
        files: The safetensors files, from `files_of`.
        whole: Whether all bytes are read, not only the names, types, shapes and three rows of each tensor.

    Returns:
        The number of ``tensors``, their ``bytes``, and ``sampled``, a SHA-256 of the sample; with ``whole``, also
        ``whole``, the SHA-256 of all bytes.

    Raises:
        CheckpointError: If a file cannot be read.
    """
    sampled, everything = hashlib.sha256(), hashlib.sha256()
    count = size = 0
    try:
        with ExitStack() as opened:
            parts = [opened.enter_context(safe_open(file, "pt")) for file in files]
            # By name, and of tensors of the same name the last run's first: shards may divide a model in any way.
            names = sorted((name, number) for number, part in enumerate(parts) for name in part.keys())  # noqa: SIM118
            for name, number in names:
                part = parts[number]
                rows = part.get_slice(name)
                shape = rows.get_shape()
                places = sorted({0, shape[0] // 2, shape[0] - 1}) if shape and shape[0] else []
                sample = [rows[place : place + 1] for place in places] or [part.get_tensor(name)]
                count += 1
                size += sample[0].nbytes * (shape[0] if places else 1)
                sampled.update(f"{name} {rows.get_dtype()} {shape}".encode())
                for tensor in sample:
                    sampled.update(_bytes(tensor))
                if whole:
                    everything.update(name.encode())
                    everything.update(_bytes(part.get_tensor(name)))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{', '.join(map(str, files))}: the weights cannot be read: {error}", fix="copy them again"
        ) from error
    digest: dict[str, Any] = {"tensors": count, "bytes": size, "sampled": sampled.hexdigest()}
    return digest | ({"whole": everything.hexdigest()} if whole else {})


def files_of(folders: list[Path]) -> list[Path]:
    """Return the weights of a model: those of its adapters, and those below them.

    Args:
        folders: The folders that the model is read from, as `folders_of` returns them.
    """
    *adapters, model = folders
    return [*(folder / SAFETENSORS_WEIGHTS_NAME for folder in adapters), *weight_files(model)]


def changed_base(source: ModelSource, below: ModelSource, folders: list[Path], *, whole: bool = False) -> str | None:
    """Compare the base of an adapter with the one that it was trained on.

    Args:
        source: The adapter.
        below: Its base.
        folders: The folders that the base is read from, as `folders_of` returns them.
        whole: Whether all bytes are compared, if the run has recorded their digest.

    Returns:
        A warning; None if they are the same, or if that is unknown: the run has recorded no digest, or the weights of
        the base are not on this machine yet.
    """
    run = run_directory(source.folder)
    recorded = (read_json(run / "run.json", dict) or {}).get(FACT) if run else None
    if not isinstance(recorded, dict) or not has_weights(below):
        return None
    difference = describe_difference(recorded, base_digest(files_of(folders), whole=whole and "whole" in recorded))
    if difference is None:
        return None
    return (
        f"{source.name}: its base model, {source.base}, has changed since it was trained on it ({difference}). Expect "
        "other answers; restore that model, or train again."
    )


def describe_difference(recorded: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Describe how two digests differ, as far as both know; None if they do not."""
    for name in ("tensors", "bytes"):
        if (before := recorded.get(name, now[name])) != now[name]:
            return f"{now[name]:,} {name} instead of {before:,}"
    return "other values" if any(recorded.get(name, value) != value for name, value in now.items()) else None


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
