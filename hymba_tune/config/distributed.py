"""Settings of training in several processes: how they are started, and how they share the work."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from cyclopts import Group
from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator

from hymba_tune.config.base import Config
from hymba_tune.config.groups import DISTRIBUTED


def _as_text(value: Any) -> Any:
    """Turn a number, which a recipe may hold, into a text."""
    return str(value) if isinstance(value, int) else value


def _checked_count(value: str) -> str:
    if value != "auto" and not re.fullmatch("[1-9][0-9]{0,5}", value):
        raise ValueError("must be a whole number of at least 1, or auto")
    return value


def _checked_address(value: str) -> str:
    host, _, port = value.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError("must be HOST:PORT, such as 10.0.0.1:29500")
    return value


Written = Annotated[int, Field(ge=1)] | Annotated[str, Field(pattern="^(auto|[1-9][0-9]{0,5})$")]
Count = Annotated[str, BeforeValidator(_as_text, json_schema_input_type=Written), AfterValidator(_checked_count)]
Address = Annotated[str, AfterValidator(_checked_address), WithJsonSchema({"type": "string", "pattern": "^.+:[0-9]+$"})]
Strategy = Literal["ddp", "fsdp", "zero2", "zero3"]


class LaunchOptions(Config):
    """Settings of how processes are started and watched."""

    group: ClassVar[Group] = DISTRIBUTED

    nproc: Count = "1"
    """Processes on this machine, one a GPU; auto is the number of GPUs, or 1 on a CPU. Ignored where torchrun, SLURM
    or another launcher has started the processes (WORLD_SIZE is set)."""
    nnodes: int = Field(default=1, ge=1)
    """Machines that work together. Give the same command to each of them, with --rendezvous and its own --node-rank."""
    node_rank: int | None = Field(default=None, ge=0)
    """Number of this machine, from 0; machine 0 is that of --rendezvous, and writes the run. Default: in any order."""
    rendezvous: Address | None = None
    """Address at which the machines meet: HOST:PORT of the first one."""
    start_timeout: int = Field(default=600, ge=1)
    """Seconds to wait for all processes at the start, before giving up."""
    step_timeout: int = Field(default=600, ge=1)
    """Seconds without a sign of life from a process, or with a step that does not end, before all are stopped."""
    max_restarts: int = Field(default=0, ge=0)
    """Times to resume by itself, from the last complete checkpoint, when a process dies."""

    @model_validator(mode="after")
    def _check_nodes(self) -> Self:
        if self.nnodes > 1 and self.rendezvous is None:
            raise ValueError("nnodes: several machines need an address at which they meet; add --rendezvous HOST:PORT")
        if self.node_rank is not None and self.node_rank >= self.nnodes:
            raise ValueError(
                f"node_rank: {self.node_rank} is not below --nnodes {self.nnodes}; machines are counted from 0"
            )
        if self.nnodes > 1 and self.max_restarts and self.node_rank is None:
            raise ValueError("max_restarts: several machines restart in their order; add --node-rank on each")
        return self


class DistributedOptions(LaunchOptions):
    """Settings of how processes train together."""

    group: ClassVar[Group] = DISTRIBUTED

    strategy: Strategy = "ddp"
    """What the processes share: ddp copies the model to each; fsdp (FSDP2) and zero3 divide weights, gradients and
    optimizer states; zero2 divides the last two. For an adapter, ddp is the fastest."""
    global_batch: int | None = Field(default=None, ge=1)
    """Rows in an optimizer step over all processes: batch size × accumulation × processes. Sets --grad-accum."""
    offload: Literal["optimizer", "parameters"] | None = None
    """Keep in CPU memory: optimizer (its states; zero2, zero3), or parameters (and the optimizer's states; zero3,
    fsdp)."""
    accelerate_config: Path | None = None
    """A file that accelerate config has written; it is read as accelerate launch --config_file does. Flags win over
    it."""

    @model_validator(mode="after")
    def _check_strategy(self) -> Self:
        takes = {"optimizer": ("zero2", "zero3"), "parameters": ("zero3", "fsdp")}
        if self.offload and self.strategy not in takes[self.offload]:
            raise ValueError(
                f"offload: --strategy {self.strategy} keeps its {self.offload} on the GPU; "
                f"use --strategy {' or '.join(takes[self.offload])}"
            )
        if self.strategy != "ddp" and (optimizer := getattr(self, "optimizer", "adamw")) != "adamw":
            raise ValueError(
                f"strategy: {self.strategy} divides the states of adamw only; use --optimizer adamw instead of "
                f"{optimizer}, or --strategy ddp"
            )
        if self.strategy.startswith("zero") and getattr(self, "dtype", None) == "float16":
            raise ValueError(
                f"strategy: {self.strategy} scales no loss, which float16 needs; use --dtype bfloat16, or fsdp"
            )
        if getattr(self, "quantize", None) is not None and self.strategy != "ddp":
            raise ValueError(
                f"quantize: --strategy {self.strategy} cannot divide quantized weights; use --strategy ddp, which "
                "copies them to each process, or remove --quantize"
            )
        return self
