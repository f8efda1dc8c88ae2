"""The groups of settings that verbs share; the last ones are those of training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from cyclopts import Group, Parameter
from pydantic import Field

from hymba_tune.config.base import (
    Config,
    Counts,
    Fraction,
    Keep,
    Learn,
    MetaTokens,
    Method,
    Names,
    OnBadRow,
    Pairs,
    Scheme,
    Tracker,
    Weights,
)
from hymba_tune.config.groups import ADAPTER, COMPUTING, DATA, EVALUATION, MODEL, RESULT, RUN, TRAINING


class ModelChoice(Config):
    """Which model."""

    group: ClassVar[Group] = MODEL

    model: str = "nvidia/Hymba-1.5B-Base"
    """A Hub id, an alias (hymba-1.5b, hymba-1.5b-instruct, hymba-nano), a folder, or a run directory."""


class ModelOptions(ModelChoice):
    """Which model, and in which number format."""

    group: ClassVar[Group] = COMPUTING

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the weights: auto takes bfloat16 where the device computes in it, else float32."""
    device: str = "auto"
    """auto takes the first CUDA device, else the CPU. Or: cpu, cuda, cuda:1."""


class EngineOptions(Config):
    """How the model computes."""

    group: ClassVar[Group] = COMPUTING

    kernels: Pairs = Field(default_factory=list)
    """Ways to compute, instead of the fastest: --kernels scan=torch attention=sdpa (see hymba-tune doctor)."""
    strict_length: bool = False
    """Refuse texts longer than the model was made for (max_position_embeddings), which otherwise get a warning."""


class ReadingOptions(Config):
    """How rows are read."""

    group: ClassVar[Group] = DATA

    map: Pairs = Field(default_factory=list)
    """Names of columns or roles that differ: --map prompt=question --map completion=answer --map role.bot=assistant."""
    chat_template: str | None = None
    """hymba, alpaca, or a file of Jinja. When not given: the model's own, or hymba."""
    learn: Learn = Learn.all
    """Learn all answers of a conversation, or only the last."""
    max_length: int = Field(default=2048, ge=8)
    """Tokens a row is cut to (common: 512 to 8192)."""


class OutputOptions(Config):
    """What happens where an output exists."""

    group: ClassVar[Group] = RESULT

    overwrite: bool = Field(default=False, exclude=True)
    """Replace an output that exists. A folder is replaced only if it is one of hymba-tune's and holds nothing else."""


class SourceOptions(Config):
    """Which data."""

    group: ClassVar[Group] = DATA

    data: Names = Field(default_factory=list)
    """JSONL, JSON, CSV or Parquet files, a mix of them (.yaml), a Hub dataset id, or demo (packaged)."""
    weights: Weights = Field(default_factory=list)
    """How often the rows of each source of --data are taken: --weights 1 0.3 takes three in ten of the second's."""
    caps: Counts = Field(default_factory=list)
    """Rows after which each source of --data ends."""


class HeldOutOptions(Config):
    """What is held out."""

    group: ClassVar[Group] = EVALUATION

    eval_data: Names = Field(default_factory=list)
    """Held-out data in the same formats; without it, a split of --data is held out."""
    eval_split: Fraction = 0.05
    """Share of --data that is held out when there is no --eval-data; 0 trains on everything."""
    eval_max_rows: int = Field(default=500, ge=1)
    """Rows the held-out data is cut to, so that an evaluation stays short."""


class DataOptions(HeldOutOptions, ReadingOptions, SourceOptions):
    """Which data, and how it is read."""

    group: ClassVar[Group] = DATA

    on_bad_row: OnBadRow = OnBadRow.stop
    """stop at a row that cannot be used, or skip it and list it in dropped.jsonl."""


class KeptDataOptions(DataOptions):
    """The same, where what was read is kept."""

    group: ClassVar[Group] = DATA

    cache: bool = True
    """Keep encoded data in the user's cache and find it again (hymba-tune data clear empties it)."""


class AdapterOptions(Config):
    """What is trained."""

    group: ClassVar[Group] = ADAPTER

    method: Method = Method.lora
    """lora, dora (LoRA with learned magnitudes), or full (every weight)."""
    quantize: Scheme | None = None
    """Store the weights below the adapter in fewer bits (QLoRA): nf4 (4 bits; best), fp4 or int8."""
    rank: int = Field(default=16, ge=1)
    """Rank of the adapter (common: 8 to 64)."""
    lora_alpha: float | None = Field(default=None, gt=0)
    """LoRA's alpha; the update is scaled by alpha / rank. Twice the rank when not given."""
    lora_dropout: Fraction = 0.0
    """Dropout on the adapter's input."""
    rslora: bool = False
    """Scale the update by alpha / sqrt(rank) instead."""
    targets: Names = Field(default_factory=lambda: ["all"])
    """A preset (all, attention-ssm, attention, ssm, mlp) or module names such as in_proj and x_proj.0."""
    meta_tokens: MetaTokens = MetaTokens.lora
    """How the meta tokens are trained beside an adapter: lora, full or frozen."""


class TrainingOptions(Config):
    """How long, how fast, and where to."""

    group: ClassVar[Group] = TRAINING

    epochs: float = Field(default=1.0, gt=0)
    """Passes over the data, unless --steps is given."""
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(default=8, ge=1)
    """Rows a device computes at a time."""
    grad_accum: int = Field(default=1, ge=1)
    """Batches whose gradients are added up before a step."""
    packing: bool = False
    """Fill every row to --max-length with whole documents, none of which sees another: steps of even size. Padding
    costs nothing here, packed or not."""
    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate. When not given: 2e-4 for an adapter, 2e-5 for full training."""
    lr_meta: float | None = Field(default=None, gt=0)
    """Peak learning rate of the meta tokens, or of their adapter, where it is to differ."""
    lr_ssm: float | None = Field(default=None, gt=0)
    """Peak learning rate inside the SSM, where it is to differ: x_proj and dt_proj or their adapters; in full training
    A_log, D, conv1d and its norms as well."""
    loraplus_ratio: float | None = Field(default=None, ge=1)
    """LoRA+: how many times faster the B factors learn than the A factors (common: 4 to 16)."""
    lr_schedule: Literal["cosine", "linear", "constant", "wsd", "inverse-sqrt"] = "cosine"
    """How the learning rate falls after the warm-up; wsd stays at its peak until the last --lr-decay of the steps."""
    lr_min: Fraction = 0.0
    """What cosine and wsd fall to, as a share of the peak."""
    lr_decay: float = Field(default=0.2, gt=0, le=1)
    """Share of the steps, at the end, over which wsd falls."""
    warmup: Fraction = 0.03
    """Share of the steps over which the learning rate rises."""
    optimizer: Literal[
        "adamw", "adamw8bit", "paged-adamw", "paged-adamw8bit", "lion", "lion8bit", "adafactor", "sgd"
    ] = "adamw"
    """What takes the steps. 8 bits take a quarter of the memory; paged ones lend it to the CPU when a GPU runs full."""
    weight_decay: float = Field(default=0.0, ge=0)
    """The optimizer's weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients of a larger norm are scaled down to it."""
    max_loss_spike: float | None = Field(default=5.0, gt=1)
    """Stop before a step whose loss is more than this many times the usual one: 50 steps' median, at least 1 nat."""
    neftune_alpha: float | None = Field(default=None, gt=0)
    """NEFTune: noise on the text's embeddings while training (common: 5 to 15)."""
    gradient_checkpointing: bool = False
    """Compute activations again instead of keeping them: less memory, about a third more time."""
    activation_offload: bool = False
    """Keep activations in the CPU's memory instead of the GPU's. CUDA only."""
    seed: int = Field(default=0, ge=0)
    """Seed of the data order, the adapter and dropout."""


class EvaluationOptions(Config):
    """When it is evaluated, and what follows from that."""

    group: ClassVar[Group] = EVALUATION

    eval_every: int | None = Field(default=None, ge=1)
    """Steps between two evaluations. When not given: five times a run."""
    early_stopping: int | None = Field(default=None, ge=1)
    """Stop after so many evaluations in a row without a better one."""
    keep: Keep | None = None
    """Which weights the run ends with: last, or best (of the lowest held-out loss). When not given: best with
    --early-stopping, else last."""


class RunOptions(Config):
    """What becomes of a run."""

    group: ClassVar[Group] = RUN

    out: Path | None = None
    """Run directory. When not given: runs/MODEL-DATA-TIME."""
    overwrite: bool = Field(default=False, exclude=True)
    """Replace the run in --out, once the new one has its first checkpoint; nothing but a run is replaced."""
    resume: Path | None = None
    """Run directory to go on with, from its last whole checkpoint."""
    dry_run: bool = Field(default=False, exclude=True)
    """Do everything but the training: checks, data, memory, steps. Nothing is left behind."""
    log_every: int | None = Field(default=None, ge=1)
    """Steps between two rows of the table. When not given: 10, in a short run a fifth of it."""
    save_every: int | None = Field(default=None, ge=1)
    """Steps between two checkpoints. When not given: with each evaluation."""
    track: Annotated[list[Tracker], Parameter(negative="", consume_multiple=True, show_default=False)] = Field(
        default_factory=list
    )
    """Log live to these as well: tensorboard, trackio, wandb, mlflow. Nothing leaves the machine unless you have logged
    in to one of them or pointed it elsewhere."""
