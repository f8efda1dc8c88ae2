from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from hymba_tune.adapters import add_adapter, check_onto, folding_note, load_adapter, open_model, quantized_base
from hymba_tune.adapters.weights import RoundedWeights, StoredWeights, released_name
from hymba_tune.checkpoint import load_config, load_weights
from hymba_tune.config import MetaTokens, Onto, Scheme
from hymba_tune.errors import CheckpointError, ConfigError
from hymba_tune.registry import ModelSource, resolve_model
from hymba_tune.schemes import quantization, stored_bytes
from tests.adapters.small import METHODS, adapted_model, config_for, logits, merged, train
from tests.runs import SMALL
from tests.tiny import random_texts, tiny_model
from tests.tolerances import FLOAT32

CPU = torch.device("cpu")


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("meta", MetaTokens)
@pytest.mark.parametrize("method", METHODS)
def test_merged_equals_unmerged_in_float32(method: str, meta: str, tmp_path: Path) -> None:
    model = adapted_model("all", meta, **METHODS[method])
    train(model)
    unmerged = logits(model)
    FLOAT32.check(logits(merged(model, tmp_path)), unmerged)
    assert error(unmerged, logits(tiny_model())) > 0.1


@pytest.mark.parametrize("meta", MetaTokens)
@pytest.mark.parametrize("method", METHODS)
def test_merged_equals_unmerged_in_bfloat16(method: str, meta: str, tmp_path: Path) -> None:
    model = adapted_model("all", meta, torch.bfloat16, **METHODS[method])
    train(model)
    unmerged, exact = logits(model), logits(copy.deepcopy(model).float())
    # Merging rounds weights, while the unmerged model rounds updates, so both differ from the exact model by bfloat16's
    # rounding noise. The measured difference between the two is 0.9 to 1.6 times that noise.
    noise = error(unmerged, exact)
    assert error(logits(merged(model, tmp_path)), unmerged) < 3 * noise
    assert error(exact, logits(tiny_model())) > 10 * noise


def test_merged_weights_are_rounded_once(tmp_path: Path) -> None:
    model = adapted_model("all", "lora", torch.bfloat16)
    train(model)
    base = tiny_model(torch.bfloat16).state_dict()
    layer = model.get_base_model().model.layers[1].mamba.in_proj
    tokens = model.get_base_model().model.memory_tokens
    sums = {
        "model.layers.1.mamba.in_proj.weight": layer.get_delta_weight("default"),
        "model.memory_tokens.weight": tokens.get_delta_weight("default"),
    }
    result = merged(model, tmp_path).state_dict()
    for name, update in sums.items():
        assert torch.equal(result[name], (base[name].float() + update).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("meta", MetaTokens)
def test_merged_model_saves_and_loads_like_a_released_one(meta: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = adapted_model("all", meta, dtype)
    train(model)
    result = merged(model, tmp_path)
    result.save_pretrained(tmp_path / "merged")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)

    assert not any(info.values())
    assert torch.equal(logits(loaded), logits(result))
    assert {parameter.dtype for parameter in result.parameters()} == {dtype}
    assert result.lm_head.weight is result.model.embed_tokens.weight
    names = [path.name for path in (tmp_path / "merged").iterdir()]
    assert sorted(names) == sorted(path.name for path in (tmp_path / "base").iterdir())
    assert (tmp_path / "merged/config.json").read_text() == (tmp_path / "base/config.json").read_text()


def test_a_new_adapter_merges_into_the_base_itself(tmp_path: Path) -> None:
    result = merged(adapted_model("all", "full"), tmp_path).state_dict()
    base = tiny_model().state_dict()
    assert result.keys() == base.keys()
    assert all(torch.equal(tensor, result[name]) for name, tensor in base.items())


def test_adapter_with_nan_is_not_merged(tmp_path: Path) -> None:
    model = adapted_model()
    broken = model.get_base_model().model.layers[2].mamba.x_proj[0]
    broken.lora_B["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"layers\.2\.mamba\.x_proj\.0\.lora_B\.weight contains NaN or infinity"):
        merged(model, tmp_path)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"lora_alpha": math.nan}, r"model\..*"),
        ({"lora_alpha": math.inf}, r"model\..*"),
        ({"lora_alpha": 1e308}, r"model\..*"),
        ({"alpha_pattern": {"layers.2.mamba.out_proj": math.nan}}, r"model\.layers\.2\.mamba\.out_proj\.weight"),
        ({"rank_pattern": {"x_proj.0": 4}, "alpha_pattern": {"x_proj.0": 1e308}}, r"model\..*\.x_proj\.0\.weight"),
    ],
    ids=["nan", "inf", "1e308", "alpha pattern", "rank pattern"],
)
def test_scale_that_makes_nan_is_refused(changes: dict[str, Any], name: str, tmp_path: Path) -> None:
    """Even a new adapter is refused, because such a scale turns its zeros into NaN."""
    merged(adapted_model(), tmp_path)
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    source = ModelSource("adapter", path.parent, adapter=path.parent, base=str(tmp_path / "base"))
    with pytest.raises(CheckpointError, match=rf"{name} of the merged model contains NaN or infinity(.|\n)*lora_alpha"):
        open_model(source, dtype=torch.float32, device=CPU)


def test_values_outside_the_range_of_the_dtype_are_refused(tmp_path: Path) -> None:
    model = adapted_model()
    train(model)
    merged(model, tmp_path)
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 1e9}))
    source = ModelSource("adapter", path.parent, adapter=path.parent, base=str(tmp_path / "base"))
    open_model(source, dtype=torch.float32, device=CPU)
    with pytest.raises(
        CheckpointError, match=r"model\..* has values outside the range of float16\.\n.*at most 6\.55e\+04"
    ):
        open_model(source, dtype=torch.float16, device=CPU)


def test_base_with_nan_is_not_merged(tmp_path: Path) -> None:
    merged(adapted_model(), tmp_path)
    base = tiny_model()
    base.model.layers[1].input_layernorm.weight.data[3] = math.nan
    base.save_pretrained(tmp_path / "base")
    source = ModelSource("mine", tmp_path / "adapter", adapter=tmp_path / "adapter", base=str(tmp_path / "base"))
    with pytest.raises(
        CheckpointError, match=r"model\.layers\.1\.input_layernorm\.weight of the merged model contains NaN"
    ):
        open_model(source, dtype=torch.float32, device=CPU)


def qlora(
    wide_model: Path, folder: Path, scheme: Scheme, targets: str = "all", **settings: Any
) -> tuple[Any, ModelSource]:
    """Return a model with an adapter on quantized weights, and its source as a run would record it."""
    source = ModelSource("wide", wide_model)
    wanted = quantization(load_config(source), scheme, torch.float32)
    model = load_weights(source, dtype=torch.float32, device=CPU, quantization=wanted)
    adapted = add_adapter(model, config_for(model, targets, **settings), [targets])
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "embedding_A" in name or "modules_to_save" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    # Training mode without dropout differs from evaluation only in int8, which then does not round the activations.
    return adapted.train(), ModelSource("mine", folder, folder, str(wide_model), scheme, str(torch.float32))


def wide_logits(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.stack(random_texts([24, 24], SMALL["vocab_size"]))).logits
    return logits


@pytest.mark.parametrize(
    ("scheme", "settings"),
    [
        (Scheme.nf4, {}),
        (Scheme.nf4, {"meta": "full", **METHODS["dora"]}),
        (Scheme.nf4, {"targets": "attention", **METHODS["rslora"]}),
        (Scheme.fp4, {"targets": "ssm", "meta": "full"}),
        (Scheme.int8, {"meta": "frozen", **METHODS["rslora"]}),
        (Scheme.int8, {"targets": "attention", "meta": "full"}),
    ],
)
def test_merged_equals_unmerged_on_quantized_weights_and_on_the_original_ones(
    scheme: Scheme, settings: dict[str, Any], wide_model: Path, tmp_path: Path
) -> None:
    adapted, source = qlora(wide_model, tmp_path, scheme, **settings)
    trained = wide_logits(adapted)
    FLOAT32.check(wide_logits(open_model(source, dtype=torch.float32, device=CPU)), trained)
    original = wide_logits(open_model(source, dtype=torch.float32, device=CPU, onto=Onto.original))
    base = load_weights(ModelSource("wide", wide_model), dtype=torch.float32, device=CPU)
    FLOAT32.check(original, wide_logits(load_adapter(base, tmp_path)))
    assert error(original, trained) > 10 * FLOAT32.relative


@pytest.mark.parametrize("scheme", Scheme)
def test_rounded_weights_are_what_transformers_quantizes_and_dequantizes(scheme: Scheme, wide_model: Path) -> None:
    source, dtype = ModelSource("wide", wide_model), torch.bfloat16
    config = load_config(source)
    wanted = quantization(config, scheme, dtype)
    layers = stored_bytes(config, wanted)
    rounded = RoundedWeights(StoredWeights(wide_model, config), wanted, layers, dtype=dtype, device=CPU)
    loaded = load_weights(source, dtype=dtype, device=CPU, quantization=wanted).dequantize(dtype).state_dict()
    loaded.pop("lm_head.weight")
    assert rounded.keys() == {released_name(name) for name in loaded}
    for name, tensor in loaded.items():
        assert torch.equal(rounded[released_name(name)].to(dtype), tensor), name


def test_weights_that_an_adapter_may_be_merged_into(wide_model: Path, finished_run: Path, tmp_path: Path) -> None:
    _, source = qlora(wide_model, tmp_path / "mine", Scheme.nf4)
    base = quantized_base(source)
    assert base is not None
    assert (base.scheme, base.dtype, base.stored) == (Scheme.nf4, torch.float32, False)
    assert folding_note(source) == "mine: merged into the weights it was trained on, nf4 dequantized"
    alone = resolve_model(str(tmp_path / "mine"))  # without the run, which records the quantization
    for plain in (alone, resolve_model(str(finished_run))):
        assert quantized_base(plain) is folding_note(plain) is None
        check_onto(plain, Onto.original)
        with pytest.raises(ConfigError, match=r"--onto dequantized: .* is not known to be trained on quantized wei"):
            check_onto(plain, Onto.dequantized)
    wide, stored = ModelSource("wide", wide_model), tmp_path / "stored"
    wanted = quantization(load_config(wide), Scheme.int8, torch.float32)
    load_weights(wide, dtype=torch.float32, device=CPU, quantization=wanted).save_pretrained(stored)
    on_stored = replace(source, base=str(stored), quantized="int8")
    check_onto(on_stored, Onto.dequantized)
    with pytest.raises(ConfigError, match=r"--onto original: .*stored is stored in int8, and has no other weights"):
        check_onto(on_stored, Onto.original)
    with pytest.raises(CheckpointError, match=r"The run\.json of mine is invalid: 'nf5' is not"):
        quantized_base(replace(source, quantized="nf5"))
