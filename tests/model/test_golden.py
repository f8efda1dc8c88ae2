"""Results of NVIDIA's own code for small random models: all numbers of all files in `tests/golden`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from hymba_tune.model import HymbaConfig, HymbaForCausalLM
from tests.conftest import ROOT
from tests.reference.naive_hymba import naive_hymba
from tests.tiny import gradients
from tests.tolerances import GOLDEN, GOLDEN_GRADIENT

FILES = sorted((ROOT / "tests/golden").glob("*.safetensors"))


class Golden:
    """One file and the model that it describes."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            self.tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
        config = metadata["config"] if "config" in metadata else path.with_suffix(".json").read_text()
        self.config = HymbaConfig(**json.loads(config))
        self.ids, self.labels = self.tensors["input_ids"], self.tensors["labels"]
        self.weights, self.gradients = self.named("weight."), self.named("grad.")
        self.model = HymbaForCausalLM(self.config).eval()
        missing, unexpected = self.model.load_state_dict(self.weights, strict=False)
        assert set(missing) <= {"lm_head.weight"}
        assert not unexpected

    def named(self, prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): x for name, x in self.tensors.items() if name.startswith(prefix)}

    def hidden_states(self, rows: slice) -> list[Tensor]:
        """Return ``(M + T, d)`` before each layer and after the final norm, by hooks: the model returns texts only."""
        states: list[Tensor] = []
        layers = self.model.model.layers
        norm = self.model.model.final_layernorm
        hooks = [layer.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0])) for layer in layers]
        hooks.append(layers[-1].register_forward_hook(lambda _, __, outputs: states.append(norm(outputs[0]))))
        self.model(self.ids[rows])
        for hook in hooks:
            hook.remove()
        return states


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


@pytest.fixture(params=["batch", "each_row_alone"])
def batches(request: pytest.FixtureRequest, golden: Golden) -> list[slice]:
    """Return the rows of each batch."""
    rows = golden.ids.shape[0]
    return [slice(0, rows)] if request.param == "batch" else [slice(row, row + 1) for row in range(rows)]


def test_logits(golden: Golden, batches: list[slice]) -> None:
    for rows in batches:
        GOLDEN.check(golden.model(golden.ids[rows]).logits, golden.tensors["logits"][rows])


def test_loss_and_gradients(golden: Golden, batches: list[slice]) -> None:
    count = (golden.labels[:, 1:] != -100).sum()
    total = torch.zeros(())
    for rows in batches:
        loss = golden.model(golden.ids[rows], labels=golden.labels[rows], num_items_in_batch=count).loss
        loss.backward()
        total += loss.detach()
    GOLDEN.check(total, golden.tensors["loss"].squeeze())

    layers = range(golden.config.num_hidden_layers)
    consumers = [layer for layer in layers if golden.config.kv_source(layer) != layer]
    unused = {f"model.layers.{layer}.mamba.self_attn.k_norm.weight" for layer in consumers}
    actual, expected = gradients(golden.model), golden.gradients
    GOLDEN_GRADIENT.check_all(*({name: x[name] for name in x.keys() - unused} for x in (actual, expected)))


def test_mean_loss_of_the_batch(golden: Golden) -> None:
    GOLDEN.check(golden.model(golden.ids, labels=golden.labels).loss, golden.tensors["loss"].squeeze())


def test_hidden_states_with_the_meta_tokens(golden: Golden, batches: list[slice]) -> None:
    meta = golden.config.num_memory_tokens
    expected = golden.named("hidden_states.")
    for rows in batches:
        states = golden.hidden_states(rows)
        assert len(states) == len(expected)
        for i, hidden in enumerate(states):
            for row, text in zip(expected[str(i)][rows], hidden[meta:].chunk(rows.stop - rows.start), strict=True):
                GOLDEN.check(hidden[:meta], row[:meta], f"meta tokens of hidden_states.{i}")
                GOLDEN.check(text, row[meta:], f"text of hidden_states.{i}")


def test_hidden_states_returned(golden: Golden) -> None:
    expected = golden.named("hidden_states.")
    states = golden.model(golden.ids, output_hidden_states=True).hidden_states
    assert len(states) == len(expected)
    for i, hidden in enumerate(states):
        GOLDEN.check(hidden, expected[str(i)][:, golden.config.num_memory_tokens :], f"hidden_states.{i}")


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_greedy_generation(golden: Golden, use_cache: bool) -> None:
    prompt, expected = (golden.tensors.get(f"generate.{name}") for name in ("prompt", "output"))
    if prompt is None or expected is None:  # only some files contain a generation
        return
    output = golden.model.generate(prompt, max_length=expected.shape[1], do_sample=False, use_cache=use_cache)
    assert output.tolist() == expected.tolist()


def test_naive_twin(golden: Golden) -> None:
    """The naive twin, with which other tests compare, is itself compared with the golden files."""
    for row, ids in enumerate(golden.ids):
        output = naive_hymba(golden.weights, golden.config.to_dict(), ids)
        GOLDEN.check(output.logits, golden.tensors["logits"][row])
        for i, hidden in enumerate(output.hidden_states):
            GOLDEN.check(hidden, golden.tensors[f"hidden_states.{i}"][row], f"hidden_states.{i}")
