"""Runs of ORPO, against the equations of the paper (arXiv 2403.07691, section 4), one text at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from hymba_tune.adapters import open_model
from hymba_tune.checkpoint import load_tokenizer
from hymba_tune.config import ORPOConfig, SFTConfig
from hymba_tune.data import build_preferences, open_sources, with_chat_template
from hymba_tune.plan import plan
from hymba_tune.registry import resolve_model
from tests.preferences import orpo, save_pairs
from tests.runs import GRADIENT_STEP
from tests.tolerances import FLOAT32_GRADIENT

BETA = 0.3


@pytest.fixture(scope="module")
def four_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pairs(tmp_path_factory.mktemp("data") / "four.jsonl", 4)


def opened(folder: Path) -> Any:
    return open_model(resolve_model(str(folder)), dtype=torch.float32, device=torch.device("cpu")).eval()


def log_probs(model: Any, prompt: list[int], answer: list[int]) -> Tensor:
    """Log-probability of each token of a text but the first."""
    ids = torch.tensor([prompt + answer])
    return model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]


def pair_terms(folder: Path, pairs: Path) -> tuple[Any, list[dict[str, Tensor]]]:
    """A model, and the terms of the paper's loss for each pair of a file."""
    model = opened(folder).requires_grad_(True)
    tokenizer = with_chat_template(load_tokenizer(folder))
    rows, _ = build_preferences(open_sources([str(pairs)]), tokenizer, paired=True, max_length=512)
    terms = []
    for row in rows:
        chosen, rejected = (log_probs(model, row["prompt_ids"], row[f"{side}_ids"]) for side in ("chosen", "rejected"))
        likelihoods = {
            "chosen": chosen[-len(row["chosen_ids"]) :].mean(),
            "rejected": rejected[-len(row["rejected_ids"]) :].mean(),
        }
        odds = {side: value.double().exp() / (1 - value.double().exp()) for side, value in likelihoods.items()}
        odds_ratio = odds["chosen"] / odds["rejected"]
        terms.append(likelihoods | {"loss": -chosen.mean() - BETA * logsigmoid(odds_ratio.log())})
    return model, terms


@pytest.mark.parametrize(("batch_size", "grad_accum"), [(4, 1), (2, 2), (1, 4)])
def test_loss_and_gradient_are_those_of_the_paper_however_pairs_are_batched(
    batch_size: int, grad_accum: int, small_model: Path, four_pairs: Path, tmp_path: Path
) -> None:
    model, terms = pair_terms(small_model, four_pairs)
    loss = torch.stack([term["loss"] for term in terms]).mean()
    loss.backward()
    run = orpo(
        small_model,
        four_pairs,
        tmp_path / "out",
        batch_size=batch_size,
        grad_accum=grad_accum,
        **GRADIENT_STEP,
        beta=BETA,
    )
    assert run.rows()[-1].loss == pytest.approx(loss.item(), rel=1e-5)
    after = dict(opened(run.model).named_parameters())
    moved = {name: (before - after[name]).detach() for name, before in model.named_parameters()}
    FLOAT32_GRADIENT.check_all(moved, {name: parameter.grad for name, parameter in model.named_parameters()})


@pytest.mark.parametrize("batch_size", [1, 5])
def test_held_out_numbers_are_means_over_pairs_by_the_equation(
    batch_size: int, small_model: Path, four_pairs: Path, tmp_path: Path
) -> None:
    held_out = save_pairs(tmp_path / "held_out.jsonl", 7)
    run = orpo(
        small_model, four_pairs, tmp_path / "out", steps=1, eval_data=[str(held_out)], batch_size=batch_size, beta=BETA
    )
    _, terms = pair_terms(small_model, held_out)
    mean = {name: torch.stack([term[name] for term in terms]).mean().item() for name in terms[0]}
    right = [bool(term["chosen"] > term["rejected"]) for term in terms]
    first = run.rows()[0]
    assert first.eval_loss == pytest.approx(mean["loss"], rel=1e-5)
    assert first.eval_chosen_reward == pytest.approx(BETA * mean["chosen"], rel=1e-5)
    assert first.eval_rejected_reward == pytest.approx(BETA * mean["rejected"], rel=1e-5)
    assert first.eval_margin == pytest.approx(BETA * (mean["chosen"] - mean["rejected"]), abs=1e-6)
    assert first.eval_accuracy == pytest.approx(sum(right) / len(right))


def test_run_learns_to_rank_pairs_and_reports_its_objective(small_model: Path, tmp_path: Path) -> None:
    pairs = save_pairs(tmp_path / "pairs.jsonl")
    run = orpo(small_model, pairs, tmp_path / "out", steps=6, eval_data=[str(pairs)])
    first, last = run.rows()[0], run.rows()[-1]
    assert first.eval_loss is not None
    assert last.eval_loss is not None
    assert last.eval_loss < first.eval_loss
    assert last.eval_accuracy is not None
    assert last.eval_accuracy > 0.8
    facts = run.facts()
    assert (facts["verb"], facts["data"]["pairs"]) == ("orpo", 24)
    assert facts["described"]["loss"] == "ORPO, beta 0.1 · no reference model"
    assert isinstance(run.read_config(), ORPOConfig)
    page = (run.path / "report.html").read_text()
    assert "Preference training (ORPO)" in page
    assert "of the pairs ranked correctly" in page


def test_plan_counts_both_texts_of_a_pair(small_model: Path) -> None:
    settings = {"model": str(small_model), "max_length": 64, "batch_size": 2, "dtype": "float32"}
    pairs, texts = plan(ORPOConfig(**settings)), plan(SFTConfig(**settings))
    assert pairs.tokens_per_step == 2 * texts.tokens_per_step
    assert pairs.parts.activations > texts.parts.activations


def test_activation_offload_is_refused() -> None:
    with pytest.raises(ValueError, match="activation_offload: TRL's ORPO trainer keeps activations on the GPU"):
        ORPOConfig(activation_offload=True)
