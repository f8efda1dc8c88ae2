"""Merges are complete, close to the trained model, and written as a whole or not at all."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hymba_tune.adapters import base_of, load_adapter, open_model
from hymba_tune.checkpoint import INDEX
from hymba_tune.config import MergeConfig, Onto
from hymba_tune.errors import CheckpointError, ConfigError
from hymba_tune.hub import Merged, merge
from hymba_tune.hub.drift import drift
from hymba_tune.registry import resolve_model
from tests.cli.conftest import Command
from tests.hub.silent import silent
from tests.runs import run, same_tensors, settings, tensors
from tests.tiny import random_texts
from tests.tolerances import BFLOAT16_MODEL, FLOAT32, Tolerance

CPU = torch.device("cpu")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(input_ids=torch.stack(random_texts([19, 19], 4000))).logits
    return result


def unmerged(run: Path, dtype: torch.dtype) -> Any:
    source = resolve_model(str(run))
    assert source.adapter is not None
    return load_adapter(open_model(base_of(source), dtype=dtype, device=CPU), source.adapter)


def merged(run: Path, out: Path, dtype: str = "float32", **options: Any) -> Merged:
    done = merge(MergeConfig(model=str(run), out=out, dtype=dtype, **options), silent)
    assert done.folder == out
    assert done.size == sum(tensor.nbytes for tensor in tensors(out).values())
    return done


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", FLOAT32), ("bfloat16", BFLOAT16_MODEL)])
def test_merged_folder_is_a_plain_model(dtype: str, tolerance: Tolerance, finished_run: Path, tmp_path: Path) -> None:
    folder = merged(finished_run, tmp_path / "merged", dtype).folder
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert model.dtype is getattr(torch, dtype)
    expected = logits(unmerged(finished_run, model.dtype))
    tolerance.check(logits(model), expected)
    base = logits(open_model(base_of(resolve_model(str(finished_run))), dtype=model.dtype, device=CPU))
    assert (base - expected).norm() > 0.1 * base.norm()


def test_merged_folder_has_the_tokenizer_of_the_run(finished_run: Path, small_model: Path, tmp_path: Path) -> None:
    folder = merged(finished_run, tmp_path / "merged").folder
    tokenizer, original = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(small_model)
    for text in ("Two  cats\n\tand <extra_id_1>User </s>x", "naïve ☃", "    return self"):
        assert tokenizer(text)["input_ids"] == original(text)["input_ids"]
    assert tokenizer.chat_template
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (original.eos_token_id, original.pad_token_id)


def test_no_incomplete_folder_is_left(finished_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    out.mkdir()
    (tmp_path / "merged.partial").mkdir()
    (tmp_path / "merged.partial/mine").write_text("a folder that hymba-tune did not create")
    assert merged(finished_run, out).folder == out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "merged.partial"]
    assert [path.name for path in (tmp_path / "merged.partial").iterdir()] == ["mine"]
    assert not (out / "mine").exists()


def test_overwrite_replaces_a_model_but_never_an_input(finished_run: Path, small_model: Path, tmp_path: Path) -> None:
    base = shutil.copytree(small_model, tmp_path / "base")
    mine = shutil.copytree(finished_run, tmp_path / "run")
    for file, name in ((mine / "run.json", "model"), (mine / "adapter/adapter_config.json", "base_model_name_or_path")):
        file.write_text(json.dumps(json.loads(file.read_text()) | {name: str(base)}))
    before = contents(tmp_path)
    for out in (base, mine, mine / "adapter", mine / "model"):
        with pytest.raises(ConfigError, match=r"is a part of a run|not a model of hymba-tune|would remove .*an input"):
            merged(mine, out, overwrite=True)
    assert contents(tmp_path) == before
    out = merged(mine, tmp_path / "merged").folder
    with pytest.raises(ConfigError, match=r"exists and is not empty"):
        merged(mine, out)
    merged(mine, out, "bfloat16", overwrite=True)
    assert AutoModelForCausalLM.from_pretrained(out).dtype is torch.bfloat16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "merged", "run"]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("existing", ["a folder with a file", "a file"])
def test_folder_in_use_is_not_written_to(existing: str, finished_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if existing == "a file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "file").write_text("mine")
    with pytest.raises(ConfigError, match=r"--out .*out (exists and is not empty|is a file)\.\n  expected   a new or "):
        merged(finished_run, out)
    assert (out if out.is_file() else out / "file").read_text() == "mine"


def test_model_without_an_adapter_has_nothing_to_merge(small_model: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"small has no adapter, so there is nothing to merge\."):
        merged(small_model, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.fixture(scope="module")
def quantized_run(wide_model: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run on quantized weights, which tests must not change."""
    out = tmp_path_factory.mktemp("runs") / "qlora"
    return run(settings(wide_model, questions, out, quantize="nf4", steps=4, eval_split=0)).path


def test_drift_is_measured_for_both_kinds_of_weights(quantized_run: Path, tmp_path: Path) -> None:
    drifts = {}
    for onto in Onto:
        done = merged(quantized_run, tmp_path / onto, onto=onto)
        drifts[onto] = done.drifts
        model = open_model(resolve_model(str(quantized_run)), dtype=torch.float32, device=CPU, onto=onto)
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(done.folder)), logits(model))
    assert drifts[Onto.original] == drifts[Onto.dequantized]
    original, dequantized = drifts[Onto.original][Onto.original], drifts[Onto.original][Onto.dequantized]
    assert abs(dequantized.divergence) < 1e-7
    assert dequantized.largest < 1e-3
    assert original.divergence > 1e-4
    assert original.largest > 0.1


def test_drift_is_the_mean_divergence_per_token() -> None:
    ours, theirs = torch.tensor([[0.0, 1.0], [3.0, 0.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    measured = drift([ours[:1], ours[1:]], [theirs[:1], theirs[1:]])
    p, q = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-3))
    assert measured.divergence == pytest.approx((p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))) / 2)
    assert measured.largest == 2
    with pytest.raises(CheckpointError, match=r"The logits of the merged model are NaN or infinite"):
        drift([ours * math.nan], [ours])


def test_commands_note_that_the_weights_were_quantized(
    command: Command, quantized_run: Path, questions: Path, tmp_path: Path
) -> None:
    note = "qlora: merged into the weights it was trained on, nf4 dequantized"
    assert note in command("chat", quantized_run, "--prompt", "Hello", "--max-new-tokens", 2).out
    assert note in command("eval", quantized_run, "--data", questions, "--max-rows", 1).out
    assert note in command("sft", "--model", quantized_run, "--data", questions, "--dry-run").out
    assert note in command("export", quantized_run, "--out", tmp_path / "exported").out
    output = command("merge", quantized_run, "--out", tmp_path / "merged").out
    assert " onto          nf4 weights, dequantized: KL " in output
    assert " not onto      the original weights: KL " in output
    assert "advised" not in output
    again = command("merge", quantized_run, "--out", tmp_path / "original", "--onto", "original").out
    assert " onto          the original weights: KL " in again
    assert " advised       --onto dequantized: closer to the trained model\n" in again
    assert same_tensors(tmp_path / "merged", tmp_path / "exported")
    alone = shutil.copytree(quantized_run / "adapter", tmp_path / "alone")
    output = command("merge", alone, "--out", tmp_path / "unknown").out
    assert " onto          the original weights: an adapter without its run does not say" in output
    assert same_tensors(tmp_path / "unknown", tmp_path / "original")


def test_weights_are_written_one_shard_at_a_time(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = merged(finished_run, tmp_path / "whole").folder
    monkeypatch.setattr("hymba_tune.hub.merging.SHARD", 100_000)
    parts = merged(finished_run, tmp_path / "parts").folder
    files = sorted(parts.glob("*.safetensors"))
    index = json.loads((parts / INDEX).read_text())
    assert {file.name for file in files} == set(index["weight_map"].values())
    assert len(files) > 2
    sizes = [[tensor.nbytes for tensor in load_file(file).values()] for file in files]
    assert all(sum(held) <= 100_000 or len(held) == 1 for held in sizes)
    assert index["metadata"]["total_size"] == sum(map(sum, sizes))
    assert same_tensors(parts, whole)
    assert torch.equal(*(logits(AutoModelForCausalLM.from_pretrained(folder)) for folder in (parts, whole)))


@pytest.mark.parametrize("damage", ["cut", "zeroed", "another base", "unwritable", "scale", "lost base"])
def test_failed_merge_ends_with_one_message(
    damage: str, finished_run: Path, small_model: Path, command: Command, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(small_model, tmp_path / "base"))
    adapter = Path(shutil.copytree(finished_run / "adapter", tmp_path / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    named = "hymba-nano" if damage == "another base" else str(base)
    changes = {
        "scale": {"lora_alpha": math.nan},
        "lost base": {"init_lora_weights": "corda"},
    }
    config |= {"base_model_name_or_path": named} | changes.get(damage, {})
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    file, out = base / "model.safetensors", tmp_path / "out"
    if damage in ("cut", "zeroed"):
        held = file.read_bytes()
        file.write_bytes(held[:-9] if damage == "cut" else bytes(len(held)))
    if damage == "unwritable":
        out = file / "out"
    result = command("merge", adapter, "--out", out)
    messages = {
        "scale": "model.memory_tokens of the merged model contains NaN or infinity",
        "lost base": "its init_lora_weights, corda, changed the weights of its base model",
        "cut": "model.safetensors is truncated",
        "zeroed": "model.safetensors is not a safetensors file",
        "another base": "does not fit this model",
        "unwritable": "cannot be written: Not a directory",
    }
    assert result.code == 2
    assert messages[damage] in result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
