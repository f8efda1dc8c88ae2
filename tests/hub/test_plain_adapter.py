"""Every command uses the tokenizer of the base model for an adapter that plain PEFT saved without one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hymba_tune.adapters import tokenizer_of
from hymba_tune.checkpoint import load_tokenizer, load_weights
from hymba_tune.distill.teacher import find_teacher
from hymba_tune.errors import CheckpointError
from hymba_tune.registry import ModelSource, resolve_model
from tests.cli.conftest import Command
from tests.runs import same_tensors


@pytest.fixture
def adapter(finished_run: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "plain"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(finished_run / "adapter" / name, folder)
    return folder


def test_every_command_uses_the_base_models_tokenizer(
    adapter: Path, small_model: Path, questions: Path, command: Command, tmp_path: Path
) -> None:
    for words in (
        ("merge", adapter, "--out", tmp_path / "merged"),
        ("export", adapter, "--out", tmp_path / "exported"),
        ("export", adapter, "--adapter-only", "--out", tmp_path / "alone"),
        ("quantize", adapter, "--scheme", "int8", "--max-tokens", 50, "--out", tmp_path / "int8"),
        ("chat", adapter, "--prompt", "Hello", "--max-new-tokens", 2),
        ("eval", adapter, "--data", questions, "--max-rows", 1),
        ("sft", "--model", adapter, "--data", questions, "--dry-run"),
        ("plan", "--model", adapter, "--data", questions),
        ("data", "check", questions, "--model", adapter),
    ):
        result = command(*words)
        assert result.code == 0, (words, result.err)
    expected = load_tokenizer(small_model).get_vocab()
    for out in ("merged", "exported", "alone", "int8"):
        assert load_tokenizer(tmp_path / out).get_vocab() == expected
    assert find_teacher(str(adapter)).tokenizer.get_vocab() == expected


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapter_that_changes_its_base_is_exported_alone(small_model: Path, command: Command, tmp_path: Path) -> None:
    source = ModelSource("small", small_model)
    model = load_weights(source, dtype=torch.float32, device=torch.device("cpu"))
    config = LoraConfig(base_model_name_or_path=str(small_model), target_modules=["in_proj"], init_lora_weights="pissa")
    adapted = get_peft_model(model, config)
    adapted.model.model.layers[1].mamba.in_proj.lora_B["default"].weight.data.mul_(2)
    adapted.save_pretrained(tmp_path / "pissa")
    result = command("export", tmp_path / "pissa", "--adapter-only", "--out", tmp_path / "alone")
    assert result.code == 0, result.err
    assert same_tensors(tmp_path / "pissa", tmp_path / "alone")


def test_own_tokenizer_takes_precedence(adapter: Path, small_model: Path) -> None:
    own = load_tokenizer(small_model)
    own.add_tokens(["<mine>"])
    own.save_pretrained(adapter)
    assert "<mine>" in tokenizer_of(resolve_model(str(adapter)), resize=True).get_vocab()


def test_broken_tokenizer_is_refused(adapter: Path) -> None:
    (adapter / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"No tokenizer can be read from .*plain"):
        tokenizer_of(resolve_model(str(adapter)))
