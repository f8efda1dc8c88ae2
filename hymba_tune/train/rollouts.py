"""TRL's GRPO trainer on answers that the kit's own batched generation samples, with rewards by name."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import Sampler, SequentialSampler
from trl import GRPOTrainer
from trl.trainer.utils import RepeatSampler

from hymba_tune.evaluate.rewards import RewardedAnswer, Rewards
from hymba_tune.generate import Generation, Sampling, evaluating, generate_texts
from hymba_tune.train.base import RunTrainer, keep_own_forward
from hymba_tune.train.callbacks import MORE
from hymba_tune.train.preference_trainers import quiet_trl

KEPT_ANSWERS = "answers.pt"
"""The file of a checkpoint with answers that further steps train on."""
COLUMNS = {
    "reward": "reward",
    "frac_reward_zero_std": "equal_groups",
    "completions/mean_length": "answer_tokens",
    "completions/clipped_ratio": "cut_answers",
    "entropy": "entropy",
    "kl": "kl",
    "clip_ratio/region_mean": "clipped",
    "cispo_clip_ratio": "clipped",
}
"""TRL's names of metrics, and the names of a run's columns."""
SHOWN_GROUPS = 2
"""The number of groups whose answers a report shows."""


class RolloutTrainer(RunTrainer, GRPOTrainer):
    """Trains on rows of ``prompt_ids``, ``question``, ``reference`` and ``place``.

    Attributes:
        groups: The last groups of answers, each with its prompt, its reference, and the rewards of each answer.
        differed: Whether the rewards within any group have differed so far.
        last_reward: The lowest reward of the last answers.
        cut_share: The share of the last answers that were cut at the maximum number of tokens.

    Args:
        rewards: The rewards of answers.
        answers_at_a_time: The most answers that are sampled in one batch.
        cuda_graphs: Whether steps of sampling are replayed as CUDA graphs.
        beta: The weight of the KL divergence from the model without its adapter.
        **kwargs: The arguments of TRL's trainer. Its ``beta`` must be 0: it would copy the adapter as the reference.
    """

    def __init__(
        self, *, rewards: Rewards, answers_at_a_time: int, cuda_graphs: bool, beta: float, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs, reward_funcs=[part.score for part in rewards.parts])
        keep_own_forward(self.accelerator.unwrap_model(self.model))
        self.reward_func_names = [part.label for part in rewards.parts]
        self.beta = beta
        self.groups: list[dict[str, Any]] = []
        self.differed = False
        self.last_reward = self.cut_share = 0.0
        self._rewards = rewards
        self._decoding: dict[str, Any] = {"batch_size": answers_at_a_time, "cuda_graphs": cuda_graphs}

    def held_out_sums(self, inputs: Any) -> dict[str, tuple[Tensor | float, Tensor | float]]:
        """Return the sums of the rewards of greedy answers to a batch of prompts; the loss is minus the reward."""
        rows: list[dict[str, Any]] = inputs
        ids = self._answer([row["prompt_ids"] for row in rows], [Sampling()] * len(rows))
        scores = self._rewards.scores(self._rewarded(rows, ids))
        totals = [self._rewards.total(row) for row in scores]
        sums: dict[str, tuple[Tensor | float, Tensor | float]] = {
            "loss": (-torch.tensor(totals), torch.ones(len(totals))),
            f"{MORE}reward": (sum(totals), len(rows)),
            f"{MORE}answer_tokens": (sum(map(len, ids)), len(rows)),
            f"{MORE}cut_answers": (sum(one[-1] not in self.eos_token_ids for one in ids), len(rows)),
        }
        if len(self._rewards.parts) > 1:
            for part, column in zip(self._rewards.parts, torch.tensor(scores).T, strict=True):
                sums[f"{MORE}reward/{part.label}"] = (column.nansum(), column.isfinite().sum())
        return sums

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the names of a run's columns instead of TRL's."""
        metrics = self._metrics["train"]
        names = {key: name for key, name in COLUMNS.items() if key in metrics}
        if len(self._rewards.parts) > 1:
            names |= {f"rewards/{part.label}/mean": f"reward/{part.label}" for part in self._rewards.parts}
        named = {f"{MORE}{name}": metrics[key] for key, name in names.items() if key in metrics}
        metrics.clear()
        metrics.update(named)
        super().log(logs, start_time)

    def _answer(self, prompts: Sequence[Sequence[int]], samplings: Sequence[Sampling]) -> list[list[int]]:
        """Generate an answer to each prompt with the adapter on; the model's mode does not change."""
        model = self.accelerator.unwrap_model(self.model)
        generations = [
            Generation(prompt, self.max_completion_length, sampling, number=number)
            for number, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True))
        ]
        with evaluating(model), self.accelerator.autocast():
            for _ in generate_texts(model, self._tokenizer, generations, **self._decoding):
                pass
        return [one.ids for one in generations]

    def _rewarded(self, rows: Sequence[dict[str, Any]], ids: Sequence[Sequence[int]]) -> list[RewardedAnswer]:
        texts = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [
            RewardedAnswer(row["question"], text.strip(), len(one), row["reference"])
            for row, text, one in zip(rows, texts, ids, strict=True)
        ]

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        # TRL would sample answers in an evaluation as well.
        return super()._prepare_inputs(generation_batch) if self.model.training else generation_batch

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        rows = [{**row, "prompt": row["prompt_ids"]} for row in inputs]
        with quiet_trl():
            output: dict[str, Any] = super()._generate_and_score_completions(rows)
        return output

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[Any], None, dict[str, Any]]:
        return prompts, None, {}  # they are encoded already

    def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any, **__: Any) -> tuple[list[list[int]], None]:
        # Seeds of the step's own, so that a resumed run samples the same answers.
        draw = random.Random(f"{self.args.seed} {self._step}")
        samplings = [Sampling(self.temperature, self.top_p, draw.getrandbits(62)) for _ in prompt_ids]
        return self._answer(prompt_ids, samplings), None

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: Any, completions: Any, completion_ids_list: list[list[int]]
    ) -> Tensor:
        """Return the rewards ``(answers, parts)``. TRL's own method knows no references."""
        del prompts, completions
        answers = self._rewarded(inputs, completion_ids_list)
        scores = self._rewards.scores(answers)
        totals = [self._rewards.total(row) for row in scores]
        size = self.num_generations
        self.groups = [
            {
                "prompt": answers[start].prompt,
                "reference": answers[start].reference,
                "answers": [one.text for one in answers[start : start + size]],
                "rewards": [self._rewards.in_words(row) for row in scores[start : start + size]],
            }
            for start in range(0, min(len(answers), SHOWN_GROUPS * size), size)
        ]
        self.differed |= any(len(set(totals[start : start + size])) > 1 for start in range(0, len(totals), size))
        self.last_reward = min(totals)
        self.cut_share = sum(ids[-1] not in self.eos_token_ids for ids in completion_ids_list) / len(answers)
        return torch.tensor(scores, dtype=torch.float32, device=self.accelerator.device)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        with self._at_temperature():
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    @contextmanager
    def _at_temperature(self) -> Iterator[None]:
        """Divide the logits by the sampling temperature, by way of the hidden states: the head has no bias."""
        base = getattr(self.accelerator.unwrap_model(self.model), "get_base_model", lambda: self.model)()
        hook = base.model.final_layernorm.register_forward_hook(lambda _, __, hidden: hidden / self.temperature)
        try:
            yield
        finally:
            hook.remove()

    def _get_train_sampler(self, dataset: datasets.Dataset | None = None) -> Sampler[int]:
        sampler: Sampler[int] = super()._get_train_sampler(dataset)
        sampler.__class__ = _PromptSampler
        return sampler

    def _get_eval_sampler(self, eval_dataset: datasets.Dataset) -> Sampler[int]:
        return SequentialSampler(eval_dataset)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self._step % (self.args.steps_per_generation * self.num_iterations):
            torch.save(self._buffered_inputs, Path(output_dir, KEPT_ANSWERS))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        # TRL begins to count anew, and would sample other answers.
        self._step = self.state.global_step * self.args.gradient_accumulation_steps
        if (kept := Path(checkpoint, KEPT_ANSWERS)).is_file():
            self._buffered_inputs = torch.load(kept, map_location=self.accelerator.device, weights_only=True)


class _PromptSampler(RepeatSampler):
    """TRL's sampler, with an order of prompts for each epoch that a resumed run finds again."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self.generator.manual_seed(self.seed + epoch)
