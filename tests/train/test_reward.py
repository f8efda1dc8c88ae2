"""Runs of reward models, against the loss of Bradley and Terry, one text at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification

from hymba_tune.checkpoint import load_config, load_tokenizer
from hymba_tune.config import DPOConfig, RewardConfig
from hymba_tune.data import build_preferences, open_sources, with_chat_template
from hymba_tune.errors import CheckpointError, ConfigError
from hymba_tune.plan import plan
from hymba_tune.registry import resolve_model
from hymba_tune.train import flow
from hymba_tune.train.run import Run
from tests.preferences import reward, save_pairs
from tests.runs import GRADIENT_STEP
from tests.tolerances import FLOAT32_GRADIENT

CENTERED = 0.05


@pytest.fixture(scope="module")
def four_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pairs(tmp_path_factory.mktemp("data") / "four.jsonl", 4)


@pytest.fixture(scope="module")
def trained(small_model: Path, four_pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with an adapter that is evaluated on its own rows."""
    out = tmp_path_factory.mktemp("run") / "reward"
    return reward(small_model, four_pairs, out, steps=6, eval_data=[str(four_pairs)])


def scores(model: Any, folder: Path, pairs: Path) -> tuple[Tensor, Tensor]:
    """The scores of better and worse texts, each computed alone."""
    tokenizer = with_chat_template(load_tokenizer(folder))
    rows, _ = build_preferences(open_sources([str(pairs)]), tokenizer, paired=True, max_length=512)
    better, worse = (
        torch.stack([model(torch.tensor([row["prompt_ids"] + row[side]])).logits[0, 0] for row in rows])
        for side in ("chosen_ids", "rejected_ids")
    )
    return better, worse


@pytest.mark.parametrize(("batch_size", "grad_accum"), [(4, 1), (1, 4)])
def test_loss_and_gradient_are_those_of_the_formula_however_pairs_are_batched(
    batch_size: int,
    grad_accum: int,
    small_model: Path,
    four_pairs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened = flow._open
    monkeypatch.setattr(flow, "_open", lambda setup: _saved(opened(setup), tmp_path / "before"))
    run = reward(
        small_model,
        four_pairs,
        tmp_path / "out",
        batch_size=batch_size,
        grad_accum=grad_accum,
        **GRADIENT_STEP,
        center_rewards=CENTERED,
    )

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "before").eval()
    better, worse = scores(model, small_model, four_pairs)
    loss = -logsigmoid(better - worse).mean() + CENTERED * (better + worse).square().mean()
    loss.backward()
    assert run.rows()[-1].loss == pytest.approx(loss.item(), rel=1e-5)
    after = dict(AutoModelForSequenceClassification.from_pretrained(run.model).named_parameters())
    moved = {name: (before - after[name]).detach() for name, before in model.named_parameters()}
    FLOAT32_GRADIENT.check_all(moved, {name: parameter.grad for name, parameter in model.named_parameters()})


def _saved(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder)
    return model


# PEFT reads an attribute that transformers has deprecated.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_held_out_numbers_are_those_of_the_adapter_that_plain_peft_loads(
    trained: Run, small_model: Path, four_pairs: Path
) -> None:
    model = AutoPeftModelForSequenceClassification.from_pretrained(trained.adapter, num_labels=1).eval()
    with torch.no_grad():
        better, worse = scores(model, small_model, four_pairs)
    last = trained.rows()[-1]
    assert last.eval_loss == pytest.approx(-logsigmoid(better - worse).mean().item(), rel=1e-4)
    assert last.eval_chosen_reward == pytest.approx(better.mean().item(), rel=1e-4)
    assert last.eval_rejected_reward == pytest.approx(worse.mean().item(), rel=1e-4)
    assert last.eval_margin == pytest.approx((better - worse).mean().item(), rel=1e-4)
    assert last.eval_accuracy == (better > worse).float().mean().item()


def test_run_learns_to_rank_pairs_and_says_how_to_score(trained: Run) -> None:
    first, last = trained.rows()[0], trained.rows()[-1]
    assert first.eval_loss is not None
    assert last.eval_loss is not None
    assert last.eval_loss < first.eval_loss
    assert last.eval_accuracy == 1.0
    assert all(row.margin is not None and row.accuracy is not None for row in trained.rows() if row.loss is not None)
    assert not (trained.path / "samples.json").exists()
    assert "Reward model" in (trained.path / "report.html").read_text()
    card = (trained.path / "README.md").read_text()
    program = card.split("```python\n")[1].split("```")[0]
    assert "AutoPeftModelForSequenceClassification" in program
    compile(program, "README.md", "exec")


def test_bfloat16_scores_are_float32(small_model: Path, four_pairs: Path, tmp_path: Path) -> None:
    run = reward(small_model, four_pairs, tmp_path / "out", dtype="bfloat16", eval_data=[str(four_pairs)])
    margin = run.rows()[0].eval_margin
    assert margin is not None
    assert torch.tensor(margin).bfloat16().item() != margin


def test_what_writes_refuses_a_model_that_scores(trained: Run, small_model: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"adapter is the adapter of a model that scores texts and writes none"):
        reward(trained.path, save_pairs(tmp_path / "pairs.jsonl"), tmp_path / "again")
    folder = tmp_path / "whole"
    folder.mkdir()
    config = json.loads((small_model / "config.json").read_text())
    config |= {"architectures": ["HymbaForSequenceClassification"]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"whole is a model that scores texts and writes none"):
        load_config(resolve_model(str(folder)))


def test_training_does_not_start_from_an_adapter_that_other_libraries_cannot_open(
    finished_run: Path, four_pairs: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"finished is an adapter, (.|\n)*hymba-tune merge .*finished --out merged"):
        reward(finished_run, four_pairs, tmp_path / "out")


def test_plan_counts_no_head_and_no_reference(small_model: Path) -> None:
    settings = {"model": str(small_model), "max_length": 64, "batch_size": 2, "dtype": "float32"}
    scored, compared = plan(RewardConfig(**settings)), plan(DPOConfig(**settings))
    assert scored.tokens_per_step == compared.tokens_per_step
    assert scored.parts.head < compared.parts.head
