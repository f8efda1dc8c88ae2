"""The settings of `hymba-tune grpo`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Self

from cyclopts import Group
from pydantic import Field, model_validator

from hymba_tune.config.base import LIST, Method, Names, Verb
from hymba_tune.config.groups import FIRST, REWARDS
from hymba_tune.config.options import KeptDataOptions
from hymba_tune.config.verbs import TrainingConfig
from hymba_tune.errors import did_you_mean

COMPARED = ("exact", "number", "gsm8k", "choice")
"""Rewards that compare a part of the answer with the reference, and take no argument."""
NAMED = (*COMPARED, "regex", "format", "length")


@dataclass(frozen=True)
class RewardChoice:
    """A reward as it was chosen.

    Attributes:
        text: The choice as the user wrote it.
        name: One of `NAMED`, or the name of a function.
        argument: What follows the name: a pattern or a number of tokens; for a function its file.
    """

    text: str
    name: str
    argument: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse a value of ``--reward``.

        Raises:
            ValueError: If there is no such reward, or its argument cannot be used.
        """
        name, _, argument = text.partition("=")
        if name in NAMED:
            cls._check_argument(name, argument)
            return cls(text, name, argument)
        if found := re.fullmatch(r"(.+\.py):(\w+)", text, re.DOTALL):
            return cls(text, found[2], found[1])
        near = did_you_mean(name, NAMED)
        expected = near or f"use one of {', '.join(NAMED)}, or FILE.py:FUNCTION"
        raise ValueError(f"{text[:80]!r} is no reward; {expected}")

    @classmethod
    def _check_argument(cls, name: str, argument: str) -> None:
        if name in COMPARED and argument:
            raise ValueError(f"{name} takes no argument; regex=PATTERN compares what matches a pattern")
        if name == "regex" and not argument:
            raise ValueError("regex needs a pattern: regex='answer is (.*)'")
        if name == "length" and argument and not (argument.isdecimal() and len(argument) < 10 and int(argument)):
            raise ValueError(f"length={argument[:20]}: expected a number of tokens, such as length=100")
        if name in ("regex", "format"):
            try:
                re.compile(argument)
            except re.error as error:
                raise ValueError(f"{name}={argument[:80]} is no regular expression: {error}") from error

    @property
    def runs_code(self) -> bool:
        """Whether it is a function of the user's."""
        return self.text.partition("=")[0] not in NAMED


class GRPOConfig(TrainingConfig, KeptDataOptions):
    """Settings of `hymba-tune grpo`: group relative policy optimization (Shao et al. 2024)."""

    group: ClassVar[Group] = REWARDS

    verb: ClassVar[Verb] = Verb(
        "grpo",
        "Training from rewards (GRPO)",
        loss_unit="",
        paired=False,
        logit_copies=0,
        accuracy=None,
        scores=False,
        figures=("answer_tokens",),
    )
    learning_rates: ClassVar[Mapping[Method, float]] = {Method.lora: 2e-5, Method.dora: 2e-5, Method.full: 1e-6}
    reward: Annotated[Names, FIRST] = Field(default_factory=list)
    """Rewards of an answer, added up: exact, number, gsm8k or choice (1 where it agrees with the reference in the whole
    text, the last number, the number after ####, the last letter), regex=PATTERN (in the last match, or its first
    group), format or format=PATTERN (1 where the whole answer has this form; default: <think>…</think> and an answer),
    length or length=TOKENS (1 up to so many tokens, then falling to 0 at --max-new-tokens), or rewards.py:NAME, a
    function in a Python file of yours, whose code is run."""
    reward_weights: Annotated[list[float], LIST] = Field(default_factory=list)
    """Weight of each reward. Default: 1."""
    group_size: Annotated[int, FIRST] = Field(default=8, ge=2)
    """Answers that are sampled for each prompt and compared with each other."""
    max_new_tokens: Annotated[int, FIRST] = Field(default=256, ge=1)
    """Maximum tokens of an answer; prompts have the rest of --max-length."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling: sample from the most likely tokens that together have this probability."""
    rollout_batch: int | None = Field(default=None, ge=1)
    """Answers to sample at a time. Default: all of a step."""
    loss: Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"] = "dapo"
    """Loss, by TRL's names: they differ in how they clip and in what they divide the sum over tokens by."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divide advantages by the standard deviation of the rewards of the group, of the batch, or not."""
    importance: Literal["token", "sequence"] = "token"
    """Probability ratios of tokens, or of whole answers (GSPO)."""
    beta: float = Field(default=0.0, ge=0)
    """Weight of the KL divergence from the model at the start; 0 for none (common: 0 to 0.04)."""
    iterations: int = Field(default=1, ge=1)
    """Steps on the same answers. Ratios are clipped only from the second one on."""
    epsilon: float = Field(default=0.2, gt=0)
    """Clipping: ratios below 1 - epsilon and above 1 + epsilon have no gradient."""
    epsilon_high: float | None = Field(default=None, gt=0)
    """Another bound above 1 (0.28 in DAPO, 5 for the cispo loss). Default: epsilon."""
    mask_cut: bool = False
    """Leave answers that were cut at --max-new-tokens out of the loss."""
    lr: Annotated[float | None, FIRST] = Field(default=None, gt=0)
    """Peak learning rate. Default: 2e-5 for an adapter, 1e-6 for full training, and up to 20 times that for models
    smaller than Hymba-1.5B."""
    batch_size: Annotated[int, FIRST] = Field(default=8, ge=1)
    """Answers in a batch on each device."""
    grad_accum: int = Field(default=4, ge=1)
    """Gradient accumulation: batches in an optimizer step. A step has batch size × accumulation answers, to as many
    prompts as that holds groups."""
    max_loss_spike: float | None = Field(default=None, gt=1)
    """Stop before a step whose loss is above this multiple of the usual one (the median of 50 steps, at least 1)."""
    eval_max_rows: int = Field(default=100, ge=1)
    """Maximum rows of held-out data; each is answered once at every evaluation, without sampling."""

    @property
    def rewards(self) -> list[RewardChoice]:
        """The rewards."""
        return [RewardChoice.parse(text) for text in self.reward]

    @property
    def answers_per_row(self) -> int:
        """The answers that an epoch trains on for each prompt."""
        return self.group_size * self.iterations

    @property
    def answers_per_step(self) -> int:
        """The answers of an optimizer step."""
        return self.batch_size * self.grad_accum

    @property
    def prompts_per_step(self) -> int:
        """The prompts of an optimizer step."""
        return self.answers_per_step // self.group_size

    @property
    def answers_at_a_time(self) -> int:
        """The most answers that are sampled in one batch."""
        return min(self.rollout_batch or self.answers_per_step, self.answers_per_step)

    @property
    def least_length(self) -> int:
        """The least ``max_length`` that leaves a prompt room."""
        return self.max_new_tokens + 8

    @model_validator(mode="after")
    def _check_group(self) -> Self:
        if self.packing:
            raise ValueError("packing: groups of answers cannot be packed; remove --packing")
        if self.activation_offload:
            raise ValueError(
                "activation_offload: TRL's GRPO trainer keeps activations on the GPU; use --gradient-checkpointing"
            )
        if self.answers_per_step % self.group_size:
            raise ValueError(
                f"group_size: a step has {self.batch_size} × {self.grad_accum} answers, which are no whole groups of "
                f"{self.group_size}; use --batch-size {self.group_size}, or another --grad-accum"
            )
        if self.max_length < self.least_length:
            raise ValueError(
                f"max_new_tokens: --max-length {self.max_length} leaves a prompt no room; use --max-length "
                f"{2 * self.max_new_tokens}, or fewer --max-new-tokens"
            )
        return self

    @model_validator(mode="after")
    def _check_processes(self) -> Self:
        if self.nproc != "1" or self.nnodes > 1:
            raise ValueError("nproc: hymba-tune grpo trains in a single process; leave --nproc and --nnodes out")
        if self.global_batch is not None:
            raise ValueError("global_batch: give the answers of a step by --batch-size and --grad-accum")
        return self

    @model_validator(mode="after")
    def _check_rewards(self) -> Self:
        try:
            limits = [int(reward.argument) for reward in self.rewards if reward.name == "length" and reward.argument]
        except ValueError as error:
            raise ValueError(f"reward: {error}") from error
        if limits and max(limits) >= self.max_new_tokens:
            raise ValueError(
                f"reward: length={max(limits)} rewards every answer, as they have at most {self.max_new_tokens} tokens "
                "(--max-new-tokens); use fewer"
            )
        if self.reward_weights and len(self.reward_weights) != len(self.reward):
            raise ValueError(
                f"reward_weights: there are {len(self.reward_weights)} weights for {len(self.reward)} rewards; give "
                "one for each"
            )
        if 0 in self.reward_weights:
            raise ValueError("reward_weights: a reward of weight 0 has no effect; leave it out of --reward")
        return self

    @model_validator(mode="after")
    def _check_loss(self) -> Self:
        if self.loss == "luspo" and self.importance != "sequence":
            raise ValueError("importance: the luspo loss compares whole answers; use --importance sequence")
        if self.loss == "vespo" and self.importance != "token":
            raise ValueError("importance: the vespo loss weighs whole answers itself; use --importance token")
        if self.epsilon_high is not None and self.loss in ("sapo", "vespo"):
            raise ValueError(f"epsilon_high: the {self.loss} loss has no bounds; leave it out")
        if self.beta and self.method is Method.full:
            raise ValueError(
                "beta: --method full has no adapter to switch off, which gives the reference; use --beta 0, or "
                "--method lora"
            )
        return self
