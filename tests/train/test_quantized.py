"""QLoRA: adapters on quantized weights, in complete runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt

from hymba_tune.adapters import add_adapter
from hymba_tune.checkpoint import load_config, load_tokenizer, load_weights
from hymba_tune.config import Scheme, SFTConfig
from hymba_tune.errors import ConfigError
from hymba_tune.footprint import Batch
from hymba_tune.footprint.shapes import LiveBytes
from hymba_tune.footprint.step import StepMemory
from hymba_tune.registry import ModelSource
from hymba_tune.schemes import quantization, stored_bytes
from hymba_tune.train.screen import Screen
from hymba_tune.train.trainer import HymbaTrainer
from tests.adapters.small import config_for
from tests.preferences import dpo, save_pairs
from tests.runs import SMALL, run, settings, tensors
from tests.tiny import tiny_model

CPU = torch.device("cpu")


class Banner(Screen):
    """Remembers the lines before the run."""

    def banner(self, lines: dict[str, str]) -> None:
        self.lines = lines


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, wide_model: Path) -> dict[Scheme, Path]:
    """Folders of quantized models."""
    folder, source = tmp_path_factory.mktemp("quantized"), ModelSource("wide", wide_model)
    for scheme in (Scheme.nf4, Scheme.int8):
        config = quantization(load_config(source), scheme, torch.float32)
        load_weights(source, dtype=torch.float32, device=CPU, quantization=config).save_pretrained(folder / scheme)
        load_tokenizer(wide_model).save_pretrained(folder / scheme)
    return {scheme: folder / scheme for scheme in (Scheme.nf4, Scheme.int8)}


@pytest.mark.parametrize(("scheme", "layer"), [("fp4", Linear4bit), ("int8", Linear8bitLt)])
def test_adapter_is_trained_on_quantized_weights(
    scheme: str, layer: type, wide_model: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    usual = HymbaTrainer.__init__

    def seeing(self: HymbaTrainer, **kwargs: Any) -> None:
        usual(self, **kwargs)
        seen.append(self.model)

    monkeypatch.setattr(HymbaTrainer, "__init__", seeing)
    banner, model = Banner(), wide_model
    changes: dict[str, Any] = {"quantize": scheme, "steps": 4, "dtype": "bfloat16"}
    finished = run(settings(model, questions, tmp_path / "out", **changes), banner)
    losses = [row.loss for row in finished.rows() if row.loss is not None]
    assert losses[-1] < losses[0]
    assert sum(isinstance(module, layer) for module in seen[0].modules()) == 5 * SMALL["num_hidden_layers"]
    trained = [parameter for parameter in seen[0].parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}  # TRL would round them to bfloat16
    assert f"· {scheme} weights · bfloat16" in banner.lines["model"]
    assert finished.facts()["quantized"] == scheme
    assert f"(lora on weights quantized to {scheme})" in (finished.path / "README.md").read_text()
    assert all("lora" in name for name in tensors(finished.adapter))


def test_quantized_checkpoints_are_trained_as_they_are(
    stored: dict[Scheme, Path], wide_model: Path, questions: Path, tmp_path: Path
) -> None:
    ours = run(settings(stored[Scheme.nf4], questions, tmp_path / "stored"))
    other = run(settings(wide_model, questions, tmp_path / "quantized", quantize="nf4"))
    assert ours.facts()["quantized"] == other.facts()["quantized"] == "nf4"
    losses = [[row.loss for row in finished.rows()] for finished in (ours, other)]
    assert losses[0] == losses[1]


def test_preferences_go_on_with_an_adapter_on_quantized_weights(wide_model: Path, tmp_path: Path) -> None:
    pairs = save_pairs(tmp_path / "pairs.jsonl")
    first = dpo(wide_model, pairs, tmp_path / "first", quantize="nf4", method="dora")
    second = dpo(first.path, pairs, tmp_path / "second", start="continue")
    assert first.facts()["quantized"] == second.facts()["quantized"] == "nf4"
    assert second.facts()["model"] == str(wide_model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantize": "nf4", "method": "full"}, "quantize: --method full trains every weight"),
        ({"quantize": "int8", "method": "dora"}, "quantize: DoRA needs the norms of the weights"),
        ({"quantize": "nf5"}, "Input should be 'nf4', 'fp4' or 'int8'"),
    ],
)
def test_settings_that_do_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SFTConfig(**changes)


@pytest.mark.parametrize(
    ("scheme", "changes", "message"),
    [
        (Scheme.nf4, {"quantize": "int8"}, "--quantize int8: .* is quantized already, to nf4"),
        (Scheme.nf4, {"method": "full"}, "--method full trains every weight, and those of .* are quantized"),
        (Scheme.int8, {"method": "dora"}, r"--method dora needs the norms(.|\n)*quantized to int8"),
    ],
)
def test_quantized_checkpoints_that_cannot_be_trained_so(
    scheme: Scheme, changes: dict[str, Any], message: str, stored: dict[Scheme, Path], questions: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(settings(stored[scheme], questions, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_a_run_is_merged_before_it_is_quantized(finished_run: Path, questions: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"finished is an adapter(.|\n)*hymba-tune merge"):
        run(settings(finished_run, questions, tmp_path / "out", quantize="nf4"))


@pytest.mark.parametrize("scheme", Scheme)
def test_estimated_memory_is_that_of_a_real_step(scheme: Scheme, tmp_path: Path) -> None:
    shape: dict[str, Any] = {
        "hidden_size": 256,
        "num_attention_heads": 4,
        "intermediate_size": 512,
        "vocab_size": 512,
    }
    plain = tiny_model(**shape)
    plain.save_pretrained(tmp_path)
    config = quantization(plain.config, scheme, torch.float32)
    memory = StepMemory(adapted(plain), dtype=torch.float32, own_kernels=True)
    texts = torch.randint(3, 512, (2, 64))
    step = memory.of(
        Batch.full(2, 64),
        checkpointing=False,
        accumulates=False,
        optimizer="sgd",
        quantized=stored_bytes(plain.config, config),
    )
    source = ModelSource("model", tmp_path)
    model = adapted(load_weights(source, dtype=torch.float32, device=CPU, quantization=config)).train()
    held = {
        parameter.untyped_storage().data_ptr(): parameter.untyped_storage().nbytes() for parameter in model.parameters()
    }
    assert sum(held.values()) == pytest.approx(step.weights + step.adapter, rel=0.05)
    with LiveBytes() as counted:
        model(input_ids=texts, labels=texts, use_cache=False, skip_logits=True).loss.backward()
    assert counted.peak == pytest.approx(step.total - step.weights - step.adapter - step.optimizer, rel=0.2)


def adapted(model: Any) -> Any:
    return add_adapter(model, config_for(model), ["all"])
