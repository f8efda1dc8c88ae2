"""Every command takes an adapter that plain PEFT has saved, with the tokenizer of its base model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hymba_tune.adapters import tokenizer_of
from hymba_tune.checkpoint import load_tokenizer, load_weights
from hymba_tune.config import DPOConfig, Start
from hymba_tune.distill.teacher import find_teacher
from hymba_tune.errors import CheckpointError, ConfigError
from hymba_tune.registry import ModelSource, resolve_model
from hymba_tune.train.setup import check
from tests.cli.conftest import Command
from tests.hub.inputs import logits, publish
from tests.hub.server import Hub
from tests.runs import same_tensors

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # from the client's HTTP library
]


@pytest.fixture
def adapter(finished_run: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "plain"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(finished_run / "adapter" / name, folder)
    return folder


@pytest.fixture
def plain(small_model: Path, tmp_path: Path) -> Path:
    """An adapter with most of what PEFT has to offer, on a resized vocabulary."""
    model = load_weights(ModelSource("small", small_model), dtype=torch.float32, device=torch.device("cpu"))
    model.resize_token_embeddings(4100)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(small_model),
        target_modules="all-linear",
        exclude_modules=r".*layers\.2\..*",
        rank_pattern={"in_proj": 4},
        alpha_pattern={"out_proj": 3},
        use_dora=True,
        use_rslora=True,
        modules_to_save=["input_layernorm", "embed_tokens", "lm_head"],
        trainable_token_indices={"memory_tokens": [0, 2]},
    )
    adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path / "plain-adapter")
    return tmp_path / "plain-adapter"


def test_every_command_takes_a_plain_adapter(
    plain: Path, small_model: Path, questions: Path, command: Command, tmp_path: Path
) -> None:
    adapter = plain
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
    for out in ("merged", "exported", "alone"):
        torch.testing.assert_close(logits(str(tmp_path / out)), logits(str(adapter)), rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match=r"--start continue: .* trains the whole head(.|\n)*--start merge"):
        check(DPOConfig(model=str(adapter), data=[str(questions)], out=tmp_path / "run", start=Start.continue_))


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


@pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers` to `True`", "ignore:Use 'content=:DeprecationWarning"
)
def test_resized_adapter_of_the_hub_has_rows_for_its_tokenizer(hub: Hub, plain: Path, small_model: Path) -> None:
    """Whether it has is in its weights, which are downloaded for this."""
    expected = logits(str(plain))
    tokenizer = load_tokenizer(small_model)
    tokenizer.add_tokens(["<mine>"])
    tokenizer.save_pretrained(plain)
    publish(hub, small_model, "me/base")
    settings = json.loads((plain / "adapter_config.json").read_text())
    (plain / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "me/base"}))
    publish(hub, plain, "me/adapter")
    assert "<mine>" in tokenizer_of(resolve_model("me/adapter")).get_vocab()
    assert torch.equal(logits("me/adapter"), expected)


def test_own_tokenizer_takes_precedence(adapter: Path, small_model: Path) -> None:
    own = load_tokenizer(small_model)
    own.add_tokens(["<mine>"])
    own.save_pretrained(adapter)
    assert "<mine>" in tokenizer_of(resolve_model(str(adapter)), resize=True).get_vocab()


def test_broken_tokenizer_is_refused(adapter: Path) -> None:
    (adapter / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"No tokenizer can be read from .*plain"):
        tokenizer_of(resolve_model(str(adapter)))
