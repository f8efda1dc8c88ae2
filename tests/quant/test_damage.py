from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import kl_div

from hymba_tune.checkpoint import load_tokenizer, load_weights
from hymba_tune.config import Scheme
from hymba_tune.data import Encoded, open_sources
from hymba_tune.data.dataset import IGNORED
from hymba_tune.evaluate.texts import ScoringTexts, TextCounts
from hymba_tune.quant import Damage, compare, damage_page, quantize_model, refer, weight_errors
from hymba_tune.quant.damage import KindError, QuantizationDrift
from hymba_tune.registry import ModelSource
from hymba_tune.schemes import quantization, reasons
from tests.browser import DESK, PHONE, Browser
from tests.runs import SMALL
from tests.tiny import random_texts

CPU = torch.device("cpu")


def silent(_: int) -> None:
    """Stands where progress is shown."""


@pytest.fixture(scope="module")
def model(wide_model: Path) -> Any:
    return load_weights(ModelSource("model", wide_model), dtype=torch.float32, device=CPU).eval()


@pytest.fixture(scope="module")
def made(model: Any) -> dict[Scheme, Any]:
    return {each: quantize_model(model, quantization(model.config, each, torch.float32)).eval() for each in Scheme}


@pytest.fixture(scope="module")
def rows() -> list[Encoded]:
    """Of different lengths, the first part of each only read."""
    texts = [text.tolist() for text in random_texts([5, 23, 2, 40, 11], SMALL["vocab_size"])]
    return [Encoded(ids, [IGNORED] * (len(ids) // 3) + ids[len(ids) // 3 :]) for ids in texts]


def naive(model: Any, made: Any, rows: list[Encoded]) -> QuantizationDrift:
    """A row at a time, all logits at once, a token after the other."""
    kl, before, after, same = [], [], [], []
    for row in rows:
        p, q = (each(torch.tensor([row.input_ids])).logits[0].detach().log_softmax(-1) for each in (model, made))
        for place, label in enumerate(row.labels):
            if label != IGNORED and place:
                kl.append(kl_div(q[place - 1], p[place - 1], reduction="sum", log_target=True))
                before.append(-p[place - 1, label])
                after.append(-q[place - 1, label])
                same.append(float(p[place - 1].argmax() == q[place - 1].argmax()))
    return QuantizationDrift(*(float(sum(each) / len(each)) for each in (kl, before, after, same)))


@pytest.mark.parametrize("scheme", [Scheme.nf4, Scheme.fp4])
def test_drift_is_the_mean_over_tokens_whatever_the_batches(
    scheme: Scheme, model: Any, made: dict[Scheme, Any], rows: list[Encoded], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hymba_tune.quant.damage.BATCH", 30)
    monkeypatch.setattr("hymba_tune.quant.damage.CHUNK", 7)
    reference = refer(model, rows, silent)
    assert [len(batch) for batch in reference.rows] == [3, 1, 1]
    found, expected = compare(reference, made[scheme], silent), naive(model, made[scheme], rows)
    for name in ("kl", "loss_before", "loss_after", "same"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-4), name
    assert found.kl > 1e-4
    assert found.rise == pytest.approx(math.exp(found.loss_after) / math.exp(found.loss_before) - 1)


def test_a_model_does_not_drift_from_itself(model: Any, rows: list[Encoded]) -> None:
    found = compare(refer(model, rows, silent), model, silent)
    assert (found.kl, found.same, found.risen) == (0, 1, "+0.00 %")
    assert found.perplexity_before == found.perplexity_after == pytest.approx(math.exp(found.loss_before))


def test_weight_errors_are_those_of_the_dequantized_model(model: Any, made: dict[Scheme, Any]) -> None:
    for scheme in Scheme:
        errors = weight_errors(model, made[scheme])
        assert errors.keys() == {"in_proj", "out_proj", "gate_proj", "up_proj", "down_proj"}
        again = quantize_model(model, quantization(model.config, scheme, torch.float32)).dequantize(torch.float32)
        for kind, error in errors.items():
            pairs = [
                (held, again.state_dict()[name])
                for name, held in model.state_dict().items()
                if name.endswith(f".{kind}.weight")
            ]
            changed = sum(float((new - old).double().square().sum()) for old, new in pairs)
            whole = sum(float(old.double().square().sum()) for old, _ in pairs)
            assert error.error == pytest.approx(math.sqrt(changed / whole), rel=1e-4)
            assert (error.modules, error.weights) == (len(pairs), sum(old.numel() for old, _ in pairs))
            assert error.bytes_before == 4 * error.weights
            few = 1 if scheme is Scheme.int8 else 0.5
            assert few * error.weights < error.bytes_after < few * error.weights + 0.3 * error.bytes_before
        assert (errors["in_proj"].error < 0.02) == (scheme is Scheme.int8)


def test_everything_that_is_kept_has_a_reason(model: Any, small_model: Path) -> None:
    config = quantization(model.config, Scheme.nf4, torch.float32, ["down_proj"])
    why = reasons(model.config, config, ["down_proj"])
    assert why["down_proj"] == "excluded by --skip"
    assert {"lm_head", "embed_tokens", "memory_tokens", "x_proj.0", "dt_proj.0", "conv1d", "A_log.0"} <= why.keys()
    small = load_weights(ModelSource("model", small_model), dtype=torch.float32, device=CPU).config
    why = reasons(small, quantization(small, Scheme.nf4, torch.float32))
    assert why["gate_proj"] == "is 48 × 32, not a multiple of 32 rows and 64 columns"
    assert why["lm_head"] == "shares its weight with the embeddings"


def test_a_sample_takes_from_every_source(small_model: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": f"All about {name}, word by word."}) + "\n")
    line = json.dumps({"text": "Some words, one after the other."}) + "\n"
    (tmp_path / "many.jsonl").write_text(line * 500)
    tokenizer = load_tokenizer(small_model)
    paths = [str(tmp_path / name) for name in ("one.jsonl", "many.jsonl", "two.jsonl")]
    rows, counts = ScoringTexts(open_sources(paths), tokenizer, 64).sample(120)
    few = ScoringTexts(open_sources([paths[0]]), tokenizer, 64).count().tokens
    assert 80 + few <= counts.tokens < 90 + few
    assert counts.tokens == sum(row.encoded.learned for row in rows)
    assert counts.parts == len(rows)
    whole, all_counts = ScoringTexts(open_sources(paths[::2]), tokenizer, 64).sample(10**6)
    assert len(whole) == 2
    assert all_counts.fingerprint == ScoringTexts(open_sources(paths[::2]), tokenizer, 64).count().fingerprint


@pytest.mark.parametrize(("width", "dark"), [(PHONE, True), (DESK, False)])
def test_page_shows_all_figures(width: int, dark: bool, browser: Browser, tmp_path: Path) -> None:
    kinds = {
        name: KindError(3, 10**6, 2 * 10**6, 10**6, error) for name, error in (("in_proj", 0.09), ("down_proj", 0.1))
    }
    damage = Damage(
        model="<b>mine</b>",
        scheme=Scheme.nf4,
        dtype="bfloat16",
        kept={"lm_head": "shares its weight with the embeddings"},
        kinds=kinds,
        drift=QuantizationDrift(0.0123, 2.0, 2.01, 0.953),
        data=["words.jsonl"],
        texts=TextCounts(rows=3, tokens=8192),
        weight_bytes=(3 * 2**30, 2**30),
        file_bytes=(3 * 2**30, 2**30),
    )
    page = tmp_path / "damage.html"
    page.write_text(damage_page(damage))
    seen = browser.look(page, width, dark=dark)
    assert not [*seen.complaints, *seen.requests, *seen.over]
    assert [plot.title for plot in seen.plots] == ["How far the weights moved, by kind of module"]
    assert not [plot for plot in seen.plots if plot.clipped or plot.meet or not plot.paths]
    for text in ("<b>mine</b>", "7.389 → 7.463 (+1.01 %)", "0.0123", "95.3 %", "3.0 GB before", "shares its weight"):
        assert text in seen.text
