"""Training from rewards: answers to each prompt are sampled, and compared with each other by their rewards."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import trl
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from hymba_tune.adapters import short_count
from hymba_tune.checkpoint import check_length
from hymba_tune.config import GRPOConfig
from hymba_tune.data import Conversation, PromptReport, TrainingData, read_prompts
from hymba_tune.distributed.environment import check_single_process
from hymba_tune.errors import DataError, TrainingError, shortened
from hymba_tune.evaluate.rewards import RewardedAnswer, Rewards
from hymba_tune.files import write_text
from hymba_tune.train.flow import train
from hymba_tune.train.preference import describe_start
from hymba_tune.train.rollouts import RolloutTrainer
from hymba_tune.train.run import Run
from hymba_tune.train.samples import SAMPLES
from hymba_tune.train.screen import Screen
from hymba_tune.train.setup import Data, Setup

FIRST_STEPS = 10
"""The number of steps within which the rewards of a group must have differed."""
MOSTLY = 0.5
"""The share of cut answers that explains why none has a reward."""


def run_grpo(config: GRPOConfig, screen: Screen) -> Run | None:
    """Train a model from rewards of its own answers; see `train`."""
    check_single_process("grpo")
    return train(GRPOTask(config), screen)


@dataclass(frozen=True)
class GRPOTask:
    """Training from rewards; see `hymba_tune.train.task.TrainingTask`."""

    config: GRPOConfig

    def read_data(self, setup: Setup, screen: Screen) -> GRPORun:
        """Read prompts with references, and check that they fit the rewards.

        Raises:
            DataError: If there are fewer prompts than a step takes, or a reward can compare none of the references.
        """
        config = self.config
        rewards = Rewards(config)
        longest = config.max_length - config.max_new_tokens
        data = read_prompts(
            config, setup.tokenizer, longest=longest, seed=config.seed, prompts=SAMPLES, working=screen.working
        )
        if len(data.train) < config.prompts_per_step:
            raise DataError(
                f"{', '.join(config.data)}: there are {len(data.train):,} prompts to train on, and a step takes "
                f"{config.prompts_per_step:,}.",
                expected="as many prompts as a step takes, or more",
                fix=f"more data, or a lower --batch-size or --grad-accum: a step has {config.answers_per_step} answers",
            )
        rewards.check(data.train["reference"][:], ", ".join(config.data))
        recorded = setup.run.facts().get("described", {}).get("rewards") if config.resume else None
        if recorded is not None and recorded != rewards.describe():
            screen.note(f"the rewards have changed since the run was started: {recorded}; now {rewards.describe()}")
        return GRPORun(config, setup, _data_of(setup, data, rewards, config.max_new_tokens), rewards)


def _data_of(setup: Setup, data: TrainingData[PromptReport], rewards: Rewards, most: int) -> Data:
    report = data.report
    warning = check_length(report.longest + most, setup.model_config, strict=setup.config.strict_length)
    summary = [f"{report.prompts:,} prompts", f"{short_count(report.tokens)} tokens"]

    def rate(prompt: Conversation, answer: str, reference: str) -> str:
        tokens = len(setup.tokenizer(answer).input_ids)
        (scores,) = rewards.scores([RewardedAnswer(prompt.messages[-1].content, answer, tokens, reference)])
        return rewards.in_words(scores)

    return Data(data.train, data.held_out, data.held_out_sources, report, summary, data.prompts, warning, rate=rate)


@dataclass(frozen=True)
class GRPORun:
    """A run whose prompts are read.

    Attributes:
        config: The run's settings.
        setup: The run's setup.
        data: The prompts.
        rewards: The rewards.
        extra_bytes: 0, as answers are sampled while nothing else is in memory; see `step_settings`.
    """

    config: GRPOConfig
    setup: Setup
    data: Data
    rewards: Rewards
    extra_bytes: int = 0

    def prepare(self, screen: Screen) -> GRPORun:
        """Return the run itself."""
        del screen
        return self

    def describe(self) -> dict[str, str]:
        """Return the banner's lines on where training starts, the rewards, the answers and the loss."""
        config = self.config
        sampling = f"temperature {config.temperature:g}" + (f", top-p {config.top_p:g}" if config.top_p < 1 else "")
        answers = (
            f"{config.group_size} to each of {config.prompts_per_step:,} prompts a step · up to "
            f"{config.max_new_tokens:,} tokens · {sampling}"
        )
        steps = f" · {config.iterations} steps on the same answers" if config.iterations > 1 else ""
        kl = f"KL {config.beta:g}" if config.beta else "no KL"
        return describe_start(self.setup) | {
            "rewards": self.rewards.describe(),
            "answers": answers + steps,
            "loss": f"{config.loss}, {kl}",
        }

    def make_trainer(
        self, model: PreTrainedModel, arguments: dict[str, Any], callbacks: list[TrainerCallback]
    ) -> RolloutTrainer:
        """Build the trainer; see `hymba_tune.train.task.TrainerBuilder`."""
        trainer = RolloutTrainer(
            model=model,
            args=self._arguments(arguments),
            train_dataset=self.data.train,
            eval_dataset=self.data.held_out,
            processing_class=self.setup.tokenizer,
            callbacks=callbacks,
            rewards=self.rewards,
            answers_at_a_time=self.config.answers_at_a_time,
            cuda_graphs=self.config.cuda_graphs,
            beta=self.config.beta,
        )
        trainer.add_callback(RewardWatch(trainer, self.setup.run, self.rewards, self.config))
        return trainer

    def _arguments(self, shared: dict[str, Any]) -> _Arguments:
        config = self.config
        arguments = {name: value for name, value in shared.items() if name != "activation_offloading"}
        arguments |= {
            "per_device_eval_batch_size": config.answers_at_a_time,
            "include_num_input_tokens_seen": "no",  # TRL counts the tokens of prompts and answers
        }
        return _Arguments(
            **arguments,
            disable_dropout=not config.lora_dropout,
            num_generations=config.group_size,
            num_generations_eval=1,
            max_completion_length=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            beta=0.0,
            num_iterations=config.iterations,
            epsilon=config.epsilon,
            epsilon_high=config.epsilon_high,
            loss_type=config.loss,
            scale_rewards=config.scale_rewards,
            importance_sampling_level=config.importance,
            mask_truncated_completions=config.mask_cut,
            reward_weights=[part.weight for part in self.rewards.parts],
        )


@dataclass
class _Arguments(trl.GRPOConfig):
    """TRL's arguments, with the maximum length that all kinds of training have."""

    max_length: int | None = None


class RewardWatch(TrainerCallback, ExportableState):
    """Ends a run whose rewards do not differ within its first steps, and writes the last answers for the report.

    Args:
        trainer: The trainer.
        run: The run, whose directory receives ``rollouts.json``.
        rewards: The rewards.
        config: The run's settings.
    """

    def __init__(self, trainer: RolloutTrainer, run: Run, rewards: Rewards, config: GRPOConfig) -> None:
        self._trainer = trainer
        self._run = run
        self._rewards = rewards
        self._config = config

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint saves, so that a resumed run stops where this one would."""
        return {"args": {}, "attributes": {"differed": self._trainer.differed}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Restore what the checkpoint saved."""
        del args, control
        saved: Any = state.stateful_callbacks.get(type(self).__name__, {})
        self._trainer.differed = saved.get("attributes", {}).get("differed", False)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Check that the rewards of some group have differed so far.

        Raises:
            TrainingError: If they have not, with the likely cause.
        """
        del args, control
        if state.global_step == FIRST_STEPS and not self._trainer.differed:
            raise self._error()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        """Write the last answers."""
        del args, control
        if "loss" in logs and self._trainer.groups:
            content = {"step": state.global_step, "groups": self._trainer.groups}
            write_text(self._run.path / "rollouts.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def _error(self) -> TrainingError:
        config, group = self._config, self._trainer.groups[0]
        answers: list[str] = group["answers"]
        count = FIRST_STEPS * config.answers_per_step
        cause, fix = self._cause(group)
        return TrainingError(
            f"In the first {FIRST_STEPS} steps, all answers to a prompt had the same reward ({count:,} answers), and "
            f"nothing can be learned from them: {cause}.",
            expected=f"answers of different rewards; the last were {shortened(answers[0], 80)!r} (reward "
            f"{group['rewards'][0]}) and {shortened(answers[-1], 80)!r}, with the reference "
            f"{shortened(group['reference'], 80)!r}",
            fix=fix,
        )

    def _cause(self, group: dict[str, Any]) -> tuple[str, str]:
        """Return the likely cause, and what to do about it."""
        config = self._config
        cut = self._trainer.cut_share
        if len(set(group["answers"])) == 1:
            return (
                f"the answers to a prompt are all the same, at temperature {config.temperature:g}",
                "a higher --temperature, or --top-p 1",
            )
        if self._rewards.best is not None and self._trainer.last_reward >= self._rewards.best:
            return "every answer has the highest reward, so the data is too easy", "rows that the model does not master"
        if cut > MOSTLY:
            return (
                f"{cut:.0%} of the answers are cut at {config.max_new_tokens:,} tokens",
                "more --max-new-tokens, or a run that answers shortly: --model runs/…",
            )
        return (
            "either the model cannot do the task yet, or its answers have another form than the reward compares",
            "start from a run of hymba-tune sft on some answers (--model runs/…), easier rows, a larger --group-size, "
            "or another --reward",
        )
