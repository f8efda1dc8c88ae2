"""Is what was written what was meant? Logits of sample prompts, token ids, and a checksum of every file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hymba_tune.errors import CheckpointError

SUMS = "SHA256SUMS"
"""As ``sha256sum --check`` reads it."""
PROMPTS = (
    "The meta tokens stand in front of every text.",
    " A space first; then 12,345 and\n    def code(): return None",
    "Ünïcödé, 漢字 and ☃",
)
"""Of different lengths, so that they are padded."""
TOLERANCE = 1e-3
"""Of the largest logit. On a CPU the logits are the same bit for bit; a GPU's sums have no fixed order."""


@torch.inference_mode()
def sample_logits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Logits of `PROMPTS` and their first words alone, as one padded batch: ``(6, L, V)``, float32, on the CPU."""
    texts = [*PROMPTS, *(prompt[:7] for prompt in PROMPTS)]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    ids, mask = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
    logits: Tensor = model.eval()(input_ids=ids, attention_mask=mask).logits
    return logits.float().cpu()


def check_logits(written: Tensor, meant: Tensor, folder: Path) -> float:
    """Compare the logits of what was written with those of what was meant.

    Returns:
        The largest difference.

    Raises:
        CheckpointError: If it is more than rounding.
    """
    largest, scale = float((written - meant).abs().max()), float(meant.abs().max())
    if not largest <= TOLERANCE * scale:
        raise CheckpointError(
            f"{folder}: read again, the model is another one: a logit differs by {largest:.3g}.",
            expected=f"at most {TOLERANCE * scale:.3g}",
            fix="try again; if it happens twice, the disk or the memory of this machine is at fault",
        )
    return largest


def check_tokens(written: PreTrainedTokenizerBase, meant: PreTrainedTokenizerBase, folder: Path) -> None:
    """See that a tokenizer that was written spells as the one it was written from.

    Raises:
        CheckpointError: If it does not.
    """
    for prompt in PROMPTS:
        if written(prompt)["input_ids"] != meant(prompt)["input_ids"]:
            raise CheckpointError(f"{folder}: read again, the tokenizer has other ids for {prompt!r}.")


def write_sums(folder: Path) -> None:
    """Write the SHA-256 of every file of a folder beside them."""
    lines = [f"{digest(file)}  {file.name}\n" for file in sorted(folder.iterdir()) if file.name != SUMS]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def check_sums(folder: Path) -> None:
    """Compare every file of a folder with its checksum.

    Raises:
        CheckpointError: Naming the file that is missing or has changed.
    """
    again = "export it again, or download it again"
    for line in (folder / SUMS).read_text(encoding="utf-8").splitlines():
        wanted, _, name = line.partition("  ")
        if not name or Path(name).name != name:
            raise CheckpointError(f"{folder / SUMS} points outside its folder: {line}", expected="plain file names")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing.", fix=again)
        if digest(folder / name) != wanted:
            raise CheckpointError(f"{folder / name} is not what was exported: its checksum differs.", fix=again)


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
