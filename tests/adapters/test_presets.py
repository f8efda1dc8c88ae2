import pytest
import torch

from hymba_tune.adapters import PRESETS, lora_config
from hymba_tune.adapters.presets import rows_outside
from hymba_tune.config import MetaTokens, Method
from hymba_tune.errors import ConfigError
from hymba_tune.model import HymbaForCausalLM
from tests.adapters.small import adapted_model, config_for
from tests.tiny import tiny_model

MIXER = {"mamba.in_proj", "mamba.x_proj.0", "mamba.dt_proj.0", "mamba.out_proj"}
MLP = {f"moe.experts.0.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
MODULES = {
    "all": MIXER | MLP,
    "attention-ssm": MIXER,
    "attention": {"mamba.in_proj", "mamba.out_proj"},
    "ssm": MIXER,
    "mlp": MLP,
}


def adapted_names(targets: str, meta: str) -> set[str]:
    model = adapted_model(targets, meta).get_base_model()
    return {name for name, module in model.named_modules() if hasattr(module, "lora_A")}


def config_of(model: HymbaForCausalLM, *targets: str) -> set[str]:
    config = lora_config(
        model,
        targets=targets,
        method=Method.lora,
        rank=4,
        alpha=None,
        dropout=0.0,
        rslora=False,
        meta_tokens=MetaTokens.frozen,
    )
    return set(config.target_modules)


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_adapts_its_modules_in_every_layer_and_nothing_else(preset: str) -> None:
    expected = {f"model.layers.{layer}.{name}" for layer in range(4) for name in MODULES[preset]}
    assert adapted_names(preset, "frozen") == expected
    assert adapted_names(preset, "lora") == expected | {"model.memory_tokens"}


def test_attention_and_ssm_together_are_attention_ssm() -> None:
    assert MODULES["attention"] | MODULES["ssm"] == MODULES["attention-ssm"]
    widths = [40, 8, 16, 80, 80]
    attention, ssm = rows_outside(["ssm"], widths), rows_outside(["attention"], widths)
    rows = list(range(sum(widths)))
    assert attention is not None
    assert ssm is not None
    assert rows[attention] + rows[ssm] == rows


def test_rows_of_a_layer_without_keys_and_values() -> None:
    assert rows_outside(["attention"], [40, 0, 0, 80, 80]) == slice(40, None)
    assert rows_outside(["ssm"], [40, 0, 0, 80, 80]) == slice(0, 40)
    assert rows_outside(["attention-ssm"], [40, 0, 0, 80, 80]) is None


def test_settings_reach_peft() -> None:
    model = tiny_model()
    config = config_for(model, rank=6, dropout=0.25, rslora=True)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora, config.use_dora) == (
        6,
        12,
        0.25,
        True,
        False,
    )
    config = config_for(model, alpha=5.0, method=Method.dora)
    assert (config.lora_alpha, config.use_rslora, config.use_dora) == (5.0, False, True)
    assert config.task_type == "CAUSAL_LM"


def test_fully_trained_meta_tokens_are_saved_as_a_module() -> None:
    config = config_for(tiny_model(), meta="full")
    assert config.modules_to_save == ["memory_tokens"]
    assert "memory_tokens" not in config.target_modules


@pytest.mark.parametrize("meta", MetaTokens)
def test_meta_tokens_of_a_model_without_any_are_not_targeted(meta: str) -> None:
    config = config_for(tiny_model(num_memory_tokens=0), meta=meta)
    assert config.modules_to_save is None
    assert "memory_tokens" not in config.target_modules


def test_preset_names_only_modules_of_the_model() -> None:
    assert set(config_for(tiny_model(mlp_hidden_act="relu2"), "mlp", "frozen").target_modules) == {
        "up_proj",
        "down_proj",
    }


def test_targets_can_be_module_names() -> None:
    model = tiny_model()
    assert config_of(model, "x_proj.0", "in_proj", "in_proj") == {"x_proj.0", "in_proj"}
    assert config_of(model, "layers.3.mamba.out_proj") == {"layers.3.mamba.out_proj"}
    full = "model.layers.0.moe.experts.0.up_proj"
    assert config_of(model, full) == {full}


def test_configuration_needs_no_weights() -> None:
    with torch.device("meta"):
        model = HymbaForCausalLM(tiny_model().config)
    assert config_of(model, "dt_proj.0") == {"dt_proj.0"}


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["in_proj", "xproj.0"], r"no linear layer called xproj\.0(.|\n)*down_proj, dt_proj\.0(.|\n)*mean x_proj\.0\?"),
        (["x_proj"], r"no linear layer called x_proj\.(.|\n)*mean x_proj\.0\?"),
        (["proj"], "no linear layer called proj"),
        (["layers.4.mamba.in_proj"], r"no linear layer called layers\.4\.mamba\.in_proj"),
        (["lm_head"], "no linear layer called lm_head"),
        (["embed_tokens"], "no linear layer called embed_tokens"),
        (["atention"], "mean attention"),
        (["ssm", "mlp"], "ssm is a preset, which excludes other targets"),
        ([], "empty"),
    ],
)
def test_unusable_targets_are_refused(targets: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(tiny_model(), *targets)
