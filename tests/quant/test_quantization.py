from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hymba_tune.checkpoint import load_weights
from hymba_tune.config import Scheme
from hymba_tune.quant import quantize_model
from hymba_tune.registry import ModelSource
from hymba_tune.schemes import quantization

CPU = torch.device("cpu")


@pytest.mark.parametrize("scheme", Scheme)
def test_quantized_in_memory_is_what_is_loaded_quantized(scheme: Scheme, wide_model: Path) -> None:
    source = ModelSource("model", wide_model)
    model = load_weights(source, dtype=torch.bfloat16, device=CPU)
    before = {name: held.clone() for name, held in model.state_dict().items()}
    config = quantization(model.config, scheme, torch.bfloat16)
    quantized = quantize_model(model, config)
    loaded = load_weights(source, dtype=torch.bfloat16, device=CPU, quantization=config)
    for ours, theirs in ((quantized, loaded.state_dict()), (model, before)):
        held = ours.state_dict()
        assert held.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in held.items())
    ids = torch.arange(3, 40)[None]
    assert torch.equal(quantized.eval()(ids).logits, loaded.eval()(ids).logits)
    assert quantized.generation_config == model.generation_config
    assert quantized.model.embed_tokens.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
