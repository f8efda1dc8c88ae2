"""The settings of each verb: its groups of shared settings, and its own settings."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from cyclopts import Group, Parameter
from pydantic import Field, model_validator

from hymba_tune.config.base import (
    NATS_PER_TOKEN,
    Accuracy,
    Config,
    Device,
    Keep,
    MetaTokens,
    Method,
    Onto,
    ReferenceSource,
    Scheme,
    Start,
    Verb,
)
from hymba_tune.config.distributed import Count, DistributedOptions, Strategy
from hymba_tune.config.groups import COMPUTING, FIRST, PREFERENCES, RESULT
from hymba_tune.config.options import (
    AdapterOptions,
    AnswerOptions,
    CheckpointChoice,
    DataOptions,
    DecodingOptions,
    EngineOptions,
    EvaluationOptions,
    KeptDataOptions,
    ModelOptions,
    OutputOptions,
    RunOptions,
    TrainingOptions,
)

HIDDEN = Parameter(show=False)


class TrainingConfig(
    DistributedOptions,
    RunOptions,
    EvaluationOptions,
    TrainingOptions,
    AdapterOptions,
    DataOptions,
    DecodingOptions,
    EngineOptions,
    ModelOptions,
):
    """Settings of every verb that trains."""

    verb: ClassVar[Verb]
    """The command that trains with these settings."""
    learning_rates: ClassVar[Mapping[Method, float]]
    """The default of ``lr``, by method."""

    @classmethod
    def of(cls, verb: str) -> type[TrainingConfig]:
        """Find the settings class of a verb that trains.

        Raises:
            ValueError: If there is no such verb.
        """
        known = cls.by_verb()
        if not isinstance(verb, str) or verb not in known:
            raise ValueError(f"verb is {reprlib.repr(verb)}, expected one of {', '.join(known)}")
        return known[verb]

    @classmethod
    def by_verb(cls) -> dict[str, type[TrainingConfig]]:
        """The settings of every verb that trains, by its name."""
        training = (kind for kind in cls.kinds() if issubclass(kind, TrainingConfig) and "verb" in vars(kind))
        return {kind.verb.name: kind for kind in training}

    @property
    def inputs(self) -> list[str]:
        """What is read, by the names that the user gave; some may be files and folders of this machine."""
        return [*self.data, *self.eval_data, *([self.chat_template] if self.chat_template else [])]

    @property
    def answers_per_row(self) -> int:
        """The texts that an epoch trains on for each row: more than one where answers to it are sampled."""
        return 1

    @property
    def least_length(self) -> int:
        """The least ``max_length`` that can be used."""
        return 8

    @property
    def keeps_best(self) -> bool:
        """Whether the run ends with the weights of its best evaluation."""
        return self.keep is Keep.best or (self.keep is None and self.early_stopping is not None)

    @model_validator(mode="after")
    def _check_rates(self) -> Self:
        if self.lr_min and self.lr_schedule not in ("cosine", "wsd"):
            raise ValueError(f"lr_min: {self.lr_schedule} has no lowest rate; use --lr-schedule cosine or wsd")
        if self.loraplus_ratio is not None and self.method is Method.full:
            raise ValueError("loraplus_ratio: --method full has no factors A and B; use lora or dora")
        if self.lr_meta is not None and self.method is not Method.full and self.meta_tokens is MetaTokens.frozen:
            raise ValueError("lr_meta: the meta tokens are not trained; use --meta-tokens lora or full")
        if self.lr_ssm is not None and self.method is not Method.full and not self._adapts_ssm():
            raise ValueError(f"lr_ssm: the targets have no module of the SSM: {' '.join(self.targets)}")
        return self

    def _adapts_ssm(self) -> bool:
        inside = ("all", "attention-ssm", "ssm", "x_proj.0", "dt_proj.0")
        return any(target.endswith(inside) for target in self.targets)

    @model_validator(mode="after")
    def _check_quantize(self) -> Self:
        if self.quantize is not None and self.method is Method.full:
            raise ValueError(
                "quantize: --method full trains every weight, and quantized weights cannot be trained; "
                "use --method lora, or remove --quantize"
            )
        if self.quantize is Scheme.int8 and self.method is Method.dora:
            raise ValueError(
                "quantize: DoRA needs the norms of the weights, and PEFT cannot dequantize int8 for it; "
                "use --quantize nf4, or --method lora"
            )
        return self

    @model_validator(mode="after")
    def _check_targets(self) -> Self:
        if self.method is Method.full and self.targets != ["all"]:
            raise ValueError("targets: --method full trains every weight; remove --targets, or use lora or dora")
        if self.method is Method.dora and self.targets in (["attention"], ["ssm"]):
            raise ValueError(
                f"targets: {self.targets[0]} adapts only some rows of in_proj, and DoRA's magnitudes change every row; "
                "use --method lora, or --targets attention-ssm"
            )
        return self


class SFTConfig(TrainingConfig, AnswerOptions, KeptDataOptions):
    """Settings of `hymba-tune sft`: supervised fine-tuning."""

    verb: ClassVar[Verb] = Verb(
        "sft", "Fine-tuning", NATS_PER_TOKEN, paired=False, logit_copies=0, accuracy=None, scores=False, figures=()
    )
    learning_rates: ClassVar[Mapping[Method, float]] = {Method.lora: 2e-4, Method.dora: 2e-4, Method.full: 2e-5}


class PlanConfig(SFTConfig):
    """Settings of `hymba-tune plan`: those of a run. What concerns its output is accepted, and has no effect."""

    nproc: Annotated[Count, FIRST] = "1"
    strategy: Annotated[Strategy, FIRST] = "ddp"
    out: Annotated[Path | None, HIDDEN] = None
    overwrite: Annotated[bool, HIDDEN] = Field(default=False, exclude=True)
    resume: Annotated[Path | None, HIDDEN] = None
    dry_run: Annotated[bool, HIDDEN] = Field(default=False, exclude=True)


class PreferenceConfig(TrainingConfig, KeptDataOptions):
    """Settings of the verbs that train on preferences."""

    group: ClassVar[Group] = PREFERENCES

    @model_validator(mode="after")
    def _check_packing(self) -> Self:
        if self.packing:
            raise ValueError("packing: preferences cannot be packed; remove --packing")
        return self


class ReferenceConfig(PreferenceConfig):
    """Settings of the verbs that train on preferences against a reference model."""

    group: ClassVar[Group] = PREFERENCES

    learning_rates: ClassVar[Mapping[Method, float]] = {Method.lora: 5e-5, Method.dora: 5e-5, Method.full: 1e-6}
    beta: Annotated[float, FIRST] = Field(default=0.1, gt=0)
    """Strength of the penalty on divergence from the reference (common: 0.01 to 0.5); tau of the ipo loss."""
    start: Start = Start.merge
    """Start from a run: merge its adapter, then train a new one (the reference is the run's model); or continue its
    adapter (the reference is that adapter before training)."""
    reference: ReferenceSource = ReferenceSource.auto
    """Source of the reference's log-probabilities: adapter-off computes them with each batch, with the adapter
    disabled; precompute computes them once before training. Default: precompute if there is no new adapter to disable
    (--method full, --start continue), else adapter-off."""
    lr: Annotated[float | None, FIRST] = Field(default=None, gt=0)
    """Peak learning rate. Default: 5e-5 for an adapter, 1e-6 for full training, and up to 20 times that for models
    smaller than Hymba-1.5B."""

    @property
    def precomputes(self) -> bool:
        """Whether the reference is computed once, before training."""
        no_new_adapter = self.method is Method.full or self.start is Start.continue_
        return no_new_adapter or self.reference is ReferenceSource.precompute

    @model_validator(mode="after")
    def _check_reference(self) -> Self:
        if self.reference is ReferenceSource.adapter_off and self.precomputes:
            what = "--method full" if self.method is Method.full else "--start continue"
            raise ValueError(f"reference: {what} has no new adapter to disable; use --reference precompute")
        return self


SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")
"""DPO losses with label smoothing."""


class DPOConfig(ReferenceConfig):
    """Settings of `hymba-tune dpo`: direct preference optimization."""

    verb: ClassVar[Verb] = Verb(
        "dpo",
        "Preference training (DPO)",
        loss_unit="",
        paired=True,
        logit_copies=0,
        accuracy=Accuracy("pairs", "ranked correctly", chance=0.5),
        scores=False,
        figures=("accuracy", "margin"),
    )
    loss: Annotated[
        Literal[
            "sigmoid",
            "sigmoid_norm",
            "hinge",
            "ipo",
            "robust",
            "exo_pair",
            "nca_pair",
            "bco_pair",
            "sppo_hard",
            "aot",
            "aot_unpaired",
            "apo_zero",
            "apo_down",
            "discopop",
            "sft",
        ],
        FIRST,
    ] = "sigmoid"
    """Loss, by TRL's names: sigmoid is DPO's own; robust tolerates swapped pairs (--label-smoothing)."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed share of swapped pairs, for the losses robust, exo_pair, aot and aot_unpaired."""

    @model_validator(mode="after")
    def _check_loss(self) -> Self:
        if self.label_smoothing and self.loss not in SMOOTHED:
            raise ValueError(f"label_smoothing: the {self.loss} loss has none; use one of {', '.join(SMOOTHED)}")
        if self.loss == "exo_pair" and not self.label_smoothing:
            raise ValueError(
                "label_smoothing: the exo_pair loss needs it; use --label-smoothing 0.001, as its paper does"
            )
        return self


class KTOConfig(ReferenceConfig):
    """Settings of `hymba-tune kto`: Kahneman-Tversky optimization on unpaired preferences."""

    verb: ClassVar[Verb] = Verb(
        "kto",
        "Preference training (KTO)",
        loss_unit="",
        paired=False,
        logit_copies=0,
        accuracy=Accuracy("answers", "classified correctly", chance=None),
        scores=False,
        figures=("accuracy", "margin"),
    )
    loss: Annotated[Literal["kto", "apo_zero_unpaired"], FIRST] = "kto"
    """Loss, by TRL's names."""
    desirable_weight: float = Field(default=1.0, gt=0)
    """Weight of good answers. The KTO paper recommends weight × number of 1 to 4/3 times that of bad answers."""
    undesirable_weight: float = Field(default=1.0, gt=0)
    """Weight of bad answers."""

    @model_validator(mode="after")
    def _check_batch(self) -> Self:
        if self.loss == "kto" and self.batch_size < 2:
            raise ValueError("batch_size: the kto loss compares the answers of a batch; --batch-size 2 or more")
        return self


class MergeConfig(OutputOptions, ModelOptions, CheckpointChoice):
    """Settings of `hymba-tune merge`."""

    group: ClassVar[Group] = RESULT

    model: Annotated[str, Parameter(parse=False)] = ""
    """The run."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the merged weights; auto keeps the base model's."""
    onto: Onto | None = None
    """Weights to merge an adapter into that was trained on quantized weights: dequantized (the weights of training,
    dequantized) or original. Default: dequantized, as for chat, eval, serve and export. The distance of both from the
    trained model is measured."""
    out: Path
    """Folder of the merged model; must not exist or be empty."""


class ExportConfig(OutputOptions, ModelOptions, CheckpointChoice):
    """Settings of `hymba-tune export`."""

    group: ClassVar[Group] = RESULT

    model: Annotated[str, Parameter(parse=False)] = ""
    """The model or run."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the weights; auto keeps the base model's."""
    out: Path | None = None
    """Folder of the exported model; must not exist or be empty. Default: exports/MODEL."""
    format: Literal["kit", "hymba"] = "kit"
    """kit: with this kit's modeling code, for any machine with torch and transformers 5, CPUs included. hymba: with the
    released config.json, which names NVIDIA's code; that needs CUDA, transformers 4.44 and another data
    type than float32. The weights and their names are the same, and hymba-tune opens both."""
    quantize: Scheme | None = None
    """Quantize the weights: nf4, fp4 or int8. hymba-tune quantize has more settings."""
    adapter_only: bool = False
    """Export only the adapter, as plain PEFT, for users who have the base model."""
    push: str | None = None
    """Upload to this repository of the Hugging Face Hub (USER/NAME), and create it if it does not exist."""
    private: bool = False
    """Make the repository private."""
    revision: str | None = None
    """Branch to upload to; it is created if it does not exist. Default: main."""
    update: bool = False
    """Replace the content of a repository of yours that has some, in one more commit."""
    license: str | None = None
    """License of the weights, by its id on the Hub (apache-2.0, other). Default: the base model's."""
    base_model: str | None = None
    """Hub id of the base model, if the files do not contain it."""

    @model_validator(mode="after")
    def _check_format(self) -> Self:
        if self.adapter_only and self.format != "kit":
            raise ValueError("format: an adapter has one format, PEFT's; remove --format or --adapter-only")
        if self.quantize and self.adapter_only:
            raise ValueError(
                "quantize: an adapter cannot be quantized, only its base model; remove --quantize or --adapter-only"
            )
        if self.quantize and self.format != "kit":
            raise ValueError(
                "quantize: the hymba format is for NVIDIA's code, which is untested with quantized weights; "
                "remove --quantize or --format hymba"
            )
        if self.format == "hymba" and self.dtype == "float32":
            raise ValueError("dtype: NVIDIA's code cannot compute in float32; use --dtype bfloat16")
        for field in ("private", "revision", "update"):
            if getattr(self, field) and self.push is None:
                raise ValueError(f"{field}: it applies to --push only; add --push USER/NAME")
        return self


class DoctorConfig(Config):
    """Settings of `hymba-tune doctor`."""

    group: ClassVar[Group] = COMPUTING

    device: Device = "auto"
    """Device to check: auto, cpu, cuda, cuda:1."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type to check."""
