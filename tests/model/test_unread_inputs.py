"""Inputs that Hymba does not read cause a warning or an error, unless they have no effect."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from hymba_tune.model import HymbaForCausalLM
from tests.tiny import random_texts, tiny_model

IDS = torch.stack(random_texts([9, 9]))
PACKED = {
    "position_ids": torch.arange(9).repeat(2)[None],
    "cu_seq_lens_q": torch.tensor([0, 9, 18], dtype=torch.int32),
    "cu_seq_lens_k": torch.tensor([0, 9, 18], dtype=torch.int32),
    "max_length_q": 9,
    "max_length_k": 9,
    "seq_idx": torch.tensor([0] * 9 + [1] * 9)[None],
}


PEFT_WARNS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Return a function that returns the warnings."""
    transformers_logging.warning_once.cache_clear()  # another test may have caused the same warning
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="transformers")
    return lambda: caplog.messages


@pytest.mark.parametrize("backbone", [False, True], ids=["whole", "backbone"])
@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        ("attention_masks", torch.ones(2, 9), "; did you mean 'attention_mask'?"),
        ("use_cach", False, "; did you mean 'use_cache'?"),
        ("temperature", 0.5, ""),
        ("output_router_logits", True, ""),
    ],
)
def test_an_unread_input_causes_one_warning(
    name: str, value: Any, hint: str, backbone: bool, warned: Callable[[], list[str]]
) -> None:
    model = tiny_model().model if backbone else tiny_model()
    for _ in range(2):
        model(IDS, **{name: value})
    (message,) = warned()
    assert message.startswith(f"Hymba does not read the input {name!r}")
    assert hint in message


@pytest.mark.parametrize("backbone", [False, True], ids=["whole", "backbone"])
def test_inputs_of_the_libraries_cause_no_warning(backbone: bool, warned: Callable[[], list[str]]) -> None:
    model = tiny_model().model if backbone else tiny_model()
    ids = IDS.view(1, -1)
    model(ids, **PACKED, labels=ids, num_items_in_batch=torch.tensor(16), use_cache=False)
    switches = {"output_attentions": False, "output_hidden_states": True, "output_router_logits": False}
    model(IDS, **switches, return_dict=True, is_causal=True, logits_to_keep=1, pixel_values=None)
    model(IDS, token_type_ids=torch.zeros_like(IDS), cache_position=torch.arange(9), output_attentions=None)
    assert not warned()


@pytest.mark.parametrize("request_it", ["loading", "setting"])
@pytest.mark.parametrize("name", ["eager", "flash_attention_2"])
def test_an_attention_implementation_causes_one_warning(
    name: str, request_it: str, tmp_path: Path, warned: Callable[[], list[str]]
) -> None:
    tiny_model().save_pretrained(tmp_path)
    for _ in range(2):
        if request_it == "loading":
            model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
        else:
            model = AutoModelForCausalLM.from_pretrained(tmp_path)
            model.set_attn_implementation(name)
        assert model.config._attn_implementation == "sdpa"
        assert torch.equal(model(IDS).logits, tiny_model()(IDS).logits)
    (message,) = warned()
    assert message.startswith(f"attn_implementation={name!r} has no effect")


def test_an_attention_implementation_that_a_file_names_causes_no_warning(
    tmp_path: Path, warned: Callable[[], list[str]]
) -> None:
    tiny_model().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text()) | {"attn_implementation": "flex"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not warned()


@PEFT_WARNS
def test_generate_and_peft_cause_no_warning(warned: Callable[[], list[str]]) -> None:
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["in_proj"]))
    model(IDS, labels=IDS)
    model.generate(input_ids=IDS, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert not [message for message in warned() if "Hymba" in message]


def by_configuration(model: HymbaForCausalLM) -> Any:
    model.config._output_attentions = True
    return model(IDS)


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model(IDS, output_attentions=True),
        lambda model: model.model(IDS, output_attentions=True),
        lambda model: model.generate(IDS, max_new_tokens=2, output_attentions=True, return_dict_in_generate=True),
        by_configuration,
    ],
    ids=["whole", "backbone", "generate", "configuration"],
)
def test_attention_weights_are_refused(call: Callable[[HymbaForCausalLM], Any]) -> None:
    with pytest.raises(ValueError, match="output_attentions=True: Hymba's kernels never hold attention weights"):
        call(tiny_model())


def test_attention_in_both_directions_is_refused() -> None:
    with pytest.raises(ValueError, match="is_causal=False: Hymba reads texts from left to right only"):
        tiny_model()(IDS, is_causal=False)


def test_the_configuration_can_request_hidden_states_and_tuples() -> None:
    model = tiny_model()
    assert model(IDS).hidden_states is None
    model.config.output_hidden_states = True
    assert len(model(IDS).hidden_states) == len(model.model(IDS).hidden_states) == 5
    assert model(IDS, output_hidden_states=False).hidden_states is None
    model.config.return_dict = False
    assert isinstance(model(IDS), tuple)
    assert isinstance(model.model(IDS), tuple)
    assert model(IDS, return_dict=True).logits.shape == (2, 9, 61)
