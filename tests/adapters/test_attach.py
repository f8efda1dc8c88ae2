import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, PromptTuningConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from hymba_tune.adapters import PRESETS, add_adapter, load_adapter, restrict_rows
from hymba_tune.config import MetaTokens, Method
from hymba_tune.errors import CheckpointError, ConfigError
from tests.adapters.small import METHODS, adapted_model, config_for, logits, merged, token_ids, train
from tests.tiny import tiny_model

DTYPES = [torch.float32, torch.bfloat16]
# PEFT reads an attribute that transformers has deprecated.
plain_peft = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def trained(model: PeftModel) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save(model: PeftModel, folder: Path) -> Path:
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("meta", MetaTokens)
@pytest.mark.parametrize("method", METHODS)
def test_new_adapter_does_not_change_the_logits(method: str, meta: str, dtype: torch.dtype) -> None:
    assert torch.equal(logits(adapted_model("all", meta, dtype, **METHODS[method])), logits(tiny_model(dtype)))


@pytest.mark.parametrize("meta", MetaTokens)
@pytest.mark.parametrize(
    ("method", "targets"),
    [
        (method, preset)
        for method in METHODS
        for preset in PRESETS
        if (method, preset) not in [("dora", "attention"), ("dora", "ssm")]
    ],
)
def test_every_adapted_module_gets_a_gradient_and_changes(method: str, targets: str, meta: str) -> None:
    model = adapted_model(targets, meta, **METHODS[method])
    before = {name: parameter.detach().clone() for name, parameter in trained(model).items()}
    train(model, steps=2)  # a factor whose partner starts at zero changes in the second step
    unchanged = [name for name, parameter in trained(model).items() if torch.equal(parameter, before[name])]
    assert before
    assert not unchanged


def test_base_weights_do_not_change() -> None:
    model = adapted_model()
    before = tiny_model().state_dict()
    train(model)
    after = {name.replace("base_layer.", ""): tensor for name, tensor in model.get_base_model().state_dict().items()}
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def changed_rows(model: PeftModel, folder: Path, dtype: torch.dtype = torch.float32) -> list[list[bool]]:
    """Return for each layer which rows of `in_proj` differ from those of the base model in any bit."""
    before, after = tiny_model(dtype).model.layers, merged(model, folder).model.layers
    pairs = [[layers[i].mamba.in_proj.weight for layers in (before, after)] for i in range(len(before))]
    return [(old != new).any(1).tolist() for old, new in pairs]


def adapted_rows(targets: str) -> list[list[bool]]:
    sides = {"attention": (True, True, True, False, False), "ssm": (False, False, False, True, True)}[targets]
    layers = tiny_model().model.layers
    return [
        [side for side, width in zip(sides, layer.mamba.widths, strict=True) for _ in range(width)] for layer in layers
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("targets", ["attention", "ssm"])
def test_rows_of_the_other_side_do_not_change(targets: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = adapted_model(targets, dtype=dtype)
    train(model)
    again = load_adapter(tiny_model(dtype), save(model, tmp_path), trainable=True)
    restrict_rows(again, [targets])
    train(again)
    assert changed_rows(model, tmp_path, dtype) == adapted_rows(targets)
    assert changed_rows(again, tmp_path, dtype) == adapted_rows(targets)


@plain_peft
def test_rows_of_the_other_side_do_not_change_after_a_trainer_loads_a_checkpoint(tmp_path: Path) -> None:
    model = adapted_model("ssm")
    train(model)
    save(model, tmp_path)
    resumed = adapted_model("ssm")
    resumed.load_adapter(tmp_path, "default", is_trainable=True)
    train(resumed)
    assert changed_rows(resumed, tmp_path) == adapted_rows("ssm")


def test_dora_refuses_presets_of_some_rows() -> None:
    model = tiny_model()
    with pytest.raises(ConfigError, match=r"attention adapts only some rows(.|\n)*attention-ssm"):
        add_adapter(model, config_for(model, "attention", method=Method.dora), ["attention"])


@pytest.mark.parametrize("meta", MetaTokens)
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_trained_parameters_are_float32(method: str, meta: str, tmp_path: Path) -> None:
    model = adapted_model("all", meta, torch.bfloat16, **METHODS[method])
    loaded = load_adapter(tiny_model(torch.bfloat16), save(model, tmp_path), trainable=True)
    for adapted in (model, loaded):
        assert {parameter.dtype for parameter in trained(adapted).values()} == {torch.float32}
    assert trained(model).keys() == trained(loaded).keys()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("meta", MetaTokens)
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_loaded_adapter_equals_the_saved_one(method: str, meta: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = adapted_model("all", meta, dtype, **METHODS[method])
    train(model)
    loaded = load_adapter(tiny_model(dtype), save(model, tmp_path))
    assert not torch.equal(logits(model), logits(tiny_model(dtype)))
    assert torch.equal(logits(loaded), logits(model))
    assert not trained(loaded)
    assert not loaded.training


@plain_peft
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("meta", MetaTokens)
def test_plain_peft_loads_saved_adapters(meta: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tiny_model(dtype).save_pretrained(tmp_path / "base")
    base = type(tiny_model()).from_pretrained(tmp_path / "base", dtype=dtype)
    model = add_adapter(base, config_for(base, meta=meta), ["all"])
    train(model)
    folder = save(model, tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(dtype), folder)), logits(model))
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(folder, dtype=dtype)), logits(model))


@pytest.mark.parametrize("meta", MetaTokens)
def test_activation_checkpointing_gives_the_same_gradients(meta: str) -> None:
    model = adapted_model("all", meta)
    train(model, steps=1)  # so that no factor is zero
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.train()
        model.zero_grad()
        model(input_ids=token_ids(), labels=token_ids()).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in trained(model).items()})
    plain, checkpointed = gradients
    assert all(torch.equal(gradient, checkpointed[name]) for name, gradient in plain.items())


def without_config(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def with_broken_config(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{")


def with_empty_config(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def with_unknown_type(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "SOMETHING"}))


def with_another_type(folder: Path) -> None:
    PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2).save_pretrained(folder)


def with_other_targets(folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": ["q_proj", "v_proj"]}))


def without_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def with_truncated_weights(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def with_a_missing_tensor(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors["base_model.model.model.memory_tokens.lora_embedding_A"]
    save_file(tensors, path)


def with_an_unexpected_tensor(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path) | {"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 40)}, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_config, r"adapter_config\.json does not exist"),
        (with_broken_config, r"adapter_config\.json cannot be read"),
        (with_empty_config, r"adapter_config\.json is not a LoRA adapter: its peft_type is None"),
        (with_unknown_type, r"adapter_config\.json is not a LoRA adapter: its peft_type is SOMETHING"),
        (with_another_type, r"peft_type is PROMPT_TUNING(.|\n)*LORA"),
        (with_other_targets, r"does not fit this model(.|\n)*q_proj"),
        (without_weights, r"adapter_model\.safetensors does not exist(.|\n)*only as safetensors"),
        (with_truncated_weights, r"adapter_model\.safetensors is truncated: "),
        (with_a_missing_tensor, r"memory_tokens\.lora_embedding_A is missing"),
        (with_an_unexpected_tensor, r"lm_head\.lora_A\.weight is unexpected"),
    ],
)
def test_unusable_adapter_is_refused(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    damage(save(adapted_model(), tmp_path))
    with pytest.raises(CheckpointError, match=message):
        load_adapter(tiny_model(), tmp_path)


def test_adapter_of_another_base_names_the_tensor_and_both_shapes(tmp_path: Path) -> None:
    save(adapted_model(), tmp_path)
    wider = tiny_model(intermediate_size=56)
    with pytest.raises(CheckpointError, match=r"down_proj\.lora_A\.weight has shape \(4, 32\), expected \(4, 56\)"):
        load_adapter(wider, tmp_path)


def test_adapter_of_a_deeper_base_is_refused(tmp_path: Path) -> None:
    save(adapted_model(), tmp_path)
    shallower = tiny_model(num_hidden_layers=3, global_attn_idx=[0])
    with pytest.raises(CheckpointError, match=r"layers\.3\.mamba\.dt_proj\.0\.lora_A\.weight is unexpected"):
        load_adapter(shallower, tmp_path)


def test_adapter_of_a_base_with_meta_tokens_is_refused_by_one_without(tmp_path: Path) -> None:
    save(adapted_model(), tmp_path)
    with pytest.raises(CheckpointError, match=r"memory_tokens\.lora_embedding_A is unexpected"):
        load_adapter(tiny_model(num_memory_tokens=0), tmp_path)
