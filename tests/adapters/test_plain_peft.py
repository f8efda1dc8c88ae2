"""Adapters that plain PEFT trains and saves are merged into the model that PEFT computes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from hymba_tune.adapters import (
    AdapterWatch,
    adapter_updates,
    load_adapter,
    open_model,
    plain_config,
    reason_against_continuing,
    vocabulary_of,
)
from hymba_tune.errors import CheckpointError
from hymba_tune.registry import ModelSource
from tests.adapters.small import logits, train
from tests.tiny import CONFIG, tiny_model
from tests.tolerances import FLOAT32

LINEAR = ["in_proj", "out_proj", "x_proj.0", "dt_proj.0", "gate_proj", "up_proj", "down_proj"]
PATTERNS: dict[str, dict[str, Any]] = {
    "all linear": {"target_modules": "all-linear"},
    "regular expression": {"target_modules": r".*\.mamba\.(in|out)_proj"},
    "some layers": {"target_modules": ["in_proj"], "layers_to_transform": [1, 2], "layers_pattern": "layers"},
    "one layer": {"target_modules": ["in_proj"], "layers_to_transform": 1},
    "excluded": {"exclude_modules": ["down_proj"]},
    "excluded by a regular expression": {"exclude_modules": r".*layers\.0\..*"},
    "ranks": {"rank_pattern": {"in_proj": 4}, "alpha_pattern": {r"^model\.layers\.0\.mamba\.in_proj": 32}},
    "DoRA, rsLoRA": {"use_dora": True, "use_rslora": True, "lora_dropout": 0.1},
    "tokens": {"trainable_token_indices": [3, 7, 60]},
    "meta tokens": {"trainable_token_indices": {"memory_tokens": [0, 1]}},
    "norms": {"modules_to_save": ["norm", "input_layernorm", "pre_avg_layernorm1", "conv1d"]},
    "mixers": {"target_modules": ["gate_proj"], "modules_to_save": ["mamba", "memory_tokens"]},
    "a layer": {"target_modules": ["in_proj"], "modules_to_save": ["layers.3"]},
}
"""Adapters without a whole embedding or head."""
EMBEDDINGS: dict[str, tuple[bool, dict[str, Any]]] = {
    "embedding": (False, {"target_modules": [*LINEAR, "embed_tokens"]}),
    "embedding, DoRA": (False, {"target_modules": ["embed_tokens"], "use_dora": True}),
    "head": (False, {"target_modules": [*LINEAR, "lm_head"]}),
    "both": (False, {"target_modules": r"model\.embed_tokens|lm_head"}),
    "both, tied": (True, {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "head excluded": (False, {"target_modules": ["embed_tokens", "lm_head"], "exclude_modules": ["lm_head"]}),
    "copied embedding": (False, {"modules_to_save": ["embed_tokens"]}),
    "copied head": (False, {"modules_to_save": ["lm_head"]}),
    "two copies": (False, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "one copy": (True, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "tokens of the embedding": (True, {"trainable_token_indices": {"embed_tokens": [3, 7]}}),
    "tokens of the head": (False, {"trainable_token_indices": {"lm_head": [3, 7]}}),
    "tokens of both": (True, {"trainable_token_indices": {"embed_tokens": [3, 7], "lm_head": [3, 7]}}),
    "other tokens": (False, {"trainable_token_indices": {"embed_tokens": [3, 7], "lm_head": [3, 8]}}),
}
"""Adapters of the embedding or the head, and whether those remain one matrix where they are one below."""
RESIZED: dict[str, dict[str, Any]] = {
    "not trained": {},
    "tokens": {"trainable_token_indices": [61, 62, 63]},
    "two copies": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "one copy": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "embedding": {"target_modules": ["embed_tokens"]},
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`, but no tied modules were found"),
]


def trained(
    settings: dict[str, Any], folder: Path, *, tied: bool = True, size: int = 0
) -> tuple[PeftModel, ModelSource]:
    """Return a model with an adapter of plain PEFT, and the saved adapter."""
    tiny_model(tie_word_embeddings=tied).save_pretrained(folder / "base")
    model = tiny_model(tie_word_embeddings=tied)
    model.name_or_path = str(folder / "base")
    if size:
        model.resize_token_embeddings(size)
    adapted = get_peft_model(
        model, LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": LINEAR, "r": 2} | settings)
    )
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    adapted.save_pretrained(folder / "adapter")
    return adapted, ModelSource("mine", folder / "adapter", folder / "adapter", str(folder / "base"))


def check(settings: dict[str, Any], folder: Path, **options: Any) -> bool:
    """Check that a merged adapter is the trained model, and return whether the head is the embedding."""
    adapted, source = trained(settings, folder, **options)
    base = tiny_model(tie_word_embeddings=options.get("tied", True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = open_model(source, dtype=torch.float32, device=torch.device("cpu"))
        unmerged = load_adapter(base, folder / "adapter")
    FLOAT32.check(logits(merged), logits(adapted))
    FLOAT32.check(logits(unmerged), logits(adapted))
    assert vocabulary_of(source) == merged.config.vocab_size == len(merged.lm_head.weight)
    assert plain_config(source).tie_word_embeddings == merged.config.tie_word_embeddings
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == merged.config.tie_word_embeddings
    return bool(merged.config.tie_word_embeddings)


@pytest.mark.parametrize("name", PATTERNS)
def test_merged_equals_trained(name: str, tmp_path: Path) -> None:
    assert check(PATTERNS[name], tmp_path)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", EMBEDDINGS)
def test_merged_equals_trained_with_an_adapted_embedding_or_head(name: str, tied: bool, tmp_path: Path) -> None:
    remains, settings = EMBEDDINGS[name]
    assert check(settings, tmp_path, tied=tied) == (tied and remains)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", RESIZED)
def test_merged_equals_trained_after_a_resize(name: str, tied: bool, tmp_path: Path) -> None:
    if name == "embedding" and not tied:
        with pytest.raises(CheckpointError, match=r"resized vocabulary, and PEFT has not saved its lm_head"):
            check(RESIZED[name], tmp_path, tied=tied, size=64)
    else:
        check(RESIZED[name], tmp_path, tied=tied, size=64)


def test_adapter_on_an_untied_adapter_is_merged(tmp_path: Path) -> None:
    _, below = trained(EMBEDDINGS["copied head"][1], tmp_path / "below")
    model = open_model(below, dtype=torch.float32, device=torch.device("cpu"))
    config = LoraConfig(target_modules=["in_proj", "embed_tokens"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    (tmp_path / "above").mkdir()
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "below/adapter")
    adapted.save_pretrained(tmp_path / "above", save_embedding_layers=False)
    above = ModelSource("above", *[tmp_path / "above"] * 2, str(tmp_path / "below/adapter"))
    FLOAT32.check(logits(open_model(above, dtype=torch.float32, device=torch.device("cpu"))), logits(adapted))


def renamed(folder: Path, **tensors: Any) -> None:
    path = folder / "adapter/adapter_model.safetensors"
    save_file(load_file(path) | tensors, path)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((64, 24), "contains an embedding and a head that differ, and its base model has one matrix for both"),
        ((60, 24), r"lm_head\.weight has shape \(60, 24\), expected \(64, 24\)"),
    ],
)
def test_embedding_and_head_that_do_not_fit_are_refused(shape: tuple[int, int], message: str, tmp_path: Path) -> None:
    _, source = trained({}, tmp_path, size=64)
    renamed(tmp_path, **{"base_model.model.lm_head.weight": torch.ones(shape)})
    with pytest.raises(CheckpointError, match=message):
        open_model(source, dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("settings", "size", "reason"),
    [
        ({"target_modules": ["lm_head"]}, 0, "trains the whole head"),
        ({"modules_to_save": ["lm_head"]}, 0, "trains the whole head"),
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, 0, "trains the whole head"),
        ({}, 64, "contains a resized embedding"),
        ({"target_modules": ["embed_tokens"]}, 0, None),
        ({"modules_to_save": ["norm"], "trainable_token_indices": [3]}, 0, None),
    ],
)
def test_adapters_that_cannot_be_continued(
    settings: dict[str, Any], size: int, reason: str | None, tmp_path: Path
) -> None:
    found = reason_against_continuing(trained(settings, tmp_path, size=size)[1])
    assert (found or "").startswith(reason or "nothing") or found is reason is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"target_modules": ["lm_head"], "trainable_token_indices": [3]},
            r"adapts lm_head and trains rows of it, which cannot be merged(.|\n)*tied to it",
        ),
        ({"target_modules": ["gate_proj"], "modules_to_save": ["mamba", "norm"]}, r"PEFT cannot load .*dt_layernorm"),
    ],
)
def test_combinations_that_peft_trains_and_that_cannot_be_merged(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    _, source = trained(settings, tmp_path)
    with pytest.raises(CheckpointError, match=message):
        open_model(source, dtype=torch.float32, device=torch.device("cpu"))


def test_copied_modules_of_any_kind_are_watched_and_measured(tmp_path: Path) -> None:
    trained({"target_modules": ["gate_proj"], "modules_to_save": ["mamba"]}, tmp_path)
    model = load_adapter(tiny_model(), tmp_path / "adapter", trainable=True)
    watch = AdapterWatch(model)
    train(model, steps=1)
    assert not [name for name in watch.unmoved() if "k_norm" not in name]
    sizes = {(update.layer, update.part): update.size for update in adapter_updates(model)}
    assert {(layer, part) for layer in range(CONFIG["num_hidden_layers"]) for part in ("x", "out_proj", "A_log")} <= {
        *sizes
    }
    assert all(sizes.values())
