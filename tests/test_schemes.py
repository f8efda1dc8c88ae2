from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import Tensor, nn

from hymba_tune.adapters import add_adapter, open_model
from hymba_tune.checkpoint import check_weights, load_config, load_weights
from hymba_tune.config import Scheme
from hymba_tune.errors import CheckpointError, ConfigError
from hymba_tune.registry import ModelSource
from hymba_tune.schemes import UNQUANTIZED, quantization, scheme_of, stored_bytes, stored_quantization
from tests.adapters.small import config_for
from tests.runs import SMALL, rewrite, tensors
from tests.tiny import random_texts, tiny_model

CPU = torch.device("cpu")
LAYERS = {"in_proj", "out_proj", "gate_proj", "up_proj", "down_proj"}


def opened(folder: Path, scheme: Scheme, dtype: torch.dtype = torch.float32, skip: tuple[str, ...] = ()) -> Any:
    source = ModelSource("model", folder)
    config = quantization(load_config(source), scheme, dtype, skip)
    return load_weights(source, dtype=dtype, device=CPU, quantization=config)


def kinds_quantized(model: nn.Module) -> set[str]:
    names = [name for name, module in model.named_modules() if isinstance(module, Linear4bit | Linear8bitLt)]
    return {name.rsplit(".", 1)[1] for name in names}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, wide_model: Path) -> dict[Scheme, Path]:
    """Folders of the model, quantized and saved by transformers."""
    folder = tmp_path_factory.mktemp("quantized")
    for scheme in Scheme:
        opened(wide_model, scheme).save_pretrained(folder / scheme)
    return {scheme: folder / scheme for scheme in Scheme}


@pytest.mark.parametrize("scheme", Scheme)
def test_only_modules_outside_of_the_list_are_quantized(scheme: Scheme, wide_model: Path) -> None:
    model = opened(wide_model, scheme, torch.bfloat16)
    assert kinds_quantized(model) == LAYERS
    for name, parameter in model.named_parameters():
        unquantized = any(name.rsplit(".", 1)[0].endswith(end) or name.endswith(end) for end in UNQUANTIZED)
        assert (parameter.dtype is torch.bfloat16) == (unquantized or name.endswith(".bias")), name
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_skip_adds_to_the_modules_that_are_never_quantized(wide_model: Path) -> None:
    config = load_config(ModelSource("model", wide_model))
    stated = quantization(config, Scheme.nf4, torch.float32, ["down_proj", "layers.1.mamba.in_proj"])
    assert {"lm_head", "model.embed_tokens", *UNQUANTIZED, "down_proj"} <= set(stated.llm_int8_skip_modules)
    model = opened(wide_model, Scheme.nf4, skip=("down_proj", "layers.1.mamba.in_proj"))
    assert kinds_quantized(model) == LAYERS - {"down_proj"}
    assert type(model.model.layers[1].mamba.in_proj) is nn.Linear
    with pytest.raises(ConfigError, match=r"--skip dwn_proj: the model has no linear(.|\n)*down_proj, gate_proj, in"):
        quantization(config, Scheme.nf4, torch.float32, ["dwn_proj"])


def test_layers_of_other_shapes_are_not_quantized_to_4_bits() -> None:
    config = tiny_model(**SMALL).config  # only out_proj has a multiple of 64 columns
    names = stored_bytes(config, quantization(config, Scheme.fp4, torch.float32))
    assert {name.rsplit(".", 1)[1] for name in names} == {"out_proj"}
    with pytest.raises(ConfigError, match=r"nf4: no layer of this model can be quantized(.|\n)*multiple of 64"):
        quantization(tiny_model().config, Scheme.nf4, torch.float32)


@pytest.mark.parametrize("scheme", Scheme)
def test_saved_checkpoints_have_the_expected_tensors_and_sizes(scheme: Scheme, stored: dict[Scheme, Path]) -> None:
    folder = stored[scheme]
    config = load_config(ModelSource("model", folder))
    stated = stored_quantization(config)
    assert stated is not None
    assert scheme_of(stated) is scheme
    check_weights(folder, config)
    held = tensors(folder)
    for name, size in stored_bytes(config, stated).items():
        parts = [held[part] for part in held if part.startswith(f"{name}.") and "quant_state" not in part]
        assert sum(part.nbytes for part in parts) == size


@pytest.mark.parametrize("scheme", [Scheme.nf4, Scheme.int8])
def test_broken_checkpoints_are_refused(scheme: Scheme, stored: dict[Scheme, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(stored[scheme], folder)
    name = "model.layers.0.mamba.in_proj"
    scale = f"{name}.SCB" if scheme is Scheme.int8 else f"{name}.weight.absmax"
    held = tensors(folder)
    rewrite(folder, {}, removed=[scale])
    with pytest.raises(CheckpointError, match=f"tensor {scale} is missing"):
        check_weights(folder, load_config(ModelSource("model", folder)))
    rewrite(folder, held | {f"{name}.weight": held[f"{name}.weight"][:-1]})
    with pytest.raises(CheckpointError, match=f"tensor {name}.weight has shape"):
        check_weights(folder, load_config(ModelSource("model", folder)))


def test_other_quantizers_are_refused(wide_model: Path, tmp_path: Path) -> None:
    settings = json.loads((wide_model / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"The model is quantized by gptq(.|\n)*bitsandbytes"):
        load_config(ModelSource("model", tmp_path))


def gradients(model: nn.Module, texts: Tensor) -> dict[str, Tensor]:
    model.train()
    model.zero_grad()
    model(input_ids=texts, labels=texts, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def adapted(model: Any) -> Any:
    torch.manual_seed(0)
    adapter = add_adapter(model, config_for(model), ["all"])
    for name, parameter in adapter.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return adapter


@pytest.mark.parametrize("scheme", Scheme)
def test_evaluation_does_not_change_later_gradients(scheme: Scheme, wide_model: Path) -> None:
    model = adapted(opened(wide_model, scheme, torch.bfloat16))
    texts = torch.stack(random_texts([24, 24], SMALL["vocab_size"]))
    before = gradients(model, texts)
    with torch.no_grad():
        model.eval()(input_ids=texts)
        model.eval()(input_ids=texts[:1, :1])
    after = gradients(model, texts)
    assert before.keys() == after.keys()
    for name, gradient in before.items():
        assert torch.equal(gradient, after[name]), name
        assert gradient.isfinite().all()


def test_gradients_are_those_of_the_dequantized_weights(wide_model: Path) -> None:
    texts = torch.stack(random_texts([24, 24], SMALL["vocab_size"]))
    for scheme in Scheme:
        quantized = adapted(opened(wide_model, scheme))
        plain = adapted(opened(wide_model, scheme).dequantize(torch.float32))
        expected = gradients(plain, texts)
        for name, gradient in gradients(quantized, texts).items():
            assert torch.allclose(gradient, expected[name], rtol=1e-3, atol=1e-5), (scheme, name)


@pytest.mark.parametrize("scheme", Scheme)
def test_adapter_on_a_quantized_checkpoint_is_merged_into_its_dequantized_weights(
    scheme: Scheme, stored: dict[Scheme, Path], tmp_path: Path
) -> None:
    """The merged weights are not quantized again, which would round most of the adapter away."""
    base = load_weights(ModelSource("model", stored[scheme]), dtype=torch.float32, device=CPU)
    adapted = add_adapter(base, config_for(base), ["all"]).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    adapted.save_pretrained(tmp_path)
    source = ModelSource("adapter", tmp_path, adapter=tmp_path, base=str(stored[scheme]))
    merged = open_model(source, dtype=torch.float32, device=CPU)
    assert stored_quantization(merged.config) is None
    assert not kinds_quantized(merged)
    ids = torch.arange(3, 40)[None]
    adapted.train()  # in evaluation mode, int8 rounds activations; there is no dropout
    expected = adapted(input_ids=ids).logits
    assert (merged(input_ids=ids).logits - expected).norm() <= 1e-3 * expected.norm()
