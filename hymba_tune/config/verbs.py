"""The settings of each verb: the groups it takes, and its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from cyclopts import Group, Parameter
from pydantic import Field, model_validator

from hymba_tune.config.base import (
    NATS_PER_TOKEN,
    Accuracy,
    Config,
    Keep,
    MetaTokens,
    Method,
    Onto,
    ReferenceSource,
    Scheme,
    Start,
    Verb,
)
from hymba_tune.config.groups import COMPUTING, PREFERENCES, RESULT
from hymba_tune.config.options import (
    AdapterOptions,
    DataOptions,
    EngineOptions,
    EvaluationOptions,
    KeptDataOptions,
    ModelOptions,
    OutputOptions,
    RunOptions,
    TrainingOptions,
)


class TrainingConfig(
    RunOptions, EvaluationOptions, TrainingOptions, AdapterOptions, DataOptions, EngineOptions, ModelOptions
):
    """What every kind of training is told."""

    verb: ClassVar[Verb]
    """The command that trains with these settings."""
    learning_rates: ClassVar[Mapping[Method, float]]
    """What ``lr`` is when it is not given."""

    @classmethod
    def of(cls, verb: str) -> type[TrainingConfig]:
        """The settings of a verb that trains.

        Raises:
            ValueError: If there is no such verb.
        """
        known = cls.by_verb()
        if verb not in known:
            raise ValueError(f"verb is {verb!r}, expected one of {', '.join(known)}")
        return known[verb]

    @classmethod
    def by_verb(cls) -> dict[str, type[TrainingConfig]]:
        """The settings of every verb that trains, by its name."""
        training = (kind for kind in cls.kinds() if issubclass(kind, TrainingConfig) and "verb" in vars(kind))
        return {kind.verb.name: kind for kind in training}

    @property
    def inputs(self) -> list[str]:
        """What is read, by the names that the user gave; some may be files and folders of this machine."""
        return [*self.data, *self.eval_data, self.chat_template or ""]

    @property
    def keeps_best(self) -> bool:
        """Whether the run ends with the weights of its best evaluation."""
        return self.keep is Keep.best or (self.keep is None and self.early_stopping is not None)

    @model_validator(mode="after")
    def _check_rates(self) -> Self:
        if self.lr_min and self.lr_schedule not in ("cosine", "wsd"):
            raise ValueError(f"lr_min: {self.lr_schedule} has no lowest rate; cosine and wsd have")
        if self.loraplus_ratio is not None and self.method is Method.full:
            raise ValueError("loraplus_ratio: --method full has no factors A and B; use lora or dora")
        if self.lr_meta is not None and self.method is not Method.full and self.meta_tokens is MetaTokens.frozen:
            raise ValueError("lr_meta: the meta tokens are not trained; use --meta-tokens lora or full")
        if self.lr_ssm is not None and self.method is not Method.full and not self._adapts_ssm():
            raise ValueError(f"lr_ssm: nothing inside the SSM is among the targets: {' '.join(self.targets)}")
        return self

    def _adapts_ssm(self) -> bool:
        inside = ("all", "attention-ssm", "ssm", "x_proj.0", "dt_proj.0")
        return any(target.endswith(inside) for target in self.targets)

    @model_validator(mode="after")
    def _check_quantize(self) -> Self:
        if self.quantize is not None and self.method is Method.full:
            raise ValueError(
                "quantize: --method full trains every weight, and weights in a few bits cannot be trained; "
                "use --method lora, or leave --quantize out"
            )
        if self.quantize is Scheme.int8 and self.method is Method.dora:
            raise ValueError(
                "quantize: DoRA needs the norms of the weights, and PEFT cannot take int8's apart for it; "
                "use --quantize nf4, or --method lora"
            )
        return self

    @model_validator(mode="after")
    def _check_targets(self) -> Self:
        if self.method is Method.full and self.targets != ["all"]:
            raise ValueError("targets: --method full trains every weight; leave --targets out, or use lora or dora")
        if self.method is Method.dora and self.targets in (["attention"], ["ssm"]):
            raise ValueError(
                f"targets: {self.targets[0]} adapts only some rows of in_proj, and DoRA's magnitudes change every row; "
                "use --method lora, or --targets attention-ssm"
            )
        return self


class SFTConfig(TrainingConfig, KeptDataOptions):
    """Supervised fine-tuning."""

    verb: ClassVar[Verb] = Verb(
        "sft", "Fine-tuning", NATS_PER_TOKEN, paired=False, logit_copies=0, accuracy=None, figures=()
    )
    learning_rates: ClassVar[Mapping[Method, float]] = {Method.lora: 2e-4, Method.dora: 2e-4, Method.full: 2e-5}


class PreferenceConfig(TrainingConfig, KeptDataOptions):
    """Training on which of two answers is better."""

    group: ClassVar[Group] = PREFERENCES

    @model_validator(mode="after")
    def _check_packing(self) -> Self:
        if self.packing:
            raise ValueError("packing: answers are compared side by side, not packed; leave it out")
        return self


class ReferenceConfig(PreferenceConfig):
    """Preference training against a reference model."""

    group: ClassVar[Group] = PREFERENCES

    learning_rates: ClassVar[Mapping[Method, float]] = {Method.lora: 5e-5, Method.dora: 5e-5, Method.full: 1e-6}
    beta: float = Field(default=0.1, gt=0)
    """How closely the model is held to the reference (common: 0.01 to 0.5); of the ipo loss, its tau."""
    start: Start = Start.merge
    """Where to start from a run: merge its adapter into its base and train a new one, the reference being the run's
    model; or continue its adapter, the reference being that adapter as it is now."""
    reference: ReferenceSource = ReferenceSource.auto
    """Where the reference's log-probabilities come from: adapter-off computes them beside each batch with the adapter
    switched off; precompute once, before training. When not given: precompute where there is no new adapter to switch
    off (--method full, --start continue), else adapter-off."""
    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate. When not given: 5e-5 for an adapter, 1e-6 for full training."""

    @property
    def precomputes(self) -> bool:
        """Whether the reference is computed once, before training."""
        given = self.reference is ReferenceSource.precompute
        return given or self.method is Method.full or self.start is Start.continue_

    @model_validator(mode="after")
    def _check_reference(self) -> Self:
        if self.reference is ReferenceSource.adapter_off and self.precomputes:
            what = "--method full" if self.method is Method.full else "--start continue"
            raise ValueError(f"reference: {what} has no new adapter to switch off; use --reference precompute")
        return self


SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")
"""DPO's losses with label smoothing."""


class DPOConfig(ReferenceConfig):
    """Direct preference optimization."""

    verb: ClassVar[Verb] = Verb(
        "dpo",
        "Preference training (DPO)",
        loss_unit="",
        paired=True,
        logit_copies=0,
        accuracy=Accuracy("pairs", "ranked correctly", chance=0.5),
        figures=("accuracy", "margin"),
    )
    loss: Literal[
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
    ] = "sigmoid"
    """The loss, by TRL's names: sigmoid is DPO's own, robust allows for swapped pairs (--label-smoothing)."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of the pairs that are taken to be swapped, of the losses robust, exo_pair, aot and aot_unpaired."""

    @model_validator(mode="after")
    def _check_loss(self) -> Self:
        if self.label_smoothing and self.loss not in SMOOTHED:
            raise ValueError(f"label_smoothing: the {self.loss} loss has none; {', '.join(SMOOTHED)} have")
        if self.loss == "exo_pair" and not self.label_smoothing:
            raise ValueError("label_smoothing: the exo_pair loss needs some; --label-smoothing 0.001 is its paper's")
        return self


class KTOConfig(ReferenceConfig):
    """Kahneman-Tversky optimization, on answers that are judged one by one."""

    verb: ClassVar[Verb] = Verb(
        "kto",
        "Preference training (KTO)",
        loss_unit="",
        paired=False,
        logit_copies=0,
        accuracy=Accuracy("answers", "classified correctly", chance=None),
        figures=("accuracy", "margin"),
    )
    loss: Literal["kto", "apo_zero_unpaired"] = "kto"
    """The loss, by TRL's names."""
    desirable_weight: float = Field(default=1.0, gt=0)
    """Weight of good answers. KTO's paper wants weight × number within 1 to 4/3 of that of bad ones."""
    undesirable_weight: float = Field(default=1.0, gt=0)
    """Weight of bad answers."""

    @model_validator(mode="after")
    def _check_batch(self) -> Self:
        if self.loss == "kto" and self.batch_size < 2:
            raise ValueError("batch_size: the kto loss compares the answers of a batch; --batch-size 2 or more")
        return self


class MergeConfig(OutputOptions, ModelOptions):
    """Folding an adapter into its base model."""

    group: ClassVar[Group] = RESULT

    model: Annotated[str, Parameter(parse=False)] = ""
    """The run."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the merged weights: auto keeps the base model's."""
    onto: Onto | None = None
    """Of an adapter that was trained on quantized weights: fold it into what those weights dequantize to, as the model
    was while it was trained, or into the original ones. When not given: dequantized, as chat, eval, serve and export
    do. How far both are from the trained model is measured."""
    out: Path
    """Folder of the merged model; must not exist or be empty."""


class ExportConfig(OutputOptions, ModelOptions):
    """Making a model ready to be loaded anywhere, and publishing it."""

    group: ClassVar[Group] = RESULT

    model: Annotated[str, Parameter(parse=False)] = ""
    """The model or run."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the weights: auto keeps the base model's."""
    out: Path | None = None
    """Folder of the exported model; must not exist or be empty. When not given: exports/MODEL."""
    format: Literal["kit", "hymba"] = "kit"
    """kit: with this kit's code beside the weights, for any machine with torch and transformers 5, CPUs included.
    hymba: with the released config.json, which names NVIDIA's code; that needs CUDA and transformers 4.44. The weights
    and their names are the same, and hymba-tune opens both."""
    quantize: Scheme | None = None
    """Store the weights in fewer bits, as hymba-tune quantize does, which has more to choose: nf4, fp4 or int8."""
    adapter_only: bool = False
    """Only the adapter, as plain PEFT, for those who have the base model."""
    push: str | None = None
    """Upload to this repository of the Hugging Face Hub, USER/NAME, which is made if there is none."""
    private: bool = False
    """Make the repository a private one."""
    revision: str | None = None
    """Branch of the repository to upload to, which is made if there is none; main when not given."""
    update: bool = False
    """Replace what a repository of yours holds already, as one more commit."""
    license: str | None = None
    """License of the weights, by the Hub's id of it (apache-2.0, other). When not given: the base model's."""
    base_model: str | None = None
    """The base model's Hub id, where the files do not say it."""

    @model_validator(mode="after")
    def _check_format(self) -> Self:
        if self.adapter_only and self.format != "kit":
            raise ValueError("format: an adapter has one format, PEFT's; leave it out, or --adapter-only")
        if self.quantize and self.adapter_only:
            raise ValueError("quantize: an adapter is not quantized, its base is; leave it out, or --adapter-only")
        if self.quantize and self.format != "kit":
            raise ValueError(
                "quantize: the hymba format is for NVIDIA's code, which was not tried with quantized weights; "
                "leave it out, or --format hymba"
            )
        for field in ("private", "revision", "update"):
            if getattr(self, field) and self.push is None:
                raise ValueError(f"{field}: nothing is uploaded without --push USER/NAME")
        return self


class DoctorConfig(Config):
    """What this machine can do."""

    group: ClassVar[Group] = COMPUTING

    device: str = "auto"
    """The device to ask about: auto, cpu, cuda, cuda:1."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The number format to ask about."""
