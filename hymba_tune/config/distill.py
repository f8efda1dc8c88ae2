"""The settings of `hymba-tune distill`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from cyclopts import Group
from pydantic import BeforeValidator, Field, model_validator

from hymba_tune.config.base import LIST, NATS_PER_TOKEN, Config, Method, Names, Pairs, Scheme, Verb
from hymba_tune.config.distributed import Count, LaunchOptions
from hymba_tune.config.groups import DATA, DISTILLATION, FIRST, TEACHER
from hymba_tune.config.options import KeptDataOptions, ModelOptions, OutputOptions
from hymba_tune.config.verbs import TrainingConfig
from hymba_tune.errors import did_you_mean

LOSSES = ("kl", "reverse-kl", "jsd", "projection", "alm", "uld", "ce", "seq")
"""Names of the distillation losses; ``auto`` chooses kl for one tokenizer, else projection and alm."""
WHOLE = {"reverse-kl", "jsd", "uld"}
"""Losses that need the teacher's probabilities of the whole vocabulary, which no cache holds."""
SERVED = ("http://", "https://")


@dataclass(frozen=True)
class Stage:
    """A stage of a run and its settings.

    Attributes:
        share: Share of the run's steps.
        losses: Loss weights by name.
        alpha: Weight of the teacher's losses; cross-entropy on the data has the rest.
        on_policy: Share of the answers that the student generates.
    """

    share: float
    losses: Mapping[str, float]
    alpha: float
    on_policy: float


def _written_as_stages(value: Any) -> Any:
    """Turn mappings, which a recipe may hold, into texts: ``{share: 0.3, on_policy: 1}`` is ``0.3:on_policy=1``."""
    if not isinstance(value, list):
        return value
    return [_stage_as_text(stage) if isinstance(stage, dict) else str(stage) for stage in value]


def _stage_as_text(stage: Mapping[str, Any]) -> str:
    def as_text(value: Any) -> str:
        if isinstance(value, dict):
            return "+".join(f"{name}={weight}" for name, weight in value.items())
        return "+".join(map(str, value)) if isinstance(value, list) else str(value)

    rest = ",".join(f"{name}={as_text(value)}" for name, value in stage.items() if name != "share")
    return f"{stage.get('share', '')}:{rest}"


Stages = Annotated[
    list[str], LIST, BeforeValidator(_written_as_stages, json_schema_input_type=list[str | float | dict[str, Any]])
]


class TeacherOptions(Config):
    """Settings of the teacher and of its cached targets."""

    group: ClassVar[Group] = TEACHER

    teacher: Annotated[str, FIRST] = ""
    """Teacher: a Hub id, an alias (llama-3.2-3b-instruct, qwen2.5-7b-instruct, …), a folder, a run directory, or the
    URL of an OpenAI-compatible server (http://…)."""
    teacher_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the teacher's weights; auto is bfloat16 if the device computes in it, else float32."""
    teacher_quantize: Scheme | None = None
    """Load the teacher in 8 or 4 bits."""
    teacher_system: str | None = None
    """System message for the teacher only, in conversations without one."""
    teacher_system_as: Literal["system", "user"] = "system"
    """Role in which the teacher reads system messages; user puts them before the first question, for a chat template
    that has no system role."""
    teacher_tokenizer: str | None = None
    """Tokenizer of a teacher behind a server: a Hub id, an alias or a folder."""
    teacher_chat_template: str | None = None
    """Chat template of the teacher: hymba, alpaca, or a Jinja file. Default: the teacher's own, or hymba."""
    teacher_template: Pairs = Field(default_factory=list)
    """Variables of the teacher's chat template: --teacher-template date_string="26 Jul 2024"."""
    teacher_end: str | None = None
    """Token that ends an answer of the teacher. Default: the token that its chat template writes there."""
    teacher_cache: Path | None = None
    """Folder of the teacher's cached targets. Default: in the user's cache."""
    top_k: int = Field(default=64, ge=1)
    """Teacher probabilities to store per token, the largest ones (common: 32 to 64); the remaining mass is stored as
    one value."""
    normalize: Literal["nfc"] | None = None
    """Unicode form of all texts, for both sides: nfc composes accents, as many tokenizers do."""
    temperature: float = Field(default=1.0, gt=0)
    """Distillation temperature; above 1, the teacher's unlikely tokens count more."""
    min_aligned: float = Field(default=0.9, ge=0, le=1)
    """Minimum share of rows and bytes that must align; below it the run stops."""
    min_teacher_probability: float = Field(default=0.1, ge=0, le=1)
    """Minimum mean probability that the teacher gives the reference token; a lower value suggests a wrong template or
    tokenizer, and the run stops."""
    min_end_probability: float = Field(default=0.01, ge=0, le=1)
    """Minimum mean probability that the teacher gives its end token after an answer; below it the run stops, as
    the student would learn not to stop."""

    @model_validator(mode="after")
    def _check_secrets(self) -> Self:
        address = self.teacher.partition("#")[0]
        if self.served and ("@" in address or "?" in address):
            raise ValueError(
                "teacher: an address with a user, a password or parameters would end up in the files of the run; "
                "use --teacher http://HOST:PORT/v1, and put a key into the environment variable HYMBA_TUNE_TEACHER_KEY"
            )
        return self

    @property
    def served(self) -> bool:
        """Whether the teacher is behind a server."""
        return self.teacher.startswith(SERVED)


class DistillConfig(TeacherOptions, TrainingConfig, KeptDataOptions):
    """Settings of `hymba-tune distill`: distillation from a teacher with any tokenizer."""

    group: ClassVar[Group] = DISTILLATION

    verb: ClassVar[Verb] = Verb(
        "distill", "Distillation", NATS_PER_TOKEN, paired=False, logit_copies=0, accuracy=None, scores=False, figures=()
    )
    learning_rates: ClassVar[Mapping[Method, float]] = {Method.lora: 2e-4, Method.dora: 2e-4, Method.full: 2e-5}

    loss: Annotated[Names, FIRST] = Field(default_factory=lambda: ["auto"])
    """Losses, with weights if there are several: --loss kl=1 alm=0.5. For one tokenizer: kl, reverse-kl, jsd. For any
    two: projection, alm, uld. ce is cross-entropy on the data alone; with seq, the teacher first rewrites the answers
    of --data. With projection, alm applies only where no projected target exists. auto is projection and alm if the
    tokenizers differ, else kl."""
    alpha: float = Field(default=0.7, ge=0, le=1)
    """Weight of the teacher's losses; cross-entropy on the data has the rest."""
    beta: float = Field(default=0.5, ge=0, le=1)
    """Interpolation of the jsd loss: 0 is kl, 1 is reverse-kl."""
    tau: float = Field(default=100.0, gt=0)
    """ALM temperature; larger values flatten differences between unlikely spans."""
    online: bool = False
    """Keep the teacher in memory instead of caching its targets; the losses then use the whole vocabulary."""
    on_policy: float = Field(default=0.0, ge=0, le=1)
    """Share of the answers that the student generates, for the teacher to score."""
    answer_tokens: int = Field(default=256, ge=1)
    """Maximum tokens of answers generated by the student (--on-policy) or the teacher (--loss seq)."""
    answer_temperature: float = Field(default=1.0, ge=0)
    """Sampling temperature of generated answers; 0 is greedy decoding."""
    stages: Stages = Field(default_factory=list)
    """Stages of the run, each with its share of the steps and the settings that differ (loss, alpha, on-policy):
    --stages 0.7 0.3:on-policy=1,loss=kl."""

    match_hidden: Literal["cosine", "mse"] | None = None
    """Add a hidden-state loss, through learned projections. Needs one tokenizer, such as a larger Hymba's; keeps the
    teacher in memory and runs one extra teacher forward per step."""
    match_weight: float = Field(default=1.0, gt=0)
    """Weight of the hidden-state loss."""

    @property
    def inputs(self) -> list[str]:
        """What is read, by the names that the user gave; some may be files and folders of this machine."""
        teacher = [self.teacher, self.teacher_tokenizer, self.teacher_chat_template, self.teacher_cache]
        return [*super().inputs, *(str(name) for name in teacher if name)]

    @property
    def parts(self) -> list[Stage]:
        """The stages of the run; a single one if none are given."""
        single = Stage(1.0, _losses(self.loss), self.alpha, self.on_policy)
        return [_stage(text, single) for text in self.stages] or [single]

    @property
    def keeps_teacher(self) -> bool:
        """Whether the teacher is in memory while the student is trained."""
        return self.online or self.match_hidden is not None or any(part.on_policy for part in self.parts)

    @property
    def teacher_writes(self) -> bool:
        """Whether the teacher generates the answers of the data."""
        return any("seq" in part.losses for part in self.parts)

    @model_validator(mode="after")
    def _check_stages(self) -> Self:
        shares = sum(part.share for part in self.parts)
        if abs(shares - 1) > 1e-6:
            raise ValueError(f"stages: the shares sum to {shares:g}, not 1; for example --stages 0.7 0.3:on-policy=1")
        if self.teacher_writes and not all("seq" in part.losses for part in self.parts):
            raise ValueError("stages: seq changes the answers of the data; use it in every stage or in none")
        return self

    @model_validator(mode="after")
    def _check_teaching(self) -> Self:
        uncached = sorted(WHOLE & {name for part in self.parts for name in part.losses if part.on_policy < 1})
        if uncached and not self.online:
            raise ValueError(f"loss: {uncached[0]} needs the whole vocabulary, which no cache holds; add --online")
        if self.packing and any(part.on_policy for part in self.parts):
            raise ValueError(
                "packing: answers that the student generates cannot be packed in advance; remove --packing"
            )
        if self.served and self.keeps_teacher:
            flag = "--online" if self.online else "--match-hidden" if self.match_hidden else "--on-policy"
            raise ValueError(
                f"teacher: a server returns only its most likely tokens, and {flag} needs all; name a model instead"
            )
        return self


def _losses(names: list[str]) -> dict[str, float]:
    """Parse losses such as ``["projection", "alm=0.5"]`` into weights by name."""
    weights: dict[str, float] = {}
    for text in names:
        name, _, weight = text.partition("=")
        if name not in ("auto", *LOSSES):
            suggestion = did_you_mean(name, LOSSES)
            near = f" ({suggestion})" if suggestion else ""
            raise ValueError(f"loss: unknown loss {name!r}{near}; use auto, {', '.join(LOSSES)}")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            raise ValueError(f"loss: {weight!r} is not a number; for example --loss {name}=0.5") from None
        if not 0 < weights[name] < float("inf"):
            raise ValueError(f"loss: the weight of {name} is {weights[name]:g}; it must be more than 0")
    if not weights:
        raise ValueError("loss: the list is empty; use auto")
    if "auto" in weights and len(weights.keys() - {"seq"}) > 1:
        raise ValueError("loss: auto combines only with seq; name every loss, such as --loss projection=1 alm=0.5")
    return weights


STAGE_SETTINGS = ("loss", "alpha", "on_policy")


def _stage(text: str, defaults: Stage) -> Stage:
    """Parse a stage such as ``0.3:on-policy=1,loss=kl``; ``defaults`` has the settings that it does not name."""
    share, _, rest = text.partition(":")
    example = "--stages 0.7 0.3:on-policy=1,loss=kl"
    try:
        changes: dict[str, Any] = {"share": float(share)}
        for pair in filter(None, rest.split(",")):
            name, _, value = pair.partition("=")
            name = name.strip().replace("-", "_")
            if name not in STAGE_SETTINGS:
                raise ValueError(f"stages: a stage has no setting {name!r}; use loss, alpha, on-policy: {example}")
            changes["losses" if name == "loss" else name] = (
                _losses(value.split("+")) if name == "loss" else float(value)
            )
    except ValueError as error:
        if str(error).startswith(("stages:", "loss:")):
            raise
        raise ValueError(f"stages: {text!r} is not a stage; for example {example}") from None
    if not 0 < changes["share"] <= 1:
        raise ValueError(f"stages: a share of {changes['share']:g} is out of range; use more than 0 and at most 1")
    for name in ("alpha", "on_policy"):
        if not 0 <= changes.get(name, 0) <= 1:
            raise ValueError(f"stages: {name.replace('_', '-')} is {changes[name]:g}; it must be 0 to 1")
    return Stage(**{**vars(defaults), **changes})


class DistillCaptureConfig(LaunchOptions, OutputOptions, TeacherOptions, KeptDataOptions, ModelOptions):
    """Settings of `hymba-tune distill capture`: a teacher's targets for a student, stored on disk."""

    group: ClassVar[Group] = DATA

    teacher_quantize: Annotated[Scheme | None, FIRST] = None
    teacher_cache: Annotated[Path | None, FIRST] = None
    top_k: Annotated[int, FIRST] = Field(default=64, ge=1)
    nproc: Annotated[Count, FIRST] = "1"
    seed: int = Field(default=0, ge=0)
    """Random seed of the held-out rows, and of the rows drawn from sources with a weight below 1. Use that of the
    training run."""
