"""GRPO on small models: its gradient by the equation, its rollouts, what it records and refuses, and resuming."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
import trl
from torch import Tensor

from hymba_tune.adapters import open_model
from hymba_tune.checkpoint import load_tokenizer
from hymba_tune.config import ChatConfig, GRPOConfig, SFTConfig
from hymba_tune.data import encode_prompt, open_sources, sample_prompts, with_chat_template
from hymba_tune.errors import ConfigError, DataError, TrainingError
from hymba_tune.evaluate.rewards import RewardedAnswer, Rewards
from hymba_tune.generate import find_model, write
from hymba_tune.plan import plan
from hymba_tune.registry import resolve_model
from hymba_tune.train.grpo import RewardWatch, run_grpo
from hymba_tune.train.resuming import resume_config
from hymba_tune.train.rollouts import RolloutTrainer
from hymba_tune.train.run import Run
from hymba_tune.train.screen import Screen
from tests.rewarded import grpo, run_short, save_reward
from tests.runs import GRADIENT_STEP, same_tensors, save_questions
from tests.tolerances import FLOAT32_GRADIENT

TEMPERATURE = 0.7
SIMPLE_MEANS = {"dapo": False, "grpo": True}
"""Losses, and whether they average the mean of each answer, instead of all tokens."""


class Noting(Screen):
    """Records the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], list[int], float]]:
    """Every sampled answer of a test: the tokens of its prompt, its own, and its reward."""
    answers: list[tuple[list[int], list[int], float]] = []
    scored = RolloutTrainer._calculate_rewards

    def recorded(self: Any, inputs: Any, prompts: Any, completions: Any, ids: Any) -> Tensor:
        rewards = scored(self, inputs, prompts, completions, ids)
        answers.extend(
            (row["prompt_ids"], one, float(reward.sum())) for row, one, reward in zip(inputs, ids, rewards, strict=True)
        )
        return rewards

    monkeypatch.setattr(RolloutTrainer, "_calculate_rewards", recorded)
    return answers


def opened(folder: Path) -> Any:
    return open_model(resolve_model(str(folder)), dtype=torch.float32, device=torch.device("cpu")).eval()


def log_probs(model: Any, prompt: list[int], answer: list[int]) -> Tensor:
    """Log-probability of each token of an answer, at the temperature."""
    ids = torch.tensor([prompt + answer])
    scores = (model(input_ids=ids).logits[0, :-1] / TEMPERATURE).log_softmax(-1)
    return scores.gather(1, ids[0, 1:, None])[-len(answer) :, 0]


@pytest.mark.parametrize(("loss", "batch_size", "grad_accum"), [("dapo", 8, 1), ("dapo", 2, 4), ("grpo", 4, 2)])
def test_gradient_is_that_of_the_equation_however_answers_are_batched(
    loss: str, batch_size: int, grad_accum: int, small_model: Path, questions: Path, tmp_path: Path, sampled: Any
) -> None:
    changes = {**GRADIENT_STEP, "loss": loss, "batch_size": batch_size, "grad_accum": grad_accum}
    run = grpo(small_model, questions, tmp_path / "out", **changes, temperature=TEMPERATURE)
    model = opened(small_model).requires_grad_(True)
    rewards = torch.tensor([reward for *_, reward in sampled]).view(2, 4)
    advantages = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
    assert (advantages != 0).any()
    assert [sampled[0][0]] * 4 + [sampled[4][0]] * 4 == [prompt for prompt, *_ in sampled]
    terms = [a * log_probs(model, *ids) for a, (*ids, _) in zip(advantages, sampled, strict=True)]
    mean = torch.stack([term.mean() for term in terms]).mean() if SIMPLE_MEANS[loss] else torch.cat(terms).mean()
    (-mean).backward()
    after = dict(opened(run.model).named_parameters())
    moved = {name: (before - after[name]).detach() for name, before in model.named_parameters()}
    FLOAT32_GRADIENT.check_all(moved, {name: parameter.grad for name, parameter in model.named_parameters()})


def test_answers_are_those_of_the_adapter_at_that_step(
    small_model: Path, questions: Path, tmp_path: Path, sampled: Any
) -> None:
    reward = [save_reward(tmp_path), "length"]
    run = grpo(small_model, questions, tmp_path / "out", eval_data=[str(questions)], reward=reward, lr=0.1)
    assert len(sampled) == 16
    # The held-out answers of the trained adapter, generated anew from the finished run.
    found = find_model(str(run.path), ChatConfig(dtype="float32"))
    model, tokenizer = found.load(), found.tokenizer
    prompts = sample_prompts(open_sources([str(questions)]), 3)
    ids = [encode_prompt(prompt, tokenizer) for prompt, _ in prompts]
    ends = [tokenizer.eos_token_id]
    written = write(model, ids, ends=ends, max_new_tokens=6, temperature=0.0)
    texts = tokenizer.batch_decode(written, skip_special_tokens=True)
    answers = [
        RewardedAnswer("", text.strip(), len(one), reference)
        for text, one, (_, reference) in zip(texts, written, prompts, strict=True)
    ]
    rewards = Rewards(GRPOConfig(reward=reward, max_new_tokens=6, max_length=64))
    scores = rewards.scores(answers)
    first, *_, last = run.evaluations()
    assert last.more["eval_reward"] == pytest.approx(sum(map(sum, scores)) / 3)
    assert last.more["eval_reward/letters"] == pytest.approx(sum(score[0] for score in scores) / 3)
    assert last.eval_loss == pytest.approx(-last.more["eval_reward"], rel=1e-6)
    assert last.more["eval_reward"] != first.more["eval_reward"]


METHODS: dict[str, dict[str, Any]] = {
    "dropout": {"lora_dropout": 0.3},
    # The fourth step trains on the answers of the third, which the checkpoint between them holds.
    "iterations": {"iterations": 2, "save_every": 3, "beta": 0.1},
    "epochs": {"caps": [5], "eval_split": 0.0, "save_every": 3},  # an epoch has two steps
    "nf4_bfloat16": {"quantize": "nf4", "dtype": "bfloat16"},
}


@pytest.mark.parametrize("method", METHODS)
def test_resumed_equals_uninterrupted(method: str, small_model: Path, questions: Path, tmp_path: Path) -> None:
    changes = {"steps": 4, "save_every": 2, **METHODS[method]}
    whole = grpo(small_model, questions, tmp_path / "whole", **changes)
    killed = Path(shutil.copytree(whole.path, tmp_path / "killed"))
    for folder in ("adapter", "checkpoints/checkpoint-4"):
        shutil.rmtree(killed / folder, ignore_errors=True)
    finished = run_short(resume_config(GRPOConfig(resume=killed)))
    assert same_tensors(finished.adapter, whole.adapter)
    kept = ("loss", "eval_loss", "reward", "entropy", "eval_reward")
    rows = [
        [{k: v for k, v in row.as_columns().items() if k in kept} for row in run.rows()] for run in (finished, whole)
    ]
    assert rows[0] == rows[1]
    assert finished.facts()["tokens_seen"] == whole.facts()["tokens_seen"]
    groups = [json.loads((run.path / "rollouts.json").read_text()) for run in (finished, whole)]
    assert groups[0] == groups[1]


def test_epochs_have_different_orders(small_model: Path, questions: Path, tmp_path: Path, sampled: Any) -> None:
    changes = {"caps": [4], "eval_split": 0.0, "max_new_tokens": 1, "steps": None, "epochs": 3.0}
    run = grpo(small_model, questions, tmp_path / "out", **changes)
    assert run.facts()["steps"] == 6
    prompts = [tuple(prompt) for prompt, *_ in sampled][::4]
    epochs = [prompts[start : start + 4] for start in (0, 4, 8)]
    assert all(len(set(epoch)) == 4 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_run_records_rewards_by_part_and_shows_samples_with_them(
    small_model: Path, questions: Path, tmp_path: Path
) -> None:
    changes = {"reward": ["exact", save_reward(tmp_path)], "reward_weights": [1, 0.5], "beta": 0.1, "iterations": 2}
    run = grpo(small_model, questions, tmp_path / "out", report=True, **changes)
    first = next(row for row in run.rows() if row.loss is not None)
    assert first.more.keys() == {
        *("reward", "reward/exact", "reward/letters", "equal_groups", "answer_tokens", "cut_answers"),
        *("entropy", "kl", "clipped"),
    }
    assert first.more["reward"] == pytest.approx(first.more["reward/exact"] + 0.5 * first.more["reward/letters"])
    facts = run.facts()
    assert (facts["verb"], facts["data"]["prompts"]) == ("grpo", 24)
    assert facts["described"]["rewards"].startswith("exact + 0.5 × ")
    assert "runs its code, SHA-256" in facts["described"]["rewards"]
    samples = json.loads((run.path / "samples.json").read_text())
    assert all(
        set(sample) == {"prompt", "reference", *AROUND, *(f"reward {when}" for when in AROUND)} for sample in samples
    )
    assert "(exact 0, letters " in samples[0]["reward after"]
    page = (run.path / "report.html").read_text()
    for part in ("held-out reward", "Sampled answers with their rewards", "before · reward", "Reward by letters"):
        assert part in page
    card = (run.path / "README.md").read_text()
    assert "| held-out | step | reward | tokens of an answer |" in card


AROUND = ("before", "after")


@pytest.mark.parametrize("loss", ["dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo"])
def test_every_loss_trains(loss: str, small_model: Path, questions: Path, tmp_path: Path) -> None:
    importance = "sequence" if loss == "luspo" else "token"
    changes = {"loss": loss, "importance": importance, "eval_split": 0.0, "iterations": 2}
    run = grpo(small_model, questions, tmp_path / "out", **changes)
    assert run.facts()["steps"] == 2


def test_losses_are_those_that_trl_has() -> None:
    ours = get_args(GRPOConfig.model_fields["loss"].annotation)
    help_text = trl.GRPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    assert all(f"'{loss}':" in help_text or f"'{loss}' (default)" in help_text for loss in ours)
    assert help_text.count("': ") + help_text.count("(default): ") >= len(ours)


def test_int8_weights_can_be_sampled_from_and_trained_on(small_model: Path, questions: Path, tmp_path: Path) -> None:
    assert grpo(small_model, questions, tmp_path / "out", quantize="int8").facts()["steps"] == 2


# Rewards that do not differ: of a random model all answers are cut, and none is right.
def test_rewards_that_never_differ_are_refused(small_model: Path, questions: Path, tmp_path: Path) -> None:
    changes = {"reward": ["exact"], "steps": 20, "eval_split": 0.0, "max_new_tokens": 2, "save_every": 20}
    with pytest.raises(
        TrainingError, match=r"all answers to a prompt had the same reward \(80 answers\).*are cut at 2"
    ):
        grpo(small_model, questions, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("answers", "lowest", "cut", "cause"),
    [
        (["7", "7"], 0.0, 0.0, "answers to a prompt are all the same, at temperature 1"),
        (["8", "8 it is"], 1.0, 0.0, "every answer has the highest reward"),
        (["9", "5"], 0.0, 0.0, "either the model cannot do the task yet, or its answers have another form"),
    ],
)
def test_likely_cause_of_equal_rewards_is_named(
    answers: list[str], lowest: float, cut: float, cause: str, tmp_path: Path
) -> None:
    config = GRPOConfig(reward=["number"])
    group = {"prompt": "4 + 4?", "reference": "8", "answers": answers, "rewards": [str(lowest)] * 2}
    trainer: Any = SimpleNamespace(groups=[group], differed=False, last_reward=lowest, cut_share=cut)
    watch = RewardWatch(trainer, Run(tmp_path), Rewards(config), config)
    state: Any = SimpleNamespace(global_step=9)
    watch.on_step_end(None, state, None)  # type: ignore[arg-type]
    state.global_step = 10
    with pytest.raises(TrainingError, match=cause):
        watch.on_step_end(None, state, None)  # type: ignore[arg-type]
    trainer.differed = True
    watch.on_step_end(None, state, None)  # type: ignore[arg-type]


def test_data_that_does_not_fit_is_refused_before_weights_are_loaded(
    small_model: Path, questions: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="there are 1 prompts to train on, and a step takes 2"):
        grpo(small_model, questions, tmp_path / "out", caps=[1], eval_split=0.0)
    with pytest.raises(DataError, match=r"No reference answer in .*questions.* what the reward number compares"):
        grpo(small_model, questions, tmp_path / "out", reward=["number"])
    with pytest.raises(DataError, match="Nothing to answer in"):
        grpo(small_model, questions, tmp_path / "out", max_length=22, max_new_tokens=14)
    with pytest.raises(ConfigError, match=r"--reward .*rewards.py:gone: .* has no function gone.\n.*letters"):
        grpo(small_model, questions, tmp_path / "out", reward=[save_reward(tmp_path).replace("letters", "gone")])
    assert not (tmp_path / "out").exists()


def test_changed_reward_code_is_noted_on_resuming(small_model: Path, questions: Path, tmp_path: Path) -> None:
    run = grpo(small_model, questions, tmp_path / "out", save_every=1)
    with (tmp_path / "rewards.py").open("a") as file:
        file.write("# another version\n")
    screen = Noting()
    run_short(resume_config(GRPOConfig(resume=run.path)), screen)
    assert any(note.startswith("the rewards have changed since the run was started") for note in screen.notes)


def test_rollouts_by_cuda_graphs_are_those_without(
    small_model: Path, questions: Path, tmp_path: Path, graphs: list[Any]
) -> None:
    """Also with weights that training has changed, and in evaluations and samples."""
    runs = [grpo(small_model, questions, tmp_path / str(uses), cuda_graphs=uses) for uses in (False, True)]
    assert graphs
    for name in ("rollouts.json", "samples.json"):
        assert len({(run.path / name).read_text() for run in runs}) == 1
    assert len({str([row.as_columns().get("eval_reward") for row in run.rows()]) for run in runs}) == 1


def test_several_processes_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="hymba-tune grpo runs in a single process"):
        run_grpo(GRPOConfig(), Screen())


def test_plan_counts_rollouts(small_model: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"model": str(small_model), "max_length": 512, "batch_size": 1, "dtype": "float32"}
    few, many = (
        plan(GRPOConfig(**changes, reward=["exact"], grad_accum=512, rollout_batch=at_a_time)) for at_a_time in (8, 512)
    )
    assert many.parts.total > few.parts.total
    fixed = plan(GRPOConfig(**changes, reward=["exact"], grad_accum=512, rollout_batch=300, cuda_graphs=True))
    assert fixed.parts.total == many.parts.total  # a bucket of 512 texts
    texts = plan(SFTConfig(**changes, grad_accum=512))
    assert few.here.tokens_per_s < texts.here.tokens_per_s
    assert all(ours.tokens_per_s < theirs.tokens_per_s for ours, theirs in zip(few.gpus, texts.gpus, strict=True))
    data = save_questions(tmp_path / "questions.jsonl", count=20)
    length = plan(GRPOConfig(**changes, reward=["exact"], grad_accum=32, data=[str(data)], eval_split=0.0)).length
    assert length is not None
    assert length.steps == 20 * 8 / 32


def test_tokenizer_of_the_model_is_unchanged(small_model: Path, questions: Path, tmp_path: Path) -> None:
    run = grpo(small_model, questions, tmp_path / "out")
    assert load_tokenizer(run.adapter).get_vocab() == with_chat_template(load_tokenizer(small_model)).get_vocab()
