"""Weights are written and read under the names of the released checkpoints."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from hymba_tune.model import HymbaConfig, HymbaForCausalLM
from tests.conftest import ROOT
from tests.model.inputs import expected_names
from tests.tiny import CONFIG, random_texts, released_name, tiny_model

VARIANTS: dict[str, dict[str, Any]] = {
    "as_released": {},
    "every_bias_and_norm": {"mamba_proj_bias": True, "kq_norm": "perhead-rms"},
    "no_bias_and_norm": {"mamba_conv_bias": False, "mamba_inner_layernorms": False, "mlp_hidden_act": "relu2"},
    "no_meta_tokens": {"num_memory_tokens": 0},
    "untied_head": {"tie_word_embeddings": False},
}


def saved_tensors(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def assert_same_weights(model: HymbaForCausalLM, other: HymbaForCausalLM) -> None:
    expected = dict(other.named_parameters())
    assert dict(model.named_parameters()).keys() == expected.keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def load(folder: Path, **options: Any) -> HymbaForCausalLM:
    """Load with plain transformers, without missing or unexpected weights."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS.keys())
def test_saves_the_released_names_and_loads_the_same_bits(overrides: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(**overrides)
    model.save_pretrained(tmp_path)
    assert saved_tensors(tmp_path).keys() == expected_names(model.config)
    loaded = load(tmp_path)
    assert type(loaded) is HymbaForCausalLM
    assert_same_weights(loaded, model)
    ids = random_texts([9])[0][None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("path", sorted((ROOT / "tests/golden").glob("*.safetensors")), ids=lambda path: path.stem)
def test_golden_names_are_the_released_ones(path: Path) -> None:
    with safe_open(path, "pt") as file:
        names = {name.removeprefix("weight.") for name in file.keys() if name.startswith("weight.")}  # noqa: SIM118
        config = HymbaConfig(**json.loads(file.metadata()["config"]))
    assert names == expected_names(config)


def test_saves_and_loads_in_shards(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert index["weight_map"].keys() == saved_tensors(tmp_path).keys() == expected_names(model.config)
    assert_same_weights(load(tmp_path), model)


def test_shapes_are_the_released_ones(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    tensors = saved_tensors(tmp_path)
    inner, state, rank, width = 48, 3, 4, 24
    shapes = {
        "model.memory_tokens": (5, width),
        "model.layers.0.mamba.conv1d.weight": (inner, 1, 4),
        "model.layers.0.mamba.A_log.0": (inner, state),
        "model.layers.0.mamba.D.0": (inner,),
        "model.layers.0.mamba.x_proj.0.weight": (rank + 2 * state, inner),
        "model.layers.0.mamba.dt_proj.0.weight": (inner, rank),
        "model.layers.1.mamba.in_proj.weight": (width + 8 + 16 + 2 * inner, width),
        "model.layers.2.mamba.in_proj.weight": (width + 2 * inner, width),
    }
    assert {name: tuple(tensors[name].shape) for name in shapes} == shapes


def test_bfloat16_is_preserved(tmp_path: Path) -> None:
    model = tiny_model(torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in saved_tensors(tmp_path).values()} == {torch.bfloat16}
    assert_same_weights(load(tmp_path), model)
    assert load(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_plain_load_state_dict_accepts_released_names() -> None:
    model = tiny_model()
    released = {released_name(name): parameter.detach() for name, parameter in model.named_parameters()}
    other = HymbaForCausalLM(HymbaConfig(**CONFIG))
    missing, unexpected = other.load_state_dict(released, strict=False)
    assert missing == ["lm_head.weight"]
    assert not unexpected
    assert_same_weights(other, model)
    assert "model.memory_tokens" in released  # the caller's dict is unchanged


def test_plain_load_state_dict_accepts_the_names_of_the_modules() -> None:
    model = tiny_model()
    other = HymbaForCausalLM(HymbaConfig(**CONFIG))
    other.load_state_dict(model.state_dict())
    assert_same_weights(other, model)


def test_the_backbone_alone_accepts_released_names() -> None:
    model = tiny_model().model
    released = {released_name(name): parameter.detach() for name, parameter in model.named_parameters()}
    other = HymbaForCausalLM(HymbaConfig(**CONFIG)).model
    other.load_state_dict(released)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))


def test_a_checkpoint_with_the_names_of_the_modules_loads(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    tensors = saved_tensors(tmp_path)
    tensors["model.memory_tokens.weight"] = tensors.pop("model.memory_tokens")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_same_weights(load(tmp_path), model)


def test_a_checkpoint_that_also_contains_the_tied_head_loads(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    tensors = saved_tensors(tmp_path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_same_weights(load(tmp_path), model)


def test_a_released_folder_loads_without_its_code_and_generates(tmp_path: Path) -> None:
    """Its config names code to run, an attention that transformers does not have, and no cache."""
    model = tiny_model()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    code = {"AutoConfig": "configuration_hymba.HymbaConfig", "AutoModelForCausalLM": "modeling_hymba.HymbaForCausalLM"}
    config |= {"auto_map": code, "attn_implementation": "flex", "use_cache": False, "router_aux_loss_coef": 0.001}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "use_cache": False}))
    loaded = load(tmp_path)
    assert_same_weights(loaded, model)
    ids = random_texts([9])[0][None]
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(loaded.generate(ids, **options), model.generate(ids, **options))


def test_head_stays_tied(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    for one in (model, load(tmp_path), copy.deepcopy(model)):
        assert one.lm_head.weight is one.model.embed_tokens.weight
        assert one.get_output_embeddings() is one.lm_head
        assert one.get_input_embeddings() is one.model.embed_tokens


def test_untied_head_stays_untied(tmp_path: Path) -> None:
    tiny_model(tie_word_embeddings=False).save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight


def test_resized_vocabulary_reaches_the_head() -> None:
    model = tiny_model()
    model.resize_token_embeddings(70, mean_resizing=False)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model(torch.tensor([[69, 3]])).logits.shape == (1, 2, 70)
    assert model.config.vocab_size == 70


def test_copy_is_independent() -> None:
    model = tiny_model()
    other = copy.deepcopy(model)
    ids = random_texts([9])[0][None]
    before = model(ids).logits
    assert torch.equal(other(ids).logits, before)
    other.model.embed_tokens.weight.data.mul_(2)
    assert torch.equal(model(ids).logits, before)
    assert not torch.equal(other(ids).logits, before)
