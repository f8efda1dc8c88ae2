"""Runs that take a second: a small random model that reads the packaged tokenizer, a few questions, a few steps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import trl
from safetensors.torch import load_file, save_file
from torch import Tensor

from hymba_tune.checkpoint import load_tokenizer
from hymba_tune.config import MergeConfig, SFTConfig
from hymba_tune.hub import merge
from hymba_tune.registry import resolve_model
from hymba_tune.train.run import Run
from hymba_tune.train.screen import Screen
from hymba_tune.train.sft import run_sft
from tests.tiny import tiny_model

SMALL: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "sliding_window": 16,
    "global_attn_idx": [0],
    "num_memory_tokens": 4,
    "max_position_embeddings": 512,
    "orig_max_position_embeddings": 256,
    "pad_token_id": 4095,
}
WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64}
"""Changes to it with which every linear layer that is to be quantized to 4 bits can be."""
ANSWER_TOKENS = 6
"""Tokens that sample answers may have: writing them takes longest of all."""
GRADIENT_STEP: dict[str, Any] = {
    "method": "full",
    "optimizer": "sgd",
    "lr": 1.0,
    "lr_schedule": "constant",
    "warmup": 0.0,
    "max_grad_norm": 1e9,
    "steps": 1,
    "eval_split": 0.0,
}
"""One step of plain gradient descent, which moves each weight by its gradient."""


def save_model(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A random model with every kind of layer, and the packaged tokenizer."""
    tiny_model(dtype, **SMALL | changes).save_pretrained(folder)
    load_tokenizer(resolve_model("hymba-nano").folder).save_pretrained(folder)
    return folder


def save_questions(path: Path, count: int = 24) -> Path:
    """Conversations of different lengths whose answers can be learned in a few steps."""
    animals, numbers = ("cat", "dog", "bird", "fish", "horse"), ("one", "two", "three", "four")
    with path.open("w") as file:
        for i in range(count):
            animal, number = animals[i % 5], numbers[i % 4]
            prompt = f"I see {number} {animal}s" + ", as you do" * (i % 3) + ". What do I see?"
            file.write(json.dumps({"prompt": prompt, "completion": f"You see {number} {animal}s."}) + "\n")
    return path


def settings(model: Path, data: Path, out: Path, **changes: Any) -> SFTConfig:
    """Two steps of LoRA by default."""
    usual: dict[str, Any] = {"dtype": "float32", "rank": 4, "lr": 1e-2, "batch_size": 4, "steps": 2, "log_every": 1}
    return SFTConfig(**{"model": str(model), "data": [str(data)], "out": out} | usual | changes)


def run(config: SFTConfig, screen: Screen | None = None, *, report: bool = False) -> Run:
    """`run_sft` with short sample answers, and without drawing its report."""
    drawn = nullcontext() if report else patch("hymba_tune.report.write_report")
    with patch("hymba_tune.train.samples.SAMPLE_TOKENS", ANSWER_TOKENS), drawn:
        return run_sft(config, screen or Screen())


def merge_run(path: Path, out: Path) -> Path:
    """The folder of a run's model in float32, its adapter folded in."""
    return merge(MergeConfig(model=str(path), out=out, dtype="float32"), Screen().working).folder


def one_plain_step(
    folder: Path, *, batch_size: int, grad_accum: int, use_cpu: bool = True, **changes: Any
) -> trl.SFTConfig:
    """TRL's settings for one step of plain gradient descent, which moves each weight by its gradient."""
    return trl.SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        gradient_accumulation_steps=grad_accum,
        max_length=64,
        max_steps=1,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=1e9,
        logging_steps=1,
        save_strategy="no",
        activation_checkpointing=False,
        eval_packing=False,
        use_cpu=use_cpu,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        **changes,
    )


def tensors(folder: Path) -> dict[str, Tensor]:
    """All that the safetensors files of a folder hold."""
    found: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    assert found, f"{folder} holds no tensors"
    return found


def rewrite(folder: Path, changed: dict[str, Tensor], removed: Sequence[str] = ()) -> None:
    """Change the tensors of a saved model."""
    kept = {name: tensor for name, tensor in (tensors(folder) | changed).items() if name not in removed}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two folders hold the same tensors, bit for bit."""
    a, b = tensors(one), tensors(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
