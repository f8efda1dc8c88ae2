"""Teachers of many families: looked up without their weights, read in batches, refused if their logits differ."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub.errors import GatedRepoError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from hymba_tune.config import Scheme
from hymba_tune.distill.teacher import ModelTeacher, batches, find_teacher, smaller_than
from hymba_tune.errors import CheckpointError, ConfigError, HubError
from hymba_tune.registry import ALIASES, TEACHERS, resolve_model
from tests.distill.teachers import random_model, save_teacher, tokenizer_size
from tests.distill.tokenizers import ALL
from tests.tolerances import FLOAT32

CPU = torch.device("cpu")
TOKENIZER = ALL["llama3"]
SIZE = tokenizer_size(TOKENIZER)


@pytest.fixture
def rows() -> list[list[int]]:
    return [torch.randint(SIZE, (length,)).tolist() for length in (7, 1, 30, 12, 31)]


def own_log_probs(model: PreTrainedModel, row: list[int]) -> Tensor:
    return model(input_ids=torch.tensor([row])).logits[0, :, :SIZE].double().log_softmax(-1)


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "hymba", "cohere", "granite"])
def test_outputs_are_the_models_probabilities(
    family: str, padding: int, rows: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the batch, and as if a padded output layer were no larger than the tokenizer."""
    monkeypatch.setattr("hymba_tune.distill.teacher.BATCH_TOKENS", {"cpu": 64})
    model = random_model(family, SIZE + padding)
    outputs = dict(ModelTeacher(model, TOKENIZER, "it").outputs(rows))
    assert sorted(outputs) == list(range(len(rows)))
    for index, row in enumerate(rows):
        expected = own_log_probs(model, row)
        at = torch.arange(len(row) - 1)
        for temperature in (1.0, 2.0):
            distribution = outputs[index].probabilities(at, temperature)
            FLOAT32.check(distribution.probs, (expected[:-1] / temperature).softmax(-1), f"row {index}")
            assert distribution.cut is None
            FLOAT32.check(distribution.own, expected[at, torch.tensor(row[1:], dtype=torch.int64)], "its own tokens")


@pytest.mark.parametrize("family", ["gemma2", "phi"])
def test_logits_that_are_something_else_are_refused(family: str) -> None:
    with pytest.raises(ConfigError, match=r"logits of the teacher it are not its hidden states times its output layer"):
        ModelTeacher(random_model(family, SIZE), TOKENIZER, "it")


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_tokens_beyond_the_output_layer_have_no_probability(temperature: float) -> None:
    """Gemma 3's tokenizer has a token for images that its language model has no row for."""
    teacher = ModelTeacher(random_model("llama", SIZE - 2), TOKENIZER, "it")
    ((_, outputs),) = teacher.outputs([[1, 2, 3]])
    found = outputs.probabilities(torch.arange(2), temperature)
    assert found.probs.shape == (2, SIZE)
    assert not found.probs[:, -2:].any()
    FLOAT32.check(found.probs.sum(-1), torch.ones(2))


def test_output_layer_that_cannot_be_read_is_refused() -> None:
    model = random_model("llama", SIZE)
    model.set_output_embeddings(None)
    with pytest.raises(ConfigError, match="has no output layer that can be read"):
        ModelTeacher(model, TOKENIZER, "it")


def test_batches_hold_every_row_once_and_few_tokens() -> None:
    lengths = [5, 60, 7, 5, 100, 8]
    found = list(batches(lengths, 30))
    assert sorted(index for batch in found for index in batch) == list(range(len(lengths)))
    assert found == [[4], [1], [5, 2, 0], [3]]
    assert not list(batches([], 30))
    assert list(batches([2] * 5, 30, rows=2)) == [[0, 1], [2, 3], [4]]


def test_lookup_needs_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_teacher(tmp_path, padding=3)
    load = Mock(side_effect=AssertionError("weights are loaded"))
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", load)
    found = find_teacher(str(folder))
    assert (found.name, found.context) == (str(folder), 256)
    assert found.parameters == sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    assert found.tokenizer.get_vocab() == TOKENIZER.get_vocab()
    assert len(found.fingerprint) == 64


def test_loaded_teacher_is_the_one_looked_up(tmp_path: Path, rows: list[list[int]]) -> None:
    model = random_model("llama", SIZE + 3)
    teacher = find_teacher(str(save_teacher(tmp_path, padding=3))).load(CPU, torch.float32)
    for index, outputs in teacher.outputs(rows):
        at = torch.arange(len(rows[index]) - 1)
        FLOAT32.check(outputs.probabilities(at, 1.0).probs, own_log_probs(model, rows[index])[:-1].exp())


def test_packaged_model_can_teach() -> None:
    found = find_teacher("hymba-nano")
    ((_, outputs),) = found.load(CPU, torch.float32).outputs([found.tokenizer("def f(x): return x")["input_ids"]])
    distribution = outputs.probabilities(torch.arange(3), 1.0)
    assert distribution.probs.shape == (3, len(found.tokenizer))


@pytest.mark.parametrize(("scheme", "distance"), [("int8", 0.3), ("nf4", 0.8), ("fp4", 1.2)])
def test_quantized_teacher_is_close_to_the_original(
    scheme: Scheme, distance: float, tmp_path: Path, rows: list[list[int]]
) -> None:
    """Of the 2 that two distributions can be apart; random weights leave much to rounding."""
    found = find_teacher(str(save_teacher(tmp_path)), scheme)
    exact = dict(find_teacher(str(tmp_path)).load(CPU, torch.float32).outputs(rows))
    for index, outputs in found.load(CPU, torch.float32).outputs(rows):
        at = torch.arange(len(rows[index]) - 1)
        theirs, ours = exact[index].probabilities(at, 1.0).probs, outputs.probabilities(at, 1.0).probs
        assert 0 < (theirs - ours).abs().sum(-1).mean() < distance or not len(at)


def test_fingerprint_is_that_of_weights_and_configuration(tmp_path: Path) -> None:
    folder = save_teacher(tmp_path / "one")
    before = find_teacher(str(folder)).fingerprint
    shutil.copytree(folder, tmp_path / "other")
    assert find_teacher(str(tmp_path / "other")).fingerprint == before
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    after = find_teacher(str(folder)).fingerprint
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert len({before, after, find_teacher(str(folder)).fingerprint}) == 3


def test_fingerprint_of_an_adapter_is_not_its_bases(finished_run: Path, small_model: Path) -> None:
    assert find_teacher(str(finished_run)).fingerprint != find_teacher(str(small_model)).fingerprint


def test_weights_of_the_hubs_cache_are_not_read_through(tmp_path: Path) -> None:
    """They lie under their SHA-256 there."""
    folder = save_teacher(tmp_path / "snapshot")
    blob = tmp_path / "blobs" / ("ab" * 32)
    blob.parent.mkdir()
    (folder / "model.safetensors").rename(blob)
    (folder / "model.safetensors").symlink_to(blob)
    before = find_teacher(str(folder)).fingerprint
    blob.rename(blob.with_name("cd" * 32))
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(blob.with_name("cd" * 32))
    assert find_teacher(str(folder)).fingerprint != before


def test_no_tokenizer(tmp_path: Path) -> None:
    folder = save_teacher(tmp_path)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json in (.|\n)*to fix     copy tokenizer\.json"):
        find_teacher(str(folder))
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer of the teacher .* cannot be read"):
        find_teacher(str(folder))


def test_missing_tensor(tmp_path: Path) -> None:
    folder = save_teacher(tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 of its tensors, model\.layers\.1\.mlp\.up_proj\.weight first"):
        find_teacher(str(folder)).load(CPU, torch.float32)


def test_weights_cut_short_are_seen_before_they_are_loaded(tmp_path: Path) -> None:
    file = save_teacher(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="is truncated"):
        find_teacher(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "t5"}, r"is a t5 model, which does not generate text"),
        ({"model_type": "siglip"}, r"is a siglip model, which does not generate text"),
        ({"model_type": "new-one"}, r"config\.json of the teacher .* cannot be used"),
    ],
)
def test_model_of_another_kind(change: dict[str, str], message: str, tmp_path: Path) -> None:
    folder = save_teacher(tmp_path)
    (folder / "config.json").write_text(json.dumps(change))
    with pytest.raises(CheckpointError, match=message):
        find_teacher(str(folder))


def test_adapter_of_another_family(tmp_path: Path) -> None:
    base, adapter = save_teacher(tmp_path / "base"), tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(base)})
    )
    with pytest.raises(CheckpointError, match=r"is an adapter of a llama model(.|\n)*merge it into its base model"):
        find_teacher(str(adapter))


def test_a_hymba_is_quantized_as_a_student_is() -> None:
    whole, quantized = (
        find_teacher("hymba-nano", scheme).load(torch.device("cpu"), torch.float32) for scheme in (None, Scheme.int8)
    )
    ours, theirs = quantized.model.state_dict(), whole.model.state_dict()
    name = "model.layers.0.mamba.in_proj.weight"
    assert (ours[name].dtype, theirs[name].dtype) == (torch.int8, torch.float32)
    distribution = [
        next(iter(teacher.outputs([[1, 300, 301]])))[1].probabilities(torch.tensor([1]), 1.0)
        for teacher in (whole, quantized)
    ]
    assert 0 < float((distribution[0].probs - distribution[1].probs).abs().sum()) < 0.2


def test_what_cannot_be_quantized_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": "hymba-nano"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="is an adapter, which must be merged first"):
        find_teacher(str(tmp_path / "adapter"), Scheme.nf4)
    stored = Path(shutil.copytree(resolve_model("hymba-nano").folder, tmp_path / "stored"))
    config = json.loads((stored / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (stored / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"--teacher-quantize nf4: .* is quantized already, to int8"):
        find_teacher(str(stored), Scheme.nf4)
    assert find_teacher(str(stored), Scheme.int8).quantize is Scheme.int8


@pytest.mark.parametrize("name", ["llama-3.2-3b", "Qwen2.5-7B-Instruct", *ALIASES])
def test_aliases(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    download = Mock(return_value=str(save_teacher(tmp_path)))
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert find_teacher(name).name == download.call_args.args[0] == TEACHERS[name.lower()]


def test_gated_teacher_names_the_page_of_its_license(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", Mock(side_effect=GatedRepoError("401", response=Mock())))
    with pytest.raises(HubError, match=r"ask for access at https://huggingface\.co/meta-llama/Llama-3\.2-3B, .*login"):
        find_teacher("llama-3.2-3b")


def test_unknown_teacher_suggests_a_near_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"--teacher llama-3\.2-3bb: no such folder(.|\n)*--teacher llama-3\.2-3b$"):
        find_teacher("llama-3.2-3bb")


def test_smaller_teacher_gets_a_warning() -> None:
    nano = find_teacher("hymba-nano")
    assert smaller_than(nano, nano.parameters) is None
    assert smaller_than(nano, 1_500_000_000) == (
        "the teacher is smaller than the student (3.6M parameters to 1.5B): expect little, unless it knows this data "
        "better"
    )
