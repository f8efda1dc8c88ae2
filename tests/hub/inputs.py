"""Repositories for the tests of downloads."""

from __future__ import annotations

from pathlib import Path

import torch

from hymba_tune.adapters import open_model
from hymba_tune.registry import resolve_model
from tests.hub.server import Hub, Repository

NAME = "me/my-hymba"


def publish(hub: Hub, folder: Path, name: str = NAME, *, branch: str = "main", private: bool = False) -> None:
    """Store a folder as a repository of the test Hub, without an upload."""
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    hub.repositories.setdefault(name, Repository(private=private)).branches[branch] = files


def logits(name: str) -> torch.Tensor:
    model = open_model(resolve_model(name), dtype=torch.float32, device=torch.device("cpu")).eval()
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.arange(3, 30)[None]).logits
    return logits
