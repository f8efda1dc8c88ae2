"""Runs on preferences: DPO on pairs, KTO on labeled answers."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import trl
from torch.nn.functional import logsigmoid

from hymba_tune.adapters import open_model
from hymba_tune.checkpoint import load_tokenizer
from hymba_tune.config import ChatConfig, DPOConfig, KTOConfig, ORPOConfig, SFTConfig
from hymba_tune.data import build_preferences, open_sources, with_chat_template
from hymba_tune.errors import ConfigError, DataError
from hymba_tune.generate import Chat
from hymba_tune.registry import resolve_model
from hymba_tune.train.card import write_card
from hymba_tune.train.margin import MarginWatch
from hymba_tune.train.orpo import run_orpo
from hymba_tune.train.preference import run_dpo
from hymba_tune.train.resuming import resume_config
from hymba_tune.train.run import Run
from hymba_tune.train.screen import MetricsRow, Screen
from tests.preferences import dpo, kto, orpo, reward, run_short, save_labeled, save_pairs
from tests.runs import merge_run, same_tensors, tensors


class Notes(Screen):
    """Records the banner and the notes."""

    def __init__(self) -> None:
        self.lines: dict[str, str] = {}
        self.notes: list[str] = []

    def banner(self, lines: dict[str, str]) -> None:
        self.lines = lines

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl")


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_labeled(tmp_path_factory.mktemp("data") / "labeled.jsonl")


@pytest.fixture(scope="module")
def preferred(finished_run: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps of DPO from a run of SFT, whose adapter is merged."""
    out = tmp_path_factory.mktemp("runs") / "preferred"
    return dpo(finished_run, pairs, out, steps=8, eval_split=0.25, eval_every=4, save_every=4).path


def log_probs(model: Any, pairs: Path, folder: Path) -> torch.Tensor:
    """``(N, 2)``: of the better and the worse answer of each pair, one text at a time, from plain logits."""
    tokenizer = with_chat_template(load_tokenizer(folder))
    rows, _ = build_preferences(open_sources([str(pairs)]), tokenizer, paired=True, max_length=512)
    sums = []
    for row in rows:
        for answer in (row["chosen_ids"], row["rejected_ids"]):
            ids = torch.tensor([row["prompt_ids"] + answer])
            with torch.no_grad():
                scores = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            sums.append(scores[-len(answer) :].sum())
    return torch.stack(sums).view(-1, 2)


def opened(path: Path | str) -> Any:
    return open_model(resolve_model(str(path)), dtype=torch.float32, device=torch.device("cpu")).eval()


def test_run_records_its_metrics_and_settings(preferred: Path, finished_run: Path) -> None:
    rows = Run(preferred).rows()
    assert (rows[0].step, rows[0].eval_margin, rows[0].eval_accuracy) == (0, 0.0, 0.0)
    assert rows[0].eval_loss == pytest.approx(0.6931, abs=1e-4)
    last = rows[-1]
    assert last.eval_accuracy == 1.0
    assert last.eval_margin is not None
    assert last.eval_chosen_reward is not None
    assert last.eval_rejected_reward is not None
    assert last.eval_margin == pytest.approx(last.eval_chosen_reward - last.eval_rejected_reward)
    assert last.eval_margin > 0.2
    trained = [row for row in rows if row.loss is not None]
    assert [row.step for row in trained] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert all(row.margin is not None and row.accuracy is not None for row in trained)
    facts = Run(preferred).facts()
    assert (facts["verb"], facts["model"], facts["data"]["pairs"]) == ("dpo", str(finished_run), 24)
    card = (preferred / "README.md").read_text()
    assert "| held-out | step | loss | accuracy | margin of rewards |" in card
    assert re.search(r"\| after \| 8 \| [\d.]+ \| 1\.0000 \|", card)
    assert "24 pairs" in card


def test_samples_are_answered_before_and_after(preferred: Path) -> None:
    samples = json.loads((preferred / "samples.json").read_text())
    assert len(samples) == 3
    assert all(sample.keys() == {"prompt", "reference", "before", "after"} for sample in samples)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_evaluation_is_the_mean_over_pairs_by_the_equation(
    batch_size: int, preferred: Path, finished_run: Path, pairs: Path, tmp_path: Path
) -> None:
    run = dpo(finished_run, pairs, tmp_path / "out", steps=2, eval_data=[str(pairs)], batch_size=batch_size, beta=0.3)
    before = log_probs(opened(finished_run), pairs, preferred / "adapter")
    after = log_probs(opened(run.path), pairs, preferred / "adapter")
    rewards = 0.3 * (after - before)
    margins = rewards[:, 0] - rewards[:, 1]
    last = run.rows()[-1]
    assert last.eval_loss == pytest.approx(-logsigmoid(margins).mean().item(), abs=1e-5)
    assert last.eval_margin == pytest.approx(margins.mean().item(), abs=1e-4)
    assert last.eval_accuracy == pytest.approx((margins > 0).float().mean().item(), abs=1e-6)
    assert last.eval_chosen_reward == pytest.approx(rewards[:, 0].mean().item(), abs=1e-4)


def test_evaluation_of_several_sources_is_the_mean_over_the_pairs_of_each_and_of_all(
    finished_run: Path, pairs: Path, tmp_path: Path
) -> None:
    few = save_pairs(tmp_path / "few.jsonl", 2)
    row = dpo(finished_run, pairs, tmp_path / "out", eval_data=[str(few), str(pairs)]).rows()[-1]
    losses = row.source_losses
    assert list(losses) == ["few.jsonl", "pairs.jsonl"]
    assert len(set(losses.values())) == 2
    assert row.eval_loss == pytest.approx((2 * losses["few.jsonl"] + 24 * losses["pairs.jsonl"]) / 26, rel=1e-9)


def test_precomputed_reference_equals_the_one_computed_with_the_batch(
    small_model: Path, pairs: Path, tmp_path: Path
) -> None:
    one = dpo(small_model, pairs, tmp_path / "one", steps=3)
    other = dpo(small_model, pairs, tmp_path / "other", steps=3, reference="precompute")
    a, b = tensors(one.adapter), tensors(other.adapter)
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name], atol=2e-4, rtol=1e-3)


def test_run_on_a_run_opens_merges_and_chats(preferred: Path, finished_run: Path, tmp_path: Path) -> None:
    config = json.loads((preferred / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(finished_run)
    folder = merge_run(preferred, tmp_path / "merged")
    ids = torch.arange(3, 40)[None]
    whole, layered = opened(folder)(input_ids=ids).logits, opened(preferred)(input_ids=ids).logits
    torch.testing.assert_close(whole, layered, atol=1e-5, rtol=0)
    assert not torch.allclose(whole, opened(finished_run)(input_ids=ids).logits, atol=1e-3)
    answers = [
        Chat(ChatConfig(model=str(name), temperature=0, max_new_tokens=6, dtype="float32")).reply("I see one cat.")
        for name in (preferred, folder)
    ]
    assert answers[0] == answers[1]


def test_adapter_of_a_run_is_trained_further(finished_run: Path, pairs: Path, tmp_path: Path) -> None:
    notes = Notes()
    run = dpo(finished_run, pairs, tmp_path / "out", notes, rank=4, start="continue", steps=1, lr=1e-9)
    assert notes.lines["start"] == "finished: its adapter is trained on"
    assert "computed once, before training" in notes.lines["reference"]
    assert run.facts()["model"] == Run(finished_run).facts()["model"]
    before, after = tensors(finished_run / "adapter"), tensors(run.adapter)
    for name, tensor in before.items():  # nothing but the one adapter is saved, and it began as the run's
        torch.testing.assert_close(after[name], tensor, atol=1e-6, rtol=0)
    assert before.keys() == after.keys()
    first = run.rows()[0]
    assert first.eval_margin == 0.0


def test_start_continue_needs_an_adapter_with_the_same_settings(
    small_model: Path, finished_run: Path, pairs: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"--start continue: .*small is not a run with an adapter to train further"):
        dpo(small_model, pairs, tmp_path / "out", start="continue")
    with pytest.raises(ConfigError, match=r"trains the adapter of .*finished further; rank cannot change\."):
        dpo(finished_run, pairs, tmp_path / "out", start="continue", rank=8)


METHODS: dict[str, tuple[Callable[..., Run], dict[str, Any]]] = {
    "lora_dropout": (dpo, {"lora_dropout": 0.3, "grad_accum": 2}),
    "full": (dpo, {"method": "full", "lr": 1e-3}),
    "continue": (dpo, {"start": "continue"}),
    "orpo": (orpo, {"lora_dropout": 0.3, "grad_accum": 2}),
    "reward": (reward, {"grad_accum": 2}),
}


@pytest.mark.parametrize("method", METHODS)
def test_resumed_equals_uninterrupted(
    method: str, small_model: Path, finished_run: Path, pairs: Path, tmp_path: Path
) -> None:
    model = finished_run if method == "continue" else small_model
    train, changes = METHODS[method]
    whole = train(model, pairs, tmp_path / "whole", steps=4, save_every=2, eval_every=2, **changes)
    killed = Path(shutil.copytree(whole.path, tmp_path / "killed"))
    for folder in ("adapter", "model", "checkpoints/checkpoint-4"):
        shutil.rmtree(killed / folder, ignore_errors=True)
    finished = run_short(resume_config(type(whole.read_config())(resume=killed)))
    results = [run.model if run.model.is_dir() else run.adapter for run in (finished, whole)]
    assert same_tensors(*results)
    names = ("step", "loss", "eval_loss", "margin", "eval_margin")
    numbers = [[[getattr(row, name) for name in names] for row in run.rows()] for run in (finished, whole)]
    assert numbers[0] == numbers[1]


def test_run_is_resumed_by_its_own_verb(preferred: Path, finished_run: Path, pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"preferred is a run of hymba-tune dpo, not of sft\.\n.*hymba-tune dpo --res"
    ):
        resume_config(SFTConfig(resume=preferred))
    with pytest.raises(ConfigError, match="is a run of hymba-tune sft, not of kto"):
        resume_config(KTOConfig(resume=finished_run))
    torn = Path(shutil.copytree(preferred, tmp_path / "torn"))
    changed = save_pairs(tmp_path / "pairs.jsonl", count=9)
    config = (torn / "config.yaml").read_text().replace(str(pairs), str(changed))
    (torn / "config.yaml").write_text(config)
    with pytest.raises(DataError, match="has changed since the run was started"):
        run_dpo(resume_config(DPOConfig(resume=torn)), Screen())


LOSSES = get_args(DPOConfig.model_fields["loss"].annotation)


def test_losses_are_those_that_trl_has() -> None:
    documented = re.search(r"loss_type \(.*?Possible values are: (.*?)\. If", trl.DPOConfig.__doc__ or "", re.DOTALL)
    assert documented
    assert set(LOSSES) == set(re.findall(r"'(\w+)'", documented[1]))


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains(loss: str, small_model: Path, pairs: Path, tmp_path: Path) -> None:
    smoothing = 0.1 if loss in ("robust", "exo_pair") else 0.0
    run = dpo(small_model, pairs, tmp_path / "out", loss=loss, label_smoothing=smoothing, eval_split=0)
    assert run.rows()[-1].loss is not None


def test_kto_learns_from_labeled_answers(small_model: Path, judged: Path, tmp_path: Path) -> None:
    notes = Notes()
    run = kto(small_model, judged, tmp_path / "out", notes, steps=6, eval_data=[str(judged)])
    assert "16 good answers and 8 bad ones" in notes.lines["data"]
    first, last = run.rows()[0], run.rows()[-1]
    assert first.eval_margin == pytest.approx(0.0, abs=1e-5)
    assert last.eval_margin is not None
    assert last.eval_margin > 0.5
    assert last.eval_accuracy is not None
    assert last.eval_accuracy > 0.6
    assert all(row.accuracy is not None for row in run.rows() if row.loss is not None)
    facts = run.facts()
    assert (facts["verb"], facts["data"]["good"], facts["data"]["bad"]) == ("kto", 16, 8)
    assert isinstance(run.read_config(), KTOConfig)


def test_kto_warns_of_answers_of_one_kind(small_model: Path, judged: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in judged.read_text().splitlines()]
    (tmp_path / "one.jsonl").write_text("".join(json.dumps({**row, "label": False}) + "\n" for row in rows))
    notes = Notes()
    kto(small_model, tmp_path / "one.jsonl", tmp_path / "out", notes, steps=1, eval_split=0)
    assert [text for text in notes.notes if text.startswith("every answer is labeled bad: KTO compares")]


def test_card_of_answers_that_are_all_good_or_all_bad_has_no_margin_and_no_nats(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for step, loss in enumerate((0.5, 0.4)):
        run.log(MetricsRow(step, eval_loss=loss, eval_accuracy=0.75, eval_rejected_reward=-0.1))
    run.record(kept={"step": 1}, data={"rows": 4, "fingerprint": "ab"}, steps=1, tokens_seen=9)
    write_card(run, KTOConfig(data=["labeled.jsonl"]), ["4 answers"])
    assert "| held-out | step | loss | accuracy |\n" in (run.path / "README.md").read_text()


@pytest.mark.parametrize("reference", ["adapter-off", "precompute"])
def test_kto_evaluation_is_the_mean_over_answers(
    reference: str, small_model: Path, pairs: Path, tmp_path: Path
) -> None:
    settings = {"loss": "apo_zero_unpaired", "batch_size": 5, "reference": reference}
    run = kto(small_model, pairs, tmp_path / "out", eval_data=[str(pairs)], **settings)
    after, before = (log_probs(opened(model), pairs, small_model) for model in (run.path, small_model))
    rewards = 0.1 * (after - before)
    losses = torch.stack([1 - rewards[:, 0].sigmoid(), rewards[:, 1].sigmoid()])
    last = run.rows()[-1]
    assert last.eval_loss == pytest.approx(losses.mean().item(), abs=1e-5)
    assert last.eval_chosen_reward == pytest.approx(rewards[:, 0].mean().item(), abs=1e-4)
    assert last.eval_rejected_reward == pytest.approx(rewards[:, 1].mean().item(), abs=1e-4)
    right = torch.cat([rewards[:, 0] > 0, rewards[:, 1] < 0])
    assert 0 < right.float().mean() < 1
    assert last.eval_accuracy == pytest.approx(right.float().mean().item(), abs=1e-6)


def test_kto_accuracy_compares_with_the_divergence_from_the_reference(
    small_model: Path, pairs: Path, tmp_path: Path
) -> None:
    """All held-out answers are one batch, so that there is one estimate of the divergence."""
    settings = {"batch_size": 48, "steps": 3, "desirable_weight": 50.0}
    run = kto(small_model, pairs, tmp_path / "out", eval_data=[str(pairs)], **settings)
    after, before = (log_probs(opened(model), pairs, small_model) for model in (run.path, small_model))
    state = json.loads((run.checkpoints / "checkpoint-3" / "trainer_state.json").read_text())
    divergence = next(row["eval_kl"] for row in reversed(state["log_history"]) if "eval_kl" in row)
    assert divergence > 0.1
    beyond = after - before - divergence
    right = torch.cat([beyond[:, 0] > 0, beyond[:, 1] < 0]).float().mean().item()
    assert run.rows()[-1].eval_accuracy == pytest.approx(right, abs=1e-6)
    losses = torch.stack([50 * (-0.1 * beyond[:, 0]).sigmoid(), (0.1 * beyond[:, 1]).sigmoid()])
    assert run.rows()[-1].eval_loss == pytest.approx(losses.mean().item(), rel=1e-4)
    parts = json.loads((run.path / "held_out.jsonl").read_text().splitlines()[-1])
    assert (len(parts["sums"]), set(parts["counts"])) == (losses.numel(), {1})


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (
            DPOConfig,
            {"label_smoothing": 0.1},
            "label_smoothing: the sigmoid loss has none; use one of robust, exo_pair",
        ),
        (DPOConfig, {"loss": "exo_pair"}, "label_smoothing: the exo_pair loss needs it"),
        (DPOConfig, {"packing": True}, "packing: preferences cannot be packed"),
        (DPOConfig, {"method": "full", "reference": "adapter-off"}, "reference: --method full has no new adapter"),
        (DPOConfig, {"start": "continue", "reference": "adapter-off"}, "reference: --start continue has no new"),
        (KTOConfig, {"batch_size": 1}, "batch_size: the kto loss compares the answers of a batch"),
    ],
)
def test_settings_that_do_not_go_together(kind: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**settings)


def test_missing_data_is_not_offered_the_demo() -> None:
    with pytest.raises(ConfigError, match=r"--data is missing\.\n  expected   a file or a Hub dataset$"):
        run_dpo(DPOConfig(), Screen())
    with pytest.raises(ConfigError, match=r"--data is missing\.\n  expected   a file or a Hub dataset$"):
        run_orpo(ORPOConfig(), Screen())


def logged(watch: MarginWatch, margins: dict[int, float]) -> None:
    for step, margin in margins.items():
        state = type("State", (), {"global_step": step})
        watch.on_log(type("Args", (), {"learning_rate": 1e-6}), state, None, {"rewards/margins": margin})  # type: ignore[arg-type]


def test_margin_that_does_not_move_is_explained_once() -> None:
    notes = Notes()
    watch = MarginWatch(beta=0.1, identical=0.25, screen=notes)
    logged(watch, {10: 0.0001, 20: -0.0004, 30: 0.0})
    assert len(notes.notes) == 1
    for part in ("has not moved in 20 steps (-0.0004)", "--lr 1e-05", "--targets all", "in 25% of the rows"):
        assert part in notes.notes[0]


@pytest.mark.parametrize("margins", [{10: 0.2, 20: 0.0}, {10: 0.0001}, {20: -0.3, 30: 0.0}])
def test_margin_that_moves_or_may_still_move_is_not_noted(margins: dict[int, float]) -> None:
    notes = Notes()
    logged(MarginWatch(beta=0.1, identical=0.0, screen=notes), margins)
    assert not notes.notes


def test_learning_rate_far_too_low_is_noticed(small_model: Path, pairs: Path, tmp_path: Path) -> None:
    notes = Notes()
    dpo(small_model, pairs, tmp_path / "out", notes, steps=21, lr=1e-8, eval_split=0, log_every=10, batch_size=2)
    assert [note for note in notes.notes if "The margin has not moved in 20 steps" in note]
