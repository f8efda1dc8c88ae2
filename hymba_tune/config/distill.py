"""The settings of `hymba-tune distill`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from cyclopts import Group
from pydantic import BeforeValidator, Field, model_validator

from hymba_tune.config.base import LIST, Config, Method, Names, Pairs, Scheme
from hymba_tune.config.groups import DATA, DISTILLATION, TEACHER
from hymba_tune.config.options import DataOptions, ModelOptions, OutputOptions
from hymba_tune.config.verbs import TrainingConfig

LOSSES = ("kl", "reverse-kl", "jsd", "projection", "alm", "uld", "ce", "seq")
"""What a student may be taught by; ``auto`` is one of the first and the fourth."""
WHOLE = {"reverse-kl", "jsd", "uld"}
"""Losses that need the teacher's whole vocabulary, which no cache holds."""
SERVED = ("http://", "https://")


@dataclass(frozen=True)
class Stage:
    """A part of a run, and what differs in it.

    Attributes:
        share: Of the run's steps.
        losses: Weights of the losses, by name.
        alpha: The teacher's share of the loss.
        on_policy: Share of the answers that the student writes itself.
    """

    share: float
    losses: Mapping[str, float]
    alpha: float
    on_policy: float


def _written_as_stages(value: Any) -> Any:
    """Recipes may write mappings: ``{share: 0.3, on_policy: 1}``."""
    if not isinstance(value, list):
        return value
    return [_stage_in_words(stage) if isinstance(stage, dict) else str(stage) for stage in value]


def _stage_in_words(stage: Mapping[str, Any]) -> str:
    def said(value: Any) -> str:
        if isinstance(value, dict):
            return "+".join(f"{name}={weight}" for name, weight in value.items())
        return "+".join(map(str, value)) if isinstance(value, list) else str(value)

    rest = ",".join(f"{name}={said(value)}" for name, value in stage.items() if name != "share")
    return f"{stage.get('share', '')}:{rest}"


Stages = Annotated[list[str], LIST, BeforeValidator(_written_as_stages)]


class TeacherOptions(Config):
    """Who teaches, and what is kept of it."""

    group: ClassVar[Group] = TEACHER

    teacher: str = ""
    """A Hub id, an alias (llama-3.2-3b, qwen2.5-7b-instruct, …), a folder, a run directory, or the address of an
    OpenAI-compatible server (http://…)."""
    teacher_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the teacher's weights: auto takes bfloat16 where the device computes in it, else float32."""
    teacher_quantize: Scheme | None = None
    """Load the teacher in 8 or 4 bits."""
    teacher_system: str | None = None
    """A system message that only the teacher sees, in conversations that have none."""
    teacher_tokenizer: str | None = None
    """Tokenizer of a teacher behind a server: a Hub id, an alias or a folder."""
    teacher_chat_template: str | None = None
    """hymba, alpaca, or a file of Jinja. When not given: the teacher's own, or hymba."""
    teacher_template: Pairs = Field(default_factory=list)
    """Values for the teacher's chat template: --teacher-template date_string="26 Jul 2024"."""
    teacher_end: str | None = None
    """The token that the teacher ends an answer with. When not given: the one that its chat template writes there."""
    teacher_cache: Path | None = None
    """Folder of the teacher's kept targets. When not given: in the user's cache."""
    top_k: int = Field(default=64, ge=1)
    """Of the teacher's probabilities, how many are kept at each token (common: 32 to 64); the mass of the others is
    kept as one."""
    temperature: float = Field(default=1.0, gt=0)
    """Of the probabilities that are compared: more than 1 makes the teacher's unlikely tokens count more."""
    min_aligned: float = Field(default=0.9, ge=0, le=1)
    """Share of rows and of their bytes that both tokenizers must spell alike; with less, nothing is asked of it."""
    min_teacher_probability: float = Field(default=0.1, ge=0, le=1)
    """What the teacher must give its own next tokens on average; less says that something does not fit."""
    min_end_probability: float = Field(default=0.01, ge=0, le=1)
    """Minimum mean probability that the teacher gives its end token after an answer; a lower value suggests another end
    token, and the student would learn not to stop."""

    @property
    def served(self) -> bool:
        """Whether the teacher is behind a server."""
        return self.teacher.startswith(SERVED)


class DistillConfig(TeacherOptions, TrainingConfig):
    """Distillation from a teacher, whatever its tokenizer."""

    group: ClassVar[Group] = DISTILLATION

    verb: ClassVar[str] = "distill"
    learning_rates: ClassVar[Mapping[Method, float]] = {Method.lora: 2e-4, Method.dora: 2e-4, Method.full: 2e-5}

    loss: Names = Field(default_factory=lambda: ["auto"])
    """kl, reverse-kl, jsd (one tokenizer); projection, alm, uld (any two); ce (the data alone); seq (the
    teacher writes the answers of --data anew); or several, with weights: --loss kl=1 alm=0.5. Beside projection, alm
    speaks only where that has no target. auto takes these two where the tokenizers differ, else kl."""
    alpha: float = Field(default=0.7, ge=0, le=1)
    """The teacher's share of the loss; the rest is cross-entropy on the data."""
    beta: float = Field(default=0.5, ge=0, le=1)
    """Of the jsd loss: 0 is kl, 1 is reverse-kl."""
    tau: float = Field(default=100.0, gt=0)
    """Of the alm loss: the larger, the more alike unlikely spans are."""
    online: bool = False
    """Keep the teacher beside the student instead of its targets on disk: whole vocabularies are compared."""
    on_policy: float = Field(default=0.0, ge=0, le=1)
    """Share of the answers that the student writes itself, to be judged by the teacher."""
    answer_tokens: int = Field(default=256, ge=1)
    """Tokens that answers written by the student (--on-policy) or the teacher (--loss seq) may have."""
    answer_temperature: float = Field(default=1.0, ge=0)
    """Temperature at which these are sampled; 0 takes the likeliest token each time."""
    stages: Stages = Field(default_factory=list)
    """Parts of the run, each with its share of the steps and what differs in it (loss, alpha, on-policy): --stages 0.7
    0.3:on-policy=1,loss=kl."""

    match_hidden: Literal["cosine", "mse"] | None = None
    """Draw the student's hidden states to the teacher's as well, through projections learned beside it: one tokenizer
    only, such as a larger Hymba's. Its own pass of the teacher, which stays in memory."""
    match_weight: float = Field(default=1.0, gt=0)
    """Weight of --match-hidden beside the other losses."""

    @property
    def inputs(self) -> list[str]:
        """What is read, by the names that the user gave; some may be files and folders of this machine."""
        teacher = [self.teacher, self.teacher_tokenizer, self.teacher_chat_template, self.teacher_cache]
        return [*super().inputs, *(str(name) for name in teacher if name)]

    @property
    def parts(self) -> list[Stage]:
        """The stages of the run: one, where none are given."""
        whole = Stage(1.0, _losses(self.loss), self.alpha, self.on_policy)
        return [_stage(text, whole) for text in self.stages] or [whole]

    @property
    def keeps_teacher(self) -> bool:
        """Whether the teacher is in memory while the student learns."""
        return self.online or self.match_hidden is not None or any(part.on_policy for part in self.parts)

    @property
    def teacher_writes(self) -> bool:
        """Whether the teacher writes the answers of the data."""
        return any("seq" in part.losses for part in self.parts)

    @model_validator(mode="after")
    def _check_stages(self) -> Self:
        shares = sum(part.share for part in self.parts)
        if abs(shares - 1) > 1e-6:
            raise ValueError(f"stages: the shares make {shares:g}, not 1; --stages 0.7 0.3:on-policy=1")
        if self.teacher_writes and not all("seq" in part.losses for part in self.parts):
            raise ValueError("stages: seq changes the answers of the data; use it in every stage or in none")
        return self

    @model_validator(mode="after")
    def _check_teaching(self) -> Self:
        whole = sorted(WHOLE & {name for part in self.parts for name in part.losses if part.on_policy < 1})
        if whole and not self.online:
            raise ValueError(f"loss: {whole[0]} compares whole vocabularies, which no cache holds; add --online")
        if self.packing and any(part.on_policy for part in self.parts):
            raise ValueError("packing: answers that the student writes cannot be packed beforehand; leave it out")
        if self.served and self.keeps_teacher:
            flag = "--online" if self.online else "--match-hidden" if self.match_hidden else "--on-policy"
            raise ValueError(
                f"teacher: a server tells only its likeliest tokens, and {flag} needs all of them; name a model instead"
            )
        return self


def _losses(names: list[str]) -> dict[str, float]:
    """``["projection", "alm=0.5"]`` by name."""
    weights: dict[str, float] = {}
    for text in names:
        name, _, weight = text.partition("=")
        if name not in ("auto", *LOSSES):
            near = "".join(f" (did you mean {one}?)" for one in get_close_matches(name, LOSSES, n=1))
            raise ValueError(f"loss: there is no {name!r}{near}; use auto, {', '.join(LOSSES)}")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            raise ValueError(f"loss: {weight!r} is no weight; --loss {name}=0.5") from None
        if not 0 < weights[name] < float("inf"):
            raise ValueError(f"loss: the weight of {name} is {weights[name]:g}; it must be more than 0")
    if not weights:
        raise ValueError("loss: none is given; use auto")
    if "auto" in weights and len(weights.keys() - {"seq"}) > 1:
        raise ValueError("loss: auto stands alone; name all losses of a mix, such as --loss projection=1 alm=0.5")
    return weights


KINDS = {"on_policy": float, "alpha": float, "loss": str}


def _stage(text: str, whole: Stage) -> Stage:
    share, _, rest = text.partition(":")
    example = "--stages 0.7 0.3:on-policy=1,loss=kl"
    try:
        changes: dict[str, Any] = {"share": float(share)}
        for pair in filter(None, rest.split(",")):
            name, _, value = pair.partition("=")
            name = name.strip().replace("-", "_")
            if name not in KINDS:
                raise ValueError(f"stages: there is no {name!r} in a stage; use loss, alpha, on-policy: {example}")
            changes["losses" if name == "loss" else name] = (
                _losses(value.split("+")) if name == "loss" else float(value)
            )
    except ValueError as error:
        if str(error).startswith(("stages:", "loss:")):
            raise
        raise ValueError(f"stages: {text!r} is no stage; {example}") from None
    if not 0 < changes["share"] <= 1:
        raise ValueError(f"stages: a share of {changes['share']:g} is none; use more than 0, at most 1")
    for name in ("alpha", "on_policy"):
        if not 0 <= changes.get(name, 0) <= 1:
            raise ValueError(f"stages: {name.replace('_', '-')} is {changes[name]:g}; it must be 0 to 1")
    return Stage(**{**vars(whole), **changes})


class DistillCaptureConfig(OutputOptions, TeacherOptions, DataOptions, ModelOptions):
    """A teacher's targets for a student, kept on disk."""

    group: ClassVar[Group] = DATA

    seed: int = Field(default=0, ge=0)
    """Of the rows that are held out, and of those drawn of sources with a weight below 1; as of the run to come."""
