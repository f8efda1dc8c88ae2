"""Methods of PEFT that cannot compute Hymba's packed rows are refused in a sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, ShadowConfig, get_peft_model

from tests.tiny import CONFIG, random_texts, tiny_model

IDS = torch.stack(random_texts([9, 9]))
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["in_proj"], alora_invocation_tokens=[5], task_type="CAUSAL_LM"),
        ShadowConfig(task_type="CAUSAL_LM", target_modules=None),
    ],
    ids=["activated_lora", "shadow"],
)
def test_methods_that_need_rows_of_equal_length_are_refused(config: Any) -> None:
    model = get_peft_model(tiny_model(), config)
    ids = IDS.clone()
    ids[:, 4] = 5
    with pytest.raises(ValueError, match=r"packed as \(rows, width\): .* PEFT's error: "):
        model(input_ids=ids, attention_mask=torch.ones_like(ids))


@pytest.mark.parametrize("targets", [["in_proj"], ["memory_tokens"]])
def test_batches_with_several_adapters_are_refused(targets: list[str]) -> None:
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=targets), "one").eval()
    model.add_adapter("other", LoraConfig(target_modules=targets))
    with pytest.raises(ValueError, match=r"do not work: activated LoRA, .* adapter_names, which gives each row"):
        model(input_ids=IDS, adapter_names=["one", "other"])


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_prefix_tuning_is_refused(call: str) -> None:
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, num_layers=4, token_dim=CONFIG["hidden_size"]
    )
    model = get_peft_model(tiny_model(), config)
    with pytest.raises(ValueError, match="PEFT's prefix tuning and cartridges do not work with Hymba: train the meta"):
        model(IDS) if call == "forward" else model.generate(input_ids=IDS, max_new_tokens=2)


def test_errors_of_the_model_itself_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: torch.Tensor) -> None:
        raise ValueError("broken")

    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["in_proj"]))
    monkeypatch.setattr(model.base_model.model.model.layers[0].mamba.in_proj.base_layer, "forward", fail)
    with pytest.raises(ValueError, match=r"^broken$"):
        model(IDS)
