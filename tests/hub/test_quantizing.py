"""Quantized models are complete, usable like any model, and refused before the weights load if a setting is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit

from hymba_tune.adapters import open_model
from hymba_tune.checkpoint import load_config
from hymba_tune.config import EvalConfig, ExportConfig, QuantizeConfig, Scheme
from hymba_tune.errors import CheckpointError, ConfigError, HymbaTuneError
from hymba_tune.evaluate import evaluate
from hymba_tune.hub import export, quantize, search_skips
from hymba_tune.hub.checks import check_sums
from hymba_tune.quant import QuantizationDrift, quantize_model
from hymba_tune.registry import ModelSource, resolve_model
from hymba_tune.schemes import quantization, scheme_of, stored_quantization
from tests.cli.conftest import Command
from tests.hub.silent import silent
from tests.runs import same_tensors, tensors

CPU = torch.device("cpu")


def quantized(model: Path | str, out: Path, **options: Any) -> Path:
    done = quantize(QuantizeConfig(model=str(model), out=out, **{"max_tokens": 50} | options), silent)
    assert done.folder == out
    assert done.difference == 0
    before, after = done.damage.weight_bytes
    assert after < before
    return out


@pytest.mark.parametrize("scheme", Scheme)
def test_folder_is_complete_states_the_damage_and_is_exported_unchanged(
    scheme: Scheme, wide_model: Path, questions: Path, tmp_path: Path
) -> None:
    folder = quantized(wide_model, tmp_path / "one", scheme=scheme, data=[str(questions)], max_tokens=10**6)
    check_sums(folder)
    stored = stored_quantization(load_config(ModelSource("model", folder)))
    assert stored is not None
    assert scheme_of(stored) is scheme
    assert {"chat_template.jinja", "generation_config.json", "modeling_hymba.py"} <= {f.name for f in folder.iterdir()}
    damage = json.loads((folder / "damage.json").read_text())
    page = (folder / "damage.html").read_text()
    rounding = 1e-3 if scheme is Scheme.int8 else 1e-5  # int8 treats outliers of the whole batch separately
    for name, model in (("before", wide_model), ("after", folder)):
        measured = evaluate(EvalConfig(model=str(model), data=[str(questions)], dtype="float32"), silent).results[0]
        assert damage["loss"][name] == pytest.approx(measured.measures["loss"], rel=rounding)
        assert damage["data"]["fingerprint"] == (measured.texts.fingerprint if measured.texts else "")
    assert damage["kl"] > 0
    assert damage["file_bytes"]["after"] == (folder / "model.safetensors").stat().st_size
    sentence = f"Perplexity on questions.jsonl: {damage['perplexity']['before']:,.1f} → "
    assert sentence in page
    assert f"Quantized to {scheme} by bitsandbytes. {sentence}" in (folder / "README.md").read_text()
    assert str(questions.parent) not in page + json.dumps(damage)
    # Without our correction, transformers cannot save a quantized model that it has loaded.
    export(ExportConfig(model=str(folder), out=tmp_path / "two"), silent)
    assert same_tensors(tmp_path / "two", folder)
    card = (tmp_path / "two/README.md").read_text()
    assert f"parameters in float32, quantized to {scheme} by bitsandbytes.\n" in card
    assert "With torch, transformers 5, accelerate and bitsandbytes, on" in card


def test_run_is_quantized_with_its_adapter_merged(finished_run: Path, tmp_path: Path) -> None:
    out = quantized(finished_run, tmp_path / "out", scheme="int8")
    whole = open_model(resolve_model(str(finished_run)), dtype=torch.float32, device=CPU).eval()
    expected = quantize_model(whole, quantization(whole.config, Scheme.int8, torch.float32)).eval()
    reloaded = open_model(resolve_model(str(out)), dtype=torch.float32, device=CPU).eval()
    ids = torch.arange(3, 40)[None]
    assert torch.equal(reloaded(ids).logits, expected(ids).logits)
    assert "held-out loss before" in (out / "README.md").read_text()
    with pytest.raises(CheckpointError, match=r"out is quantized already, to int8\.(.|\n)*pass the model it was"):
        quantize(QuantizeConfig(model=str(out), out=tmp_path / "again"), silent)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_skipped_modules_are_not_quantized(wide_model: Path, tmp_path: Path) -> None:
    stored = tensors(quantized(wide_model, tmp_path / "out", skip=["down_proj", "layers.0.mamba.in_proj"]))
    plain = {
        name.removesuffix(".weight") for name, tensor in stored.items() if tensor.is_floating_point() and "proj" in name
    }
    assert {name for name in plain if name.endswith("down_proj")} == {
        f"model.layers.{layer}.moe.experts.0.down_proj" for layer in range(3)
    }
    assert "model.layers.0.mamba.in_proj" in plain
    assert "model.layers.1.mamba.in_proj" not in plain


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"out": "file/out"}, r"--out .*file/out cannot be written"),
        ({"skip": ["dwn_proj"]}, r"--skip dwn_proj: the model has no linear layer of this name"),
        ({"device": "cuda:99"}, r"--device cuda:99: this machine has"),
        ({"data": ["nosuch.jsonl"]}, r"Cannot find nosuch.jsonl"),
    ],
)
def test_wrong_settings_are_refused_before_the_weights_load(
    flags: dict[str, Any], message: str, wide_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hymba_tune.hub.quantizing.open_model", lambda *_, **__: pytest.fail("the weights are loaded"))
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    with pytest.raises(HymbaTuneError, match=message):
        quantize(QuantizeConfig(model=str(wide_model), **flags), silent)
    assert [path.name for path in tmp_path.iterdir() if path.name != "exports"] == ["file"]


def test_command_prints_its_folder_and_the_sizes(
    command: Command, wide_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = command("quantize", wide_model, "--max-tokens", 50)
    assert done.code == 0, done.err
    assert " quantized     exports/wide-nf4 (weights 1.6 MB → 1.1 MB)\n damage        Perplexity on demo: " in done.out
    assert "hymba-tune chat exports/wide-nf4" in done.out
    refused = command("quantize", wide_model, "--scheme", "nf3")
    assert (refused.code, refused.err) == (
        2,
        "--scheme nf3: must be 'nf4', 'fp4' or 'int8'.\n  to fix     --scheme nf4\n",
    )


def test_proposal_is_written_and_predicts_as_in_the_search(wide_model: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"model": str(wide_model), "skip": ["down_proj"], "search": True, "max_tokens": 200}
    result = search_skips(QuantizeConfig(out=tmp_path / "out", max_rise="900%", **options), silent)
    assert {kind for trial in result.search.alone for kind in trial.kinds} == {
        "in_proj",
        "out_proj",
        "gate_proj",
        "up_proj",
    }
    assert (result.search.skip, result.skip) == ((), ("down_proj",))
    assert result.written
    drift, searched = result.written.damage.drift, result.search.whole[-1].drift
    assert (drift.kl, drift.loss_after) == (pytest.approx(searched.kl, rel=1e-4), pytest.approx(searched.loss_after))
    assert result.written.damage.kept["down_proj"] == "excluded by --skip"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match=r"file/out cannot be written"):
        search_skips(QuantizeConfig(out=tmp_path / "file/out", **options), silent)


@pytest.mark.parametrize("holds", [("in_proj", "out_proj", "down_proj"), ()])
def test_command_prints_the_proposal_and_the_next_command(
    holds: tuple[str, ...], command: Command, wide_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)

    def compared(_: Any, model: Any, __: Any) -> QuantizationDrift:
        done = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, Linear4bit)}
        return QuantizationDrift(0.01, 2.0, 2.0 + 0.1 * len(done - set(holds)), 0.9)

    monkeypatch.setattr("hymba_tune.hub.searching.compare", compared)
    done = command("quantize", wide_model, "--search", "--max-rise", "1%", "--max-tokens", 20)
    assert " gate_proj alone" in done.out
    assert " all " in done.out
    if holds:
        assert done.code == 0, done.err
        assert " proposal      leave gate_proj up_proj: +0.00 % (measured whole; 1 % allowed)\n" in done.out
        assert f"hymba-tune quantize {wide_model} --scheme nf4 --skip gate_proj up_proj\n" in done.out
    else:
        assert done.code == 2
        assert " proposal      no set of them keeps the rise within 1 %\n" in done.out
    assert not list(tmp_path.iterdir())
    refused = command("quantize", wide_model, "--max-rise", 2)
    assert (refused.code, refused.err) == (
        2,
        "--max-rise: it applies to --search only; add --search, or remove --max-rise\n",
    )


def test_export_quantizes_as_the_quantize_command_does(wide_model: Path, tmp_path: Path) -> None:
    done = export(ExportConfig(model=str(wide_model), out=tmp_path / "exported", quantize="fp4", license="mit"), silent)
    assert done.difference == 0
    folder = quantized(wide_model, tmp_path / "quantized", scheme="fp4")
    assert same_tensors(done.folder, folder)
    assert {file.name for file in done.folder.iterdir()} == {file.name for file in folder.iterdir()}
    check_sums(done.folder)
    card = (done.folder / "README.md").read_text()
    assert "Quantized to fp4 by bitsandbytes." in card
    assert "Left in float32: lm_head, " in card
    assert "\nThe weights: mit.\n" in card
    with pytest.raises(CheckpointError, match=r"exported is quantized already, to fp4"):
        export(ExportConfig(model=str(done.folder), quantize="nf4", out=tmp_path / "again"), silent)
    with pytest.raises(ConfigError, match=r"--format hymba: .*exported is quantized"):
        export(ExportConfig(model=str(done.folder), format="hymba", out=tmp_path / "again"), silent)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter_only": True}, "quantize: an adapter cannot be quantized, only its base model"),
        ({"format": "hymba"}, "quantize: the hymba format is for NVIDIA's code, which is untested"),
    ],
)
def test_exports_that_cannot_be_quantized_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExportConfig(quantize="nf4", **changes)
