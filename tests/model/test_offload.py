"""Weights that are in memory only while their module is called: offloaded to disk or CPU, or sharded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, init_empty_weights, load_checkpoint_and_dispatch
from torch import Tensor, nn
from torch.distributed import HashStore, destroy_process_group, init_process_group
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from hymba_tune.model import HymbaForCausalLM, use_kernels
from hymba_tune.model.backends import OPERATIONS
from hymba_tune.model.cache import CACHE_NAME
from hymba_tune.model.pretrained import logger
from tests.tiny import gradients, random_texts, tiny_model
from tests.tolerances import FLOAT32

IDS = torch.stack(random_texts([16, 16]))
PLAIN = {"scan": "torch", "attention": "blocks", "conv": "torch", "elementwise": "torch"}
each_kernels = pytest.mark.parametrize("kernels", [{}, PLAIN], ids=["fastest", "plain"])
Offload = Callable[[HymbaForCausalLM, Path], HymbaForCausalLM]


@pytest.fixture(autouse=True)
def _restore_kernels() -> Iterator[None]:
    yield
    use_kernels(**dict.fromkeys(OPERATIONS, "auto"))


def on_disk(model: HymbaForCausalLM, folder: Path) -> HymbaForCausalLM:
    model.save_pretrained(folder / "saved")
    opened = AutoModelForCausalLM.from_pretrained(
        folder / "saved", device_map={"": "disk"}, offload_folder=folder / "offloaded"
    )
    assert all(parameter.is_meta for parameter in opened.parameters())
    return opened


def layers_on_disk(model: HymbaForCausalLM, folder: Path) -> HymbaForCausalLM:
    model.save_pretrained(folder / "saved")
    places = dict.fromkeys(("model.embed_tokens", "model.memory_tokens", "model.final_layernorm", "lm_head"), "cpu")
    places |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(len(model.model.layers))}
    return AutoModelForCausalLM.from_pretrained(
        folder / "saved", device_map=places, offload_folder=folder / "offloaded"
    )


def in_cpu_memory(model: HymbaForCausalLM, _: Path) -> HymbaForCausalLM:
    return cpu_offload(model, execution_device=torch.device("cpu"))


def computed(model: HymbaForCausalLM) -> dict[str, Tensor]:
    """Return the results of each use of a model without training."""
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    with torch.no_grad():
        output = model(IDS, attention_mask=mask, labels=IDS)
        first = model(IDS[:, :9], use_cache=True)
        later = model(IDS[:, 9:], cache=first[CACHE_NAME])
        scores = model(IDS, labels=IDS, fused_lm_head=True).log_probs
        generated = model.generate(IDS, max_new_tokens=3, do_sample=False)
    return {
        "logits": output.logits,
        "loss": output.loss,
        "later": later.logits,
        "scores": scores,
        "generated": generated.float(),
    }


# transformers 5.17 compares the device of the inputs with that of offloaded weights, "meta".
@pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")
@each_kernels
@pytest.mark.parametrize("config", [{}, {"kq_norm": "perhead-rms", "tie_word_embeddings": False}], ids=["tied", "not"])
@pytest.mark.parametrize("offload", [on_disk, layers_on_disk, in_cpu_memory])
def test_an_offloaded_model_gives_the_same_results(
    offload: Offload, config: dict[str, Any], kernels: dict[str, str], tmp_path: Path
) -> None:
    use_kernels(**kernels)
    expected = computed(tiny_model(**config))
    FLOAT32.check_all(computed(offload(tiny_model(**config), tmp_path)), expected)


@pytest.fixture
def _one_process() -> Iterator[None]:
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    destroy_process_group()


@pytest.mark.usefixtures("_one_process")
@each_kernels
def test_a_model_with_separately_sharded_modules_trains(kernels: dict[str, str]) -> None:
    """A parameter is gathered only while its own module is called, so another module would read a shard."""
    use_kernels(**kernels)
    expected = tiny_model(tie_word_embeddings=False)
    loss = expected(IDS, labels=IDS).loss
    loss.backward()
    model = tiny_model(tie_word_embeddings=False)
    owners = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    for module in owners:
        fully_shard(module)
    sharded = model(IDS, labels=IDS).loss
    sharded.backward()
    FLOAT32.check(sharded, loss)
    gathered = {name: x.full_tensor() if x is not None else None for name, x in gradients(model).items()}
    FLOAT32.check_all(gathered, gradients(expected))


def test_every_module_with_parameters_is_called() -> None:
    model = tiny_model(kq_norm="rms")
    called = set[nn.Module]()
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, _: called.add(module))
    model(IDS)
    owners = {
        name: module
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    }
    unused = {name for name, module in owners.items() if module not in called}
    assert unused == {"model.layers.2.mamba.self_attn.k_norm"}  # the layer reuses the keys of another one


def test_loading_by_accelerate_alone_says_what_to_use(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(tiny_model().config)
    with pytest.raises(ValueError, match=r"meta tokens were not loaded: .* from_pretrained\(folder, device_map=...\)"):
        load_checkpoint_and_dispatch(model, str(tmp_path / "model.safetensors"), device_map={"": "cpu"})


def test_an_empty_model_warns_of_what_cannot_be_dispatched(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over several devices Accelerate's own error does not say what is missing."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    logger.warning_once.cache_clear()
    model = tiny_model()
    model.save_pretrained(tmp_path)
    places: dict[str, Any] = dict.fromkeys(
        ("model.embed_tokens", "model.memory_tokens", "model.final_layernorm"), "cpu"
    )
    places |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(len(model.model.layers))} | {
        "lm_head": "cpu"
    }
    AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "offloaded")
    assert "meta tokens" not in caplog.text

    with init_empty_weights():
        empty = AutoModelForCausalLM.from_config(model.config)
    assert "store the meta tokens under another name" in caplog.text
    assert "from_pretrained(folder, device_map=...)" in caplog.text
    with pytest.raises(ValueError, match="weight is on the meta device"):
        load_checkpoint_and_dispatch(empty, str(tmp_path), device_map=places, offload_folder=str(tmp_path / "more"))


def test_moving_an_empty_model_is_the_error_of_torch() -> None:
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(tiny_model().config)
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        model.to("cpu")


def test_layers_on_several_devices_are_refused() -> None:
    """Accelerate moves the tensors of a layer to its device, but not the layout of the texts."""

    def move(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(x.to("meta") if isinstance(x, Tensor) else x for x in inputs)

    model = tiny_model()
    model.model.layers[1].register_forward_pre_hook(move)
    with pytest.raises(ValueError, match=r"a layer is on meta and the texts are on cpu: Hymba computes on one device"):
        model(input_ids=torch.tensor([[5, 6, 7]]))
