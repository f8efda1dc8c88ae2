"""A tokenizer with tokens that the model lacks: refused, or given rows that are trained and saved."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from hymba_tune.adapters import add_adapter, load_adapter, open_model, tokenizer_of, vocabulary_of, widen_vocabulary
from hymba_tune.adapters.attach import read_config
from hymba_tune.checkpoint import load_tokenizer
from hymba_tune.config import DPOConfig, GenerationOptions, SFTConfig, Start
from hymba_tune.errors import CheckpointError, ConfigError
from hymba_tune.generate.opening import find_model
from hymba_tune.registry import resolve_model
from hymba_tune.train.resuming import resume_config
from hymba_tune.train.setup import _added_tokens
from tests.adapters.small import adapted_model, config_for, logits, merged, train
from tests.runs import merge_run, run, save_model, settings
from tests.tiny import tiny_model

CPU = torch.device("cpu")
DELTA = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"


def add_token(model: Path, *numbers: int) -> Path:
    """Add tokens to a tokenizer.json as people do, without a change of the model."""
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    for number in numbers:
        token = {"id": number, "content": f"<sku{number}>", "special": False, "normalized": False}
        tokenizer["added_tokens"].append(token | dict.fromkeys(("single_word", "lstrip", "rstrip"), False))
    path.write_text(json.dumps(tokenizer))
    return model


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_token(save_model(tmp_path_factory.mktemp("wide") / "model"), 4096, 4097)


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("items") / "items.jsonl"
    rows = [{"prompt": f"Find <sku4096> {i}", "completion": f"<sku4096> {i} found"} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def resized(wide: Path, items: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps, with a checkpoint after the second."""
    out = tmp_path_factory.mktemp("resized") / "run"
    return run(settings(wide, items, out, resize=True, steps=4, save_every=2, eval_split=0.0)).path


def answers(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(input_ids=torch.tensor([[1, 4096, 7, 4097, 300]])).logits
    return result


def test_wider_tokenizer_is_refused_before_weights_are_read(
    wide: Path, items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hymba_tune.train.flow.open_model", None)
    message = r"token id 4,096 \(<sku4096>\) .* past .* vocab_size of 4,096, and 1 others(.|\n)*--resize"
    with pytest.raises(CheckpointError, match=message):
        run(settings(wide, items, tmp_path / "run"))
    with pytest.raises(CheckpointError, match=message):
        find_model(str(wide), GenerationOptions())


def test_padded_head_is_no_reason_to_refuse(tmp_path: Path) -> None:
    source = resolve_model(str(save_model(tmp_path / "padded", vocab_size=4160)))
    assert vocabulary_of(source) == 4160
    assert len(tokenizer_of(source)) == 4096


def test_added_rows_are_trained_and_saved_with_the_adapter(resized: Path, wide: Path) -> None:
    rows = load_file(resized / "adapter/adapter_model.safetensors")[DELTA]
    mean = load_file(wide / "model.safetensors")["model.embed_tokens.weight"].mean(0)
    assert rows.shape == (2, 32)
    assert not torch.allclose(rows[0], mean, atol=1e-3)
    assert vocabulary_of(resolve_model(str(resized))) == 4098
    assert "<sku4097>" in load_tokenizer(resized / "adapter").get_vocab()


def test_resized_run_merges_into_a_model_of_the_same_logits(resized: Path, wide: Path, tmp_path: Path) -> None:
    source = resolve_model(str(resized))
    adapted = load_adapter(AutoModelForCausalLM.from_pretrained(wide), resized / "adapter")
    folder = merge_run(resized, tmp_path / "merged")
    for model in (
        open_model(source, dtype=torch.float32, device=CPU),
        open_model(resolve_model(str(folder)), dtype=torch.float32, device=CPU),
        find_model(str(resized), GenerationOptions(dtype="float32")).load(),
    ):
        assert model.config.vocab_size == model.lm_head.weight.shape[0] == 4098
        torch.testing.assert_close(answers(model), answers(adapted), atol=1e-4, rtol=1e-4)
    assert tokenizer_of(resolve_model(str(folder))).convert_tokens_to_ids("<sku4096>") == 4096


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_plain_peft_loads_a_resized_adapter(resized: Path, wide: Path) -> None:
    adapted = load_adapter(AutoModelForCausalLM.from_pretrained(wide), resized / "adapter")
    base = AutoModelForCausalLM.from_pretrained(wide)
    base.resize_token_embeddings(4098, mean_resizing=False)
    assert torch.equal(answers(PeftModel.from_pretrained(base, resized / "adapter")), answers(adapted))


def test_resized_run_resumes_as_if_uninterrupted(resized: Path, tmp_path: Path) -> None:
    again = Path(shutil.copytree(resized, tmp_path / "run"))
    shutil.rmtree(again / "adapter")
    shutil.rmtree(again / "checkpoint-4", ignore_errors=True)
    run(resume_config(SFTConfig(resume=again)))
    weights = [load_file(path / "adapter/adapter_model.safetensors") for path in (resized, again)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_run_on_a_resized_run_has_its_rows(resized: Path, items: Path, tmp_path: Path) -> None:
    second = run(settings(resized, items, tmp_path / "second", steps=1, eval_split=0.0)).path
    model = open_model(resolve_model(str(second)), dtype=torch.float32, device=CPU)
    rows = load_file(resized / "adapter/adapter_model.safetensors")[DELTA]
    assert torch.equal(model.get_input_embeddings().weight[4096:], rows)


def test_full_training_adds_rows_to_the_model(wide: Path, items: Path, tmp_path: Path) -> None:
    path = run(settings(wide, items, tmp_path / "run", resize=True, method="full", steps=1, lr=1e-3)).path
    model = open_model(resolve_model(str(path)), dtype=torch.float32, device=CPU)
    assert model.config.vocab_size == len(model.get_input_embeddings().weight) == 4098


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_rows_equal_unmerged_ones(tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model(dtype, tie_word_embeddings=tied)
    widen_vocabulary(model, 64)
    adapted = add_adapter(model, config_for(model, added_tokens=range(61, 64)), ["all"])
    trained = {name: parameter for name, parameter in adapted.named_parameters() if "trainable_tokens" in name}
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    train(adapted)

    unmerged, exact = logits(adapted), logits(copy.deepcopy(adapted).float())
    folded = logits(merged(adapted, tmp_path, tie_word_embeddings=tied))
    rounding = float((unmerged - exact).norm())  # of bfloat16; none in float32
    assert float((folded - unmerged).norm()) < max(3 * rounding, 1e-5 * float(exact.norm()))
    assert folded.shape[-1] == 64


@pytest.mark.parametrize("rows", [[61, 63], [64], [10**12], [-1]])
def test_rows_with_gaps_are_refused(rows: list[int], tmp_path: Path) -> None:
    merged(adapted_model(), tmp_path)
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"trainable_token_indices": rows}))
    with pytest.raises(CheckpointError, match=r"adapter contains rows for the tokens .*\n  expected   a row for every"):
        load_adapter(tiny_model(), path.parent)
    assert read_config(path.parent).trainable_token_indices == rows


def test_rows_are_not_added_to_an_adapter_that_is_trained_further(resized: Path) -> None:
    config = DPOConfig(model=str(resized), start=Start.continue_, resize=True)
    with pytest.raises(ConfigError, match=r"--resize adds rows for .*\n(.|\n)*--start merge"):
        _added_tokens(config, tokenizer_of(resolve_model(str(resized))), tiny_model().config)
