"""Adapters with every initialization of PEFT are merged as PEFT loads them, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from hymba_tune.adapters import base_of, open_model, quantized_base
from hymba_tune.errors import CheckpointError
from hymba_tune.registry import ModelSource
from hymba_tune.schemes import quantization
from tests.adapters.small import logits
from tests.tiny import tiny_model
from tests.tolerances import FLOAT32

TARGETS = ["in_proj", "out_proj", "x_proj.0", "dt_proj.0", "gate_proj", "up_proj", "down_proj", "memory_tokens"]
MERGED: list[Any] = [True, False, "gaussian", "eva", "orthogonal", "mica", "pissa", "olora"]
REFUSED = {
    "pissa_niter_[number of iters]": "randomized decomposition",
    "corda": "decomposition of the activations",
    "lora_ga": "gradients on its training data",
    "loftq": "quantizing them, which PEFT can repeat only on a GPU",
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`init_lora_weights` is 'eva'"),
    pytest.mark.filterwarnings("ignore:lora with eva initialization"),
]


def new_adapter(init: Any, dtype: torch.dtype = torch.float32, **changes: Any) -> PeftModel:
    settings = {"target_modules": TARGETS, "r": 2, "lora_alpha": 4, "rank_pattern": {"in_proj": 4}}
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=init, **(settings | changes))
    return get_peft_model(tiny_model(dtype), config)


def perturb(model: PeftModel) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)


def source_of(folder: Path, dtype: torch.dtype = torch.float32) -> ModelSource:
    tiny_model(dtype).save_pretrained(folder / "base")
    return ModelSource("mine", folder / "adapter", adapter=folder / "adapter", base=str(folder / "base"))


def merged_logits(source: ModelSource) -> Tensor:
    return logits(open_model(source, dtype=torch.float32, device=torch.device("cpu")))


def rewrite(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_every_initialization_that_peft_knows_is_tested() -> None:
    hint = get_type_hints(LoraConfig)["init_lora_weights"]
    named = {name for part in get_args(hint) if get_origin(part) is Literal for name in get_args(part)}
    assert named - {"lora_ga"} == {*MERGED, *REFUSED} - {True, False, "lora_ga"}


@pytest.mark.parametrize(
    ("init", "changes"),
    [(init, {}) for init in MERGED]
    + [(init, changes) for init in ("pissa", "olora") for changes in ({"use_dora": True}, {"dtype": torch.bfloat16})],
)
def test_merged_equals_the_model_that_peft_loads(init: Any, changes: dict[str, Any], tmp_path: Path) -> None:
    model = new_adapter(init, **changes)
    perturb(model)
    model.save_pretrained(tmp_path / "adapter")
    dtype = changes.get("dtype", torch.float32)
    loaded = PeftModel.from_pretrained(tiny_model(dtype), tmp_path / "adapter")
    FLOAT32.check(merged_logits(source_of(tmp_path, dtype)), logits(loaded.float()))


@pytest.mark.filterwarnings("ignore:.*changes the base weights of the model and should thus not be used with other")
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_converted_adapter_is_merged_as_it_was_trained(init: str, tmp_path: Path) -> None:
    """PEFT converts it to a plain adapter of twice the rank."""
    model = new_adapter(init, target_modules=TARGETS[:-1])  # for embeddings, PEFT loses the factors
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = init
    perturb(model)
    trained = logits(model)
    model.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    FLOAT32.check(merged_logits(source_of(tmp_path)), trained)


@pytest.mark.parametrize("init", [*REFUSED, "pissa_niter_16", "PiSSA_niter_x"])
def test_initialization_that_cannot_be_repeated_is_refused(init: str, tmp_path: Path) -> None:
    new_adapter(True).save_pretrained(tmp_path / "adapter")
    rewrite(tmp_path / "adapter", init_lora_weights=init, loftq_config={"loftq_bits": 4} if init == "loftq" else {})
    reason = REFUSED.get(init, REFUSED["pissa_niter_[number of iters]"])
    with pytest.raises(
        CheckpointError, match=rf"(?is)adapter: its init_lora_weights, .*{reason}.*path_initial_model_for_weight_conve"
    ):
        base_of(source_of(tmp_path))


def test_unknown_initialization_is_refused(tmp_path: Path) -> None:
    new_adapter(True).save_pretrained(tmp_path / "adapter")
    rewrite(tmp_path / "adapter", init_lora_weights="new")
    with pytest.raises(CheckpointError, match=r"init_lora_weights 'new' in adapter_config\.json is unknown"):
        merged_logits(source_of(tmp_path))


def test_initialization_that_changes_quantized_weights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_adapter("pissa").save_pretrained(tmp_path / "adapter")
    source = source_of(tmp_path)
    stored = quantization(tiny_model().config, "int8", torch.float32)  # type: ignore[arg-type]
    monkeypatch.setattr("hymba_tune.schemes.stored_quantization", lambda _: stored)
    with pytest.raises(CheckpointError, match=r"init_lora_weights, pissa, changes the weights.*are quantized"):
        quantized_base(source)
