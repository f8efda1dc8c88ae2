"""The groups of settings that verbs share; those of training come last."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from cyclopts import Group, Parameter
from pydantic import Field

from hymba_tune.config.base import (
    Comparison,
    Config,
    Counts,
    Device,
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
from hymba_tune.config.groups import ADAPTER, COMPUTING, DATA, EVALUATION, FIRST, MODEL, RESULT, RUN, TRAINING


class ModelChoice(Config):
    """Setting of the model."""

    group: ClassVar[Group] = MODEL

    model: Annotated[str, FIRST] = "nvidia/Hymba-1.5B-Base"
    """A Hub id, an alias (hymba-1.5b, hymba-1.5b-instruct, hymba-nano), a folder, or a run directory."""


class CheckpointChoice(Config):
    """Setting of a run's checkpoint."""

    group: ClassVar[Group] = MODEL

    checkpoint: str | None = None
    """Use a checkpoint of the run instead of its result: last, best (lowest held-out loss of those kept), or a step."""


class ModelOptions(ModelChoice):
    """Settings of the model, its data type and its device."""

    group: ClassVar[Group] = COMPUTING

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the weights; auto is bfloat16 if the device computes in it, else float32."""
    device: Device = "auto"
    """Device: auto (the first CUDA device, else the CPU), cpu, cuda, cuda:1."""


class EngineOptions(Config):
    """Settings of how the model computes."""

    group: ClassVar[Group] = COMPUTING

    kernels: Pairs = Field(default_factory=list)
    """Kernels to use instead of the fastest: --kernels scan=torch attention=sdpa (see hymba-tune doctor)."""
    strict_length: bool = False
    """Refuse texts longer than the model's context (max_position_embeddings) instead of warning."""


class DecodingOptions(Config):
    """Setting of how texts are generated."""

    group: ClassVar[Group] = COMPUTING

    cuda_graphs: bool = False
    """Replay the steps of generation as CUDA graphs, so that the GPU does not wait for Python between kernels. CUDA
    only. Off by default: it has not run on a GPU yet, only on a simulated one."""


class ReadingOptions(Config):
    """Settings of how rows are read."""

    group: ClassVar[Group] = DATA

    map: Annotated[Pairs, FIRST] = Field(default_factory=list)
    """Column and role names that differ: --map prompt=question --map completion=answer --map role.bot=assistant."""
    chat_template: str | None = None
    """Chat template: hymba, alpaca, or a Jinja file. Default: the model's own, or hymba."""
    learn: Learn = Learn.all
    """Compute the loss on all answers of a conversation, or only on the last."""
    escape_special_tokens: bool = False
    """Write special tokens inside texts as plain text, with a space in them, so that they end no answer."""
    max_length: Annotated[int, FIRST] = Field(default=2048, ge=8)
    """Maximum tokens of a row; longer rows are cut (common: 512 to 8192)."""


class OutputOptions(Config):
    """Setting for an output that exists."""

    group: ClassVar[Group] = RESULT

    overwrite: bool = Field(default=False, exclude=True)
    """Replace an existing output. A folder is replaced only if hymba-tune created it and it has no other files."""


class SourceOptions(Config):
    """Settings of the training data."""

    group: ClassVar[Group] = DATA

    data: Annotated[Names, FIRST] = Field(default_factory=list)
    """JSONL, JSON, CSV or Parquet files, a mix of them (.yaml), a Hub dataset id, or demo (packaged)."""
    weights: Weights = Field(default_factory=list)
    """Sampling weight of each source of --data: 0.3 keeps 30 % of its rows, 2.5 repeats rows 2.5 times on average."""
    caps: Counts = Field(default_factory=list)
    """Maximum rows of each source of --data."""


class HeldOutOptions(Config):
    """Settings of the held-out data."""

    group: ClassVar[Group] = EVALUATION

    eval_data: Annotated[Names, FIRST] = Field(default_factory=list)
    """Held-out data in the same formats. Default: a split of --data."""
    eval_split: Fraction = 0.05
    """Share of --data to hold out if there is no --eval-data; 0 trains on everything."""
    eval_max_rows: int = Field(default=500, ge=1)
    """Maximum rows of held-out data, to keep evaluations short."""


class DataOptions(HeldOutOptions, ReadingOptions, SourceOptions):
    """Settings of the data and of how it is read."""

    group: ClassVar[Group] = DATA

    on_bad_row: OnBadRow = OnBadRow.stop
    """What to do with a row that cannot be used: stop, or skip it and list it in dropped.jsonl."""


class KeptDataOptions(DataOptions):
    """Settings of data whose encoded rows are cached."""

    group: ClassVar[Group] = DATA

    cache: bool = True
    """Cache encoded data, keyed by file content (hymba-tune data clear empties the cache)."""


class AdapterOptions(Config):
    """Settings of the weights that are trained."""

    group: ClassVar[Group] = ADAPTER

    method: Annotated[Method, FIRST] = Method.lora
    """lora, dora (LoRA with learned magnitudes), or full (every weight)."""
    quantize: Annotated[Scheme | None, FIRST] = None
    """Quantize the base model's weights (QLoRA): nf4 (4 bits; best), fp4 or int8."""
    rank: Annotated[int, FIRST] = Field(default=16, ge=1)
    """Rank of the adapter (common: 8 to 64)."""
    lora_alpha: float | None = Field(default=None, gt=0)
    """LoRA alpha; the update is scaled by alpha / rank. Default: twice the rank."""
    lora_dropout: Fraction = 0.0
    """Dropout on the adapter's input."""
    rslora: bool = False
    """Scale the update by alpha / sqrt(rank) instead (rsLoRA)."""
    targets: Names = Field(default_factory=lambda: ["all"])
    """A preset (all, attention-ssm, attention, ssm, mlp) or module names such as in_proj and x_proj.0."""
    meta_tokens: MetaTokens = MetaTokens.lora
    """How the meta tokens are trained when an adapter is: lora, full or frozen."""
    resize: bool = False
    """Add rows to the embedding and the head for tokens of the tokenizer that the model lacks, and train them."""


class TrainingOptions(Config):
    """Settings of the training steps."""

    group: ClassVar[Group] = TRAINING

    epochs: Annotated[float | None, FIRST] = Field(default=None, gt=0, le=1e6)
    """Passes over the data; ignored with --steps. Default: 1, and more on few rows for models smaller than
    Hymba-1.5B."""
    steps: Annotated[int | None, FIRST] = Field(default=None, ge=1)
    """Optimizer steps."""
    batch_size: Annotated[int, FIRST] = Field(default=8, ge=1)
    """Rows in a batch on each device."""
    grad_accum: Annotated[int, FIRST] = Field(default=1, ge=1)
    """Gradient accumulation: batches in an optimizer step."""
    packing: bool = False
    """Pack whole documents into rows of --max-length, for steps of even size. No document sees another. Padding costs
    nothing here, packed or not."""
    lr: Annotated[float | None, FIRST] = Field(default=None, gt=0)
    """Peak learning rate. Default: 2e-4 for an adapter, 2e-5 for full training, and up to 20 times that for models
    smaller than Hymba-1.5B."""
    lr_meta: float | None = Field(default=None, gt=0)
    """Separate peak learning rate of the meta tokens, or of their adapter."""
    lr_ssm: float | None = Field(default=None, gt=0)
    """Separate peak learning rate inside the SSM: of x_proj and dt_proj or their adapters; in full training also of
    A_log, D, conv1d and the SSM's norms."""
    loraplus_ratio: float | None = Field(default=None, ge=1)
    """LoRA+: learning rate of the B factors divided by that of the A factors (common: 4 to 16)."""
    lr_schedule: Literal["cosine", "linear", "constant", "wsd", "inverse-sqrt"] = "cosine"
    """Learning rate schedule after the warm-up; wsd stays at the peak until the last --lr-decay of the steps."""
    lr_min: Fraction = 0.0
    """Final learning rate of cosine and wsd, as a share of the peak."""
    lr_decay: float = Field(default=0.2, gt=0, le=1)
    """Share of the steps, at the end, over which wsd decays."""
    warmup: Fraction = 0.03
    """Share of the steps for the learning rate warm-up."""
    optimizer: Literal[
        "adamw", "adamw8bit", "paged-adamw", "paged-adamw8bit", "lion", "lion8bit", "adafactor", "sgd"
    ] = "adamw"
    """Optimizer; 8-bit variants take a quarter of the memory, paged ones use CPU memory when the GPU is full."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of the optimizer."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Maximum gradient norm; larger gradients are clipped to it."""
    max_loss_spike: float | None = Field(default=5.0, gt=1)
    """Stop before a step whose loss is above this multiple of the usual one (the median of 50 steps, at least 1 nat),
    or near that of a uniform guess."""
    neftune_alpha: float | None = Field(default=None, gt=0)
    """NEFTune: scale of the noise on the embeddings during training (common: 5 to 15)."""
    gradient_checkpointing: Annotated[bool, FIRST] = False
    """Recompute activations instead of storing them: less memory, about a third more time."""
    activation_offload: bool = False
    """Store activations in CPU memory instead of GPU memory. CUDA only."""
    seed: int = Field(default=0, ge=0)
    """Random seed of the data order, the adapter and dropout."""


class EvaluationOptions(Config):
    """Settings of evaluation during training."""

    group: ClassVar[Group] = EVALUATION

    eval_every: int | None = Field(default=None, ge=1)
    """Steps between two evaluations. Default: five evaluations in a run."""
    early_stopping: int | None = Field(default=None, ge=1)
    """Stop after this many evaluations in a row without improvement."""
    keep: Keep | None = None
    """Weights that the run ends with: last, or best (lowest held-out loss). Default: best with --early-stopping, else
    last."""


class AnswerOptions(Config):
    """Counting right answers."""

    group: ClassVar[Group] = EVALUATION

    answers: Annotated[Comparison | None, FIRST] = None
    """Answer the prompts of the held-out data before and after training, and count the right answers: by what follows
    #### (gsm8k), by the last number, or by the whole answer (exact). Needs --eval-data, or data that comes with it."""


class RunOptions(Config):
    """Settings of the run directory, logging and checkpoints."""

    group: ClassVar[Group] = RUN

    out: Annotated[Path | None, FIRST] = None
    """Run directory. Default: runs/MODEL-DATA-TIME."""
    overwrite: bool = Field(default=False, exclude=True)
    """Replace the run in --out once the new run has its first checkpoint. Only runs are ever replaced."""
    resume: Annotated[Path | None, FIRST] = None
    """Run directory to resume, from its last complete checkpoint."""
    dry_run: Annotated[bool, FIRST] = Field(default=False, exclude=True)
    """Do everything except training: checks, data, memory, steps. Leaves no files."""
    log_every: int | None = Field(default=None, ge=1)
    """Steps between two rows of the table. Default: 10, or a fifth of a short run."""
    save_every: int | None = Field(default=None, ge=1)
    """Steps between two checkpoints. Default: with each evaluation."""
    track: Annotated[list[Tracker], Parameter(negative="", consume_multiple=True, show_default=False)] = Field(
        default_factory=list
    )
    """Also log live to tensorboard, trackio, wandb or mlflow. Nothing leaves the machine unless you have logged in to
    one of them or set another address for it."""
