"""Adapters on tiny models, and a few steps of training."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from hymba_tune.adapters import add_adapter, lora_config, open_model
from hymba_tune.config import MetaTokens, Method
from hymba_tune.model import HymbaForCausalLM
from hymba_tune.registry import ModelSource
from tests.tiny import random_texts, tiny_model

METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"method": Method.dora},
}


def config_for(model: HymbaForCausalLM, targets: str = "all", meta: str = "lora", **changes: Any) -> Any:
    settings = {"method": Method.lora, "rank": 4, "alpha": None, "dropout": 0.0, "rslora": False}
    return lora_config(model, targets=[targets], meta_tokens=MetaTokens(meta), **(settings | changes))


def adapted_model(
    targets: str = "all", meta: str = "lora", dtype: torch.dtype = torch.float32, **changes: Any
) -> PeftModel:
    model = tiny_model(dtype)
    return add_adapter(model, config_for(model, targets, meta, **changes), [targets])


def merged(model: PeftModel, folder: Path, **changes: Any) -> PreTrainedModel:
    """Save an adapter of `adapted_model`, and merge it into its base model as for a run."""
    base, adapter = folder / "base", folder / "adapter"
    dtype = model.get_base_model().dtype
    tiny_model(dtype, **changes).save_pretrained(base)
    model.save_pretrained(adapter)
    source = ModelSource("adapter", adapter, adapter=adapter, base=str(base))
    return open_model(source, dtype=dtype, device=torch.device("cpu"))


def token_ids() -> Tensor:
    return torch.stack(random_texts([17, 17]))


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(input_ids=token_ids()).logits
    return result


def train(model: torch.nn.Module, steps: int = 3) -> None:
    """Train with AdamW and weight decay, at a learning rate that changes the logits visibly."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=3e-3, weight_decay=0.1)
    model.train()
    for _ in range(steps):
        model(input_ids=token_ids(), labels=token_ids()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
