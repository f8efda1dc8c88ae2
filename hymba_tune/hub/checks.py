"""Checks a written folder: logits of sample prompts, token ids, and a checksum of every file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hymba_tune.errors import CheckpointError

SUMS = "SHA256SUMS"
"""The file with the checksums, in the format of ``sha256sum --check``."""
PROMPTS = (
    "The meta tokens stand in front of every text.",
    " A space first; then 12,345 and\n    def code(): return None",
    "Ünïcödé, 漢字 and ☃",
)
"""Sample prompts, whose different lengths also test padding."""
TOLERANCE = 1e-3
"""Tolerance relative to the largest logit. On a CPU logits are equal bit for bit; sums on a GPU have no fixed order."""


@torch.inference_mode()
def sample_logits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Return the logits of `PROMPTS` and of their beginnings, in one padded batch: ``(6, L, V)`` float32 on the CPU."""
    texts = [*PROMPTS, *(prompt[:7] for prompt in PROMPTS)]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    ids, mask = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
    logits: Tensor = model.eval()(input_ids=ids, attention_mask=mask).logits
    return logits.float().cpu()


def check_logits(reloaded: Tensor, original: Tensor, folder: Path) -> float:
    """Compare the logits of a reloaded model with those of the model that was written.

    Returns:
        The largest difference.

    Raises:
        CheckpointError: If the difference is larger than rounding.
    """
    largest = float((reloaded - original).abs().max())
    scale = float(original.abs().max())
    if not largest <= TOLERANCE * scale:
        raise CheckpointError(
            f"{folder}: the reloaded model differs from the one that was written: a logit differs by {largest:.3g}.",
            expected=f"at most {TOLERANCE * scale:.3g}",
            fix="try again; if it happens twice, the disk or the memory of this machine is faulty",
        )
    return largest


def check_tokens(reloaded: PreTrainedTokenizerBase, original: PreTrainedTokenizerBase, folder: Path) -> None:
    """Check that a reloaded tokenizer returns the same ids as the one that was written.

    Raises:
        CheckpointError: If it does not.
    """
    for prompt in PROMPTS:
        if reloaded(prompt)["input_ids"] != original(prompt)["input_ids"]:
            raise CheckpointError(f"{folder}: the reloaded tokenizer returns other ids for {prompt!r}.")


def write_sums(folder: Path) -> None:
    """Write the SHA-256 of every file of a folder into `SUMS`."""
    lines = [f"{digest(file)}  {file.name}\n" for file in sorted(folder.iterdir()) if file.name != SUMS]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def check_sums(folder: Path) -> None:
    """Compare every file of a folder with its checksum.

    Raises:
        CheckpointError: If a file is missing or has changed.
    """
    fix = "export it again, or download it again"
    for line in (folder / SUMS).read_text(encoding="utf-8").splitlines():
        expected, _, name = line.partition("  ")
        if not name or Path(name).name != name:
            raise CheckpointError(f"{folder / SUMS} points outside its folder: {line}", expected="plain file names")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing.", fix=fix)
        if digest(folder / name) != expected:
            raise CheckpointError(f"{folder / name} has changed since the export: its checksum differs.", fix=fix)


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
