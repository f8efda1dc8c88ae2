import json
import math
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer

from hymba_tune.assets import build_nano
from hymba_tune.assets.corpus import Entry, clean_paragraphs
from hymba_tune.config import SFTConfig
from hymba_tune.model import HymbaConfig, HymbaForCausalLM

RECIPE = Path(build_nano.__file__).parents[2] / "recipes" / "pretrain_nano.yaml"
SMALL = {"vocab_size": 600, "pad_token_id": 599, "num_hidden_layers": 3, "global_attn_idx": [0], "hidden_size": 24}


@pytest.fixture
def small_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build from a few pages of the language reference, for a model of three layers."""
    pages = [(f"topics.{name}", name, text) for name, text in sorted(topics.items())[:20]]
    entries = [Entry(module, "topic", name, "", clean_paragraphs(text)) for module, name, text in pages]
    monkeypatch.setattr(build_nano, "read_entries", lambda: entries)
    monkeypatch.setattr(build_nano, "HELD_OUT_EVERY", 5)
    monkeypatch.setattr(build_nano, "VOCABULARY", 600)
    monkeypatch.setattr(build_nano, "NANO", {**build_nano.NANO, **SMALL})


def test_nano_has_every_part_of_hymba_and_fits_the_package() -> None:
    config = HymbaConfig(**build_nano.NANO)
    layers = range(config.num_hidden_layers)
    producers = {(config.kv_source(layer) == layer, config.is_global(layer)) for layer in layers}
    assert producers == {(True, True), (True, False), (False, False)}
    with torch.device("meta"):
        model = HymbaForCausalLM(config)
    assert model.num_parameters() == 3_596_232


def test_packaged_configuration_is_the_builders() -> None:
    packaged = HymbaConfig.from_pretrained(build_nano.FOLDER)
    assert {name: getattr(packaged, name) for name in build_nano.NANO} == build_nano.NANO
    assert sum(path.stat().st_size for path in build_nano.FOLDER.iterdir()) < 8_000_000


@pytest.mark.usefixtures("small_library")
def test_build_gives_the_same_bytes_twice(tmp_path: Path) -> None:
    for name in "once", "twice":
        build_nano.build(tmp_path / name)
    once = {path.relative_to(tmp_path / "once"): path for path in (tmp_path / "once").rglob("*.*")}
    assert {path.name for path in once} >= {"train.jsonl", "eval.jsonl", "model.safetensors", "tokenizer.json"}
    for name, path in once.items():
        assert path.read_bytes() == (tmp_path / "twice" / name).read_bytes()


@pytest.mark.usefixtures("small_library")
def test_rows_of_a_module_are_all_trained_on_or_all_held_out() -> None:
    rows = build_nano.corpus_rows()
    train, held_out = build_nano.split_rows(rows)
    assert len(train) + len(held_out) == len(rows)
    sides = [{module for module, row in rows if row in part} - {""} for part in (train, held_out)]
    assert all(sides)
    assert not sides[0] & sides[1]


@pytest.mark.usefixtures("small_library")
def test_installed_model_is_the_trained_one_in_bfloat16(tmp_path: Path) -> None:
    out, run, folder = tmp_path / "out", tmp_path / "run", tmp_path / "nano"
    build_nano.main(out=out)
    trained = HymbaForCausalLM.from_pretrained(out / "init")
    with torch.no_grad():
        trained.model.embed_tokens.weight.mul_(2)
    trained.save_pretrained(run / "model")
    rows = [{"step": 0, "eval_loss": 6.25}, {"step": 2, "loss": 5.0}, {"step": 3, "eval_loss": 4.125}]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))

    build_nano.install_model(run, out, folder)

    weights = load_file(folder / "model.safetensors")
    expected = load_file(run / "model" / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], tensor.bfloat16()) for name, tensor in expected.items())
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert (folder / "tokenizer.json").read_bytes() == (out / "init" / "tokenizer.json").read_bytes()
    card = (folder / "README.md").read_text()
    assert "4.125 nats a learned token (6.250 before training)" in card
    assert f"{trained.num_parameters():,} (bfloat16)" in card


def test_bits_per_byte_of_a_model_that_knows_nothing() -> None:
    tokenizer = AutoTokenizer.from_pretrained(build_nano.FOLDER)
    model = HymbaForCausalLM(HymbaConfig(**{**build_nano.NANO, **SMALL, "vocab_size": 4096})).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()  # the tied head then gives every token the same probability
    texts = ["Return a new list.", "é🙂"]
    tokens = sum(len(tokenizer(text).input_ids) - 1 for text in texts)
    size = sum(len(text.encode()) for text in texts)
    assert build_nano.bits_per_byte(model, tokenizer, texts) == pytest.approx(math.log2(4096) * tokens / size, rel=1e-5)


def test_recipe_trains_on_what_the_builder_writes() -> None:
    settings = yaml.safe_load(RECIPE.read_text())
    assert settings.pop("verb") == "sft"
    recipe = SFTConfig(**settings)
    assert recipe.model == "build/nano/init"
    assert recipe.data + recipe.eval_data == ["build/nano/corpus/train.jsonl", "build/nano/corpus/eval.jsonl"]
    assert recipe.method == "full"
