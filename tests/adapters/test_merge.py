import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from hymba_tune.adapters import merge
from hymba_tune.config import MetaTokens
from hymba_tune.errors import CheckpointError
from tests.adapters.small import METHODS, adapted_model, logits, train
from tests.tiny import tiny_model
from tests.tolerances import FLOAT32


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("meta", MetaTokens)
@pytest.mark.parametrize("method", METHODS)
def test_merged_equals_unmerged_in_float32(method: str, meta: str) -> None:
    model = adapted_model("all", meta, **METHODS[method])
    train(model)
    unmerged = logits(model)
    FLOAT32.check(logits(merge(model)), unmerged)
    assert error(unmerged, logits(tiny_model())) > 0.1


@pytest.mark.parametrize("meta", MetaTokens)
@pytest.mark.parametrize("method", METHODS)
def test_merged_equals_unmerged_in_bfloat16(method: str, meta: str) -> None:
    model = adapted_model("all", meta, torch.bfloat16, **METHODS[method])
    train(model)
    unmerged, exact = logits(model), logits(copy.deepcopy(model).float())
    # Merging rounds weights where the unmerged model rounds updates: both are off from the exact model, each its own
    # way, by bfloat16's noise in this model. Measured, they differ by 0.9 to 1.6 of it.
    noise = error(unmerged, exact)
    assert error(logits(merge(model)), unmerged) < 3 * noise
    assert error(exact, logits(tiny_model())) > 10 * noise


def test_merged_weights_are_rounded_once() -> None:
    model = adapted_model("all", "lora", torch.bfloat16)
    train(model)
    base = tiny_model(torch.bfloat16).state_dict()
    layer = model.get_base_model().model.layers[1].mamba.in_proj
    tokens = model.get_base_model().model.memory_tokens
    sums = {
        "model.layers.1.mamba.in_proj.weight": layer.get_delta_weight("default"),
        "model.memory_tokens.weight": tokens.get_delta_weight("default"),
    }
    merged = merge(model).state_dict()
    for name, update in sums.items():
        assert torch.equal(merged[name], (base[name].float() + update).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("meta", MetaTokens)
def test_merged_model_saves_and_loads_like_a_released_one(meta: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = adapted_model("all", meta, dtype)
    train(model)
    merged = merge(model)
    merged.save_pretrained(tmp_path / "merged")
    tiny_model(dtype).save_pretrained(tmp_path / "base")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)

    assert not any(info.values())
    assert torch.equal(logits(loaded), logits(merged))
    assert {parameter.dtype for parameter in merged.parameters()} == {dtype}
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    names = [path.name for path in (tmp_path / "merged").iterdir()]
    assert sorted(names) == sorted(path.name for path in (tmp_path / "base").iterdir())
    assert (tmp_path / "merged/config.json").read_text() == (tmp_path / "base/config.json").read_text()


def test_merged_names_are_the_base_models() -> None:
    assert merge(adapted_model("all", "full")).state_dict().keys() == tiny_model().state_dict().keys()


def test_a_new_adapter_merges_into_the_base_itself() -> None:
    merged = merge(adapted_model()).state_dict()
    assert all(torch.equal(tensor, merged[name]) for name, tensor in tiny_model().state_dict().items())


def test_adapter_with_nan_is_not_merged() -> None:
    model = adapted_model()
    broken = model.get_base_model().model.layers[2].mamba.x_proj[0]
    broken.lora_B["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"layers\.2\.mamba\.x_proj\.0\.lora_B\.weight holds NaN or infinity"):
        merge(model)
    assert torch.equal(broken.get_base_layer().weight, tiny_model().model.layers[2].mamba.x_proj[0].weight)
