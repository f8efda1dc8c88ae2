"""What the folders that hymba-tune writes hold, so that nothing else in them is ever replaced or removed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from hymba_tune.files.locks import LOCK

SUMS = "SHA256SUMS"
REPLACED = "replaced"
"""Start of the name of a folder's subfolder that holds what is being replaced."""


@dataclass(frozen=True)
class FolderKind:
    """A kind of folder that hymba-tune writes.

    Attributes:
        name: What it is called in messages.
        markers: Files of which such a folder has at least one, and a text that each contains.
        parts: Patterns of everything that it may hold; files that its ``SHA256SUMS`` lists are known as well.
    """

    name: str
    markers: Mapping[str, str]
    parts: tuple[str, ...]

    def is_one(self, folder: Path) -> bool:
        """Whether a folder looks like one of this kind."""
        return any(text in _read(folder / marker) for marker, text in self.markers.items())

    def has_part(self, name: str) -> bool:
        """Whether such folders hold something of this name."""
        return any(
            fnmatch(name, f"{part}{ending}")
            for part in self.parts
            for ending in ("", ".????????.partial", ".????????.old")
        )

    def refusal_reason(self, folder: Path) -> str | None:
        """Say why a folder must not be replaced; None if it is of this kind and holds nothing else."""
        if not self.is_one(folder):
            return f"it has no {' or '.join(self.markers)} of one"
        listed = {line.partition("  ")[2] for line in _read(folder / SUMS).splitlines()}
        others = sorted(path.name for path in entries(folder) if not (self.has_part(path.name) or path.name in listed))
        return f"it holds {others[0]}" if others else None

    def clear(self, folder: Path, *, keep: Path | None = None) -> None:
        """Remove the parts of such a folder, and nothing else.

        Args:
            folder: The folder.
            keep: The one part that stays.
        """
        for path in entries(folder):
            if path != keep and self.has_part(path.name):
                remove(path)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def entries(folder: Path) -> Iterator[Path]:
    """What a folder holds, apart from the file of its lock; nothing if there is no such folder."""
    return (path for path in (list(folder.iterdir()) if folder.is_dir() else []) if path.name != LOCK)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, as far as possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


RUN = FolderKind(
    "a run",
    {"config.yaml": "verb: ", "run.json": '"verb":'},
    (
        *("config.yaml", "run.json", "metrics.jsonl", "log.txt", "samples.json", "updates.json", "dropped.jsonl"),
        *("held_out.jsonl", "rollouts.json", "evaluations.json", ".evaluations.lock", "report.html", "README.md"),
        *("adapter", "model", "checkpoints", "track", f"{REPLACED}.*"),
    ),
)
MODEL = FolderKind(
    "a model",
    {"config.json": '"model_type": "hymba"', "adapter_config.json": '"peft_type"'},
    (
        *("config.json", "generation_config.json", "adapter_config.json", "adapter_model.safetensors"),
        *("model.safetensors", "model-*.safetensors", "model.safetensors.index.json"),
        *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
        *("added_tokens.json", "chat_template.jinja", "README.md", SUMS),
    ),
)
