"""The released config loads unchanged, and unsupported values are refused with the name of their field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import AutoConfig, AutoModelForCausalLM

from hymba_tune.model import HymbaConfig, HymbaForCausalLM
from tests.tiny import CONFIG

PARAMETERS = 1_522_797_824
"""The number of parameters of the released 1.5B models, with the embedding counted once."""
RELEASED: dict[str, Any] = {
    "vocab_size": 32001,
    "hidden_size": 1600,
    "intermediate_size": 5504,
    "num_hidden_layers": 32,
    "num_attention_heads": 25,
    "num_key_value_heads": 5,
    "global_attn_idx": [0, 15, 31],
    "kv_reuse_group": [*([i, i + 1] for i in range(1, 15, 2)), [16, 17, 18], *([i, i + 1] for i in range(19, 31, 2))],
    "num_memory_tokens": 128,
    "mamba_d_state": 16,
    "mamba_dt_rank": 100,
}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "experts": ({"num_experts": 2}, "num_experts is 2; only 1 is supported"),
    "mambas": ({"num_mamba": 2}, "num_mamba is 2; only 1 is supported"),
    "interspersed_meta_tokens": (
        {"memory_tokens_interspersed_every": 64},
        "memory_tokens_interspersed_every is 64; only 0 is supported",
    ),
    "kv_reuse_by_step": ({"kv_reuse_every_i_layer": 2}, "kv_reuse_every_i_layer is 2; only -1 is supported"),
    "kv_weight_reuse": ({"kv_weight_reuse": True}, "kv_weight_reuse is True; only False is supported"),
    "attention_size": ({"attn_hidden_size": 12}, "attn_hidden_size is 12; only -1 is supported"),
    "head_dim": ({"kq_head_dim": 8}, "kq_head_dim is 8; only -1 is supported"),
    "dropout": ({"attention_dropout": 0.1}, r"attention_dropout is 0.1; only 0 is supported"),
    "kq_norm": ({"kq_norm": "layer"}, "kq_norm is 'layer'; expected one of .*'perhead-rms'"),
    "rope_type": ({"rope_type": "yarn"}, "rope_type is 'yarn'; expected one of .*'dynamic_ntk'"),
    "mlp": ({"mlp_hidden_act": "gelu"}, "mlp_hidden_act is 'gelu'; expected one of .*'relu2'"),
    "head_width": ({"hidden_size": 25}, r"hidden_size \(25\) must be a multiple of num_attention_heads \(6\)"),
    "head_groups": (
        {"num_key_value_heads": 4},
        r"num_attention_heads \(6\) must be a multiple of num_key_value_heads \(4\)",
    ),
    "no_layers": ({"num_hidden_layers": 0}, "num_hidden_layers is 0; expected a whole number of at least 1"),
    "no_rank": ({"mamba_dt_rank": "full"}, "mamba_dt_rank is 'full'; expected a whole number"),
    "narrow_heads": ({"hidden_size": 12}, "hidden_size / num_attention_heads is 2; .* at least 4"),
    "odd_heads": (
        {"hidden_size": 18},
        "hidden_size / num_attention_heads is 3; RoPE rotates pairs, so it must be even",
    ),
    "global_layer_beyond_the_last": (
        {"global_attn_idx": [0, 4]},
        r"global_attn_idx names layers \[4\]; the layers are 0 to 3",
    ),
    "group_beyond_the_last": (
        {"kv_reuse_group": [[2, 3, 4]]},
        r"kv_reuse_group names layers \[4\]; the layers are 0 to 3",
    ),
    "layer_in_two_groups": ({"kv_reuse_group": [[0, 1], [1, 2]]}, "each layer may be in one group only"),
    "consumer_before_its_producer": ({"kv_reuse_group": [[2, 1]]}, "each layer may be in one group only, after its"),
}


def settings(config: HymbaConfig) -> dict[str, Any]:
    """Return all settings but the folder that they were read from."""
    return {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}


@pytest.mark.parametrize(("overrides", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_unsupported_values_are_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        HymbaConfig(**CONFIG | overrides)


@pytest.mark.parametrize(
    ("field", "value"),
    [("hidden_size", "24"), ("num_hidden_layers", 4.5), ("rope", "yes"), ("kv_reuse_group", [1, 2])],
)
def test_value_of_a_wrong_type_is_refused(field: str, value: Any) -> None:
    with pytest.raises(StrictDataclassFieldValidationError, match=f"Validation error for field '{field}'"):
        HymbaConfig(**CONFIG | {field: value})


def test_heads_of_odd_width_need_no_rope() -> None:
    assert HymbaConfig(**CONFIG | {"hidden_size": 18, "rope": False}).head_dim == 3


def test_released_size() -> None:
    with torch.device("meta"):
        model = HymbaForCausalLM(HymbaConfig(**RELEASED))
    assert model.num_parameters() == PARAMETERS


def test_automatic_dt_rank_is_a_sixteenth_rounded_up() -> None:
    assert HymbaConfig(**CONFIG | {"mamba_dt_rank": "auto", "hidden_size": 36}).mamba_dt_rank == 3
    assert HymbaConfig(**RELEASED | {"mamba_dt_rank": "auto"}).mamba_dt_rank == 100


def test_config_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    config = HymbaConfig(**CONFIG, rope_type="dynamic_ntk", kq_norm="rms")
    config.save_pretrained(tmp_path)
    assert settings(AutoConfig.from_pretrained(tmp_path)) == settings(config)


@pytest.mark.parametrize("key", ["attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("prefix", ["", "_"])
def test_an_implementation_that_a_file_names_is_not_loaded(prefix: str, key: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"model_type": "hymba", prefix + key: "evil/kernel"}))
    config = AutoConfig.from_pretrained(tmp_path)
    assert config._attn_implementation is None
    assert "evil" not in config.to_json_string()
    assert AutoModelForCausalLM.from_config(config).config._attn_implementation == "sdpa"


ODD_KEYS: dict[str, Any] = {
    "architectures": ["HymbaForCausalLM"],
    "attn_implementation": "flex",
    "auto_map": {
        "AutoConfig": "configuration_hymba.HymbaConfig",
        "AutoModelForCausalLM": "modeling_hymba.HymbaForCausalLM",
    },
    "conv_dim": {str(layer): 3200 for layer in range(32)},
    "layer_type": ["h"] * 32,
    "model_type": "hymba",
    "router_aux_loss_coef": 0.001,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.44.0",
    "use_cache": False,
}
"""The keys of the released file that newer versions of transformers interpret differently."""


class TestReleasedConfig:
    """NVIDIA's released folder, or one like it, loads without running its code and without the network."""

    @pytest.fixture(params=["like_released", "released"])
    def folder(self, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
        if request.param == "released":
            shared: Path = request.getfixturevalue("shared")
            return shared / "reference/hymba-1.5b-base"
        folder = tmp_path_factory.mktemp("released")
        (folder / "config.json").write_text(json.dumps(RELEASED | ODD_KEYS))
        return folder

    def test_loads_without_confirmation(self, folder: Path) -> None:
        config = AutoConfig.from_pretrained(folder)
        assert type(config) is HymbaConfig
        released = json.loads((folder / "config.json").read_text())
        assert {name: getattr(config, name) for name in RELEASED} == {name: released[name] for name in RELEASED}
        assert config.dtype == torch.bfloat16

    def test_builds_the_released_model(self, folder: Path) -> None:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        assert type(model) is HymbaForCausalLM
        assert model.num_parameters() == PARAMETERS
        assert model.dtype == torch.bfloat16

    def test_keys_that_newer_transformers_would_follow_are_removed(self, folder: Path, tmp_path: Path) -> None:
        AutoConfig.from_pretrained(folder).save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())
        assert not {"auto_map", "attn_implementation", "_attn_implementation"} & saved.keys()
        assert saved["use_cache"] is True
        assert saved["router_aux_loss_coef"] == 0
        again = AutoConfig.from_pretrained(tmp_path)
        assert settings(again) == settings(AutoConfig.from_pretrained(folder))

    def test_keeps_every_other_key(self, folder: Path) -> None:
        config = AutoConfig.from_pretrained(folder).to_dict()
        released = json.loads((folder / "config.json").read_text())
        changed = {name for name, value in released.items() if config.get(name) != value}
        assert changed <= {
            *("attn_implementation", "auto_map", "conv_dim", "router_aux_loss_coef"),
            *("torch_dtype", "transformers_version", "use_cache"),
        }
