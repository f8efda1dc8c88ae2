"""What each of several processes holds of a model, its gradients and its optimizer, by strategy.

Every process computes its own batch, so activations and the loss take in each of them what they take in one.

Sources of the figures:
    DDP: PyTorch's documentation of DistributedDataParallel (gradient_as_bucket_view): gradients are copied to buckets
        that take as much memory as all of them.
    FSDP2: PyTorch's documentation and code of fully_shard (torch.distributed.fsdp, 2.13). A unit, here a decoder layer,
        is gathered while it computes, and the next one is gathered meanwhile. What lies outside of the units stays
        gathered until the backward ends. One buffer holds the gradients of a unit that are being reduced.
    ZeRO: DeepSpeed's page "Memory Requirements" and its estimate_zero2_model_states_mem_needs and
        estimate_zero3_model_states_mem_needs (0.19.8). The process that owns a trained parameter keeps, besides the
        weight and its gradient, for the step a gradient in float32, the weight in float32, and two moments of Adam.
        In 16 bits, for which the page is written, these are 2 + 18 bytes.

Weights and gradients have the dtypes that they have in one process: autocast chooses those of the computation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

from hymba_tune.config import DistributedOptions
from hymba_tune.distributed.checks import is_started
from hymba_tune.distributed.devices import count_gpus
from hymba_tune.distributed.environment import world_size
from hymba_tune.distributed.strategies import LIVE_PARAMETERS, REDUCE_BUCKET

FLOAT32 = 4
"""Bytes of the weights that DeepSpeed's optimizers keep, and of the gradients that they step with."""
ZERO2_BUCKETS = 2
"""Buckets of ZeRO-2, where one is filled while another is reduced (overlap_comm)."""


@dataclass(frozen=True)
class Sharding:
    """How the processes of a run share a model.

    Attributes:
        processes: The number of processes on all machines; each has one device.
        strategy: ``ddp``, ``fsdp``, ``zero2`` or ``zero3``.
        offload: What is moved to CPU memory: ``optimizer``, ``parameters`` (which includes the optimizer), or None.
    """

    processes: int = 1
    strategy: str = "ddp"
    offload: str | None = None

    @classmethod
    def of(cls, options: DistributedOptions) -> Sharding:
        """Return how a run is divided: among the processes that were started, or that its settings say."""
        here = (count_gpus() or 1) if options.nproc == "auto" else int(options.nproc)
        processes = world_size() if is_started() else here * options.nnodes
        return cls(processes, options.strategy, options.offload)

    def share(self, size: float) -> int:
        """Return a process's share of some bytes that are divided among all."""
        return ceil(size / self.processes)


@dataclass(frozen=True)
class Weights:
    """The weights of a model or of a part of it.

    Attributes:
        frozen: The bytes of its frozen weights.
        trained: The bytes of its trained weights, and of their gradients.
        count: The number of its trained parameters.
        parameters: The number of all its parameters.
    """

    frozen: int = 0
    trained: int = 0
    count: int = 0
    parameters: int = 0

    def __add__(self, other: Weights) -> Weights:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Weights(*(mine + theirs for mine, theirs in pairs))

    @property
    def bytes(self) -> int:
        """The bytes of all its weights."""
        return self.frozen + self.trained


@dataclass(frozen=True)
class ModelWeights:
    """The weights of a model.

    Attributes:
        layers: Those of each decoder layer.
        around: Those outside of the layers: the embedding, which is the head as well, meta tokens and the last norm.
    """

    layers: Sequence[Weights]
    around: Weights

    @property
    def whole(self) -> Weights:
        """The weights of the whole model."""
        return sum(self.layers, self.around)


@dataclass(frozen=True)
class Held:
    """The bytes that a process holds during a whole step, and the gradients that it keeps.

    Attributes:
        frozen: Frozen weights.
        trained: Trained weights.
        optimizer: The state of the optimizer.
        gathered: Weights of other processes, gathered to compute.
        buckets: Buffers for the communication of gradients.
        waiting: Gradients of earlier batches of a step.
        stepping: Gradients during the optimizer's step.
        kept: The share of each gradient that is kept once its layer's backward is done, from 0 to 1; None where
            gradients stay with their parameters.
        offloaded: Bytes of CPU memory instead.
    """

    frozen: int
    trained: int
    optimizer: int
    gathered: int
    buckets: int
    waiting: int
    stepping: int
    kept: float | None
    offloaded: int = 0

    def gradients(self, done: int, whole: int) -> int:
        """Return the bytes of gradients in a backward.

        Args:
            done: Bytes of the gradients of parameters whose backward is done.
            whole: Bytes of gradients among them that are not shared yet, as another one is added to them first.
        """
        if self.kept is None:
            return self.waiting or done
        return (self.waiting or round(self.kept * (done - whole))) + whole


def held_by_each(model: ModelWeights, sharding: Sharding, *, moment_bytes: float, accumulates: bool) -> Held:
    """Return what each process holds.

    Args:
        model: The model's weights.
        sharding: How processes share it.
        moment_bytes: Bytes of the optimizer's state for each trained parameter.
        accumulates: Whether a step has several batches.
    """
    functions = {"ddp": _ddp, "fsdp": _fsdp, "zero2": _zero2, "zero3": _zero3}
    held = functions[sharding.strategy](model, sharding)
    state = round(model.whole.count * moment_bytes)
    state = state if sharding.strategy == "ddp" else sharding.share(state)
    held = replace(held, optimizer=held.optimizer + state, waiting=held.waiting if accumulates else 0)
    return _offloaded(held, sharding)


def _ddp(model: ModelWeights, sharding: Sharding) -> Held:
    whole = model.whole
    buckets = whole.trained if sharding.processes > 1 else 0
    return Held(whole.frozen, whole.trained, 0, 0, buckets, waiting=whole.trained, stepping=whole.trained, kept=None)


def _fsdp(model: ModelWeights, sharding: Sharding) -> Held:
    """Return what a process holds with FSDP2.

    Accelerate reduces no gradients before a step's last batch, so those of earlier batches are whole.
    """
    whole = model.whole
    return Held(
        sharding.share(whole.frozen),
        sharding.share(whole.trained),
        0,
        gathered=model.around.bytes + 2 * max(layer.bytes for layer in model.layers),
        buckets=max(part.trained for part in [*model.layers, model.around]),
        waiting=whole.trained,
        stepping=sharding.share(whole.trained),
        kept=1 / sharding.processes,
    )


def _zero2(model: ModelWeights, sharding: Sharding) -> Held:
    """Return what a process holds with ZeRO-2: whole weights, and shares of the rest."""
    whole = model.whole
    return Held(
        whole.frozen,
        whole.trained,
        sharding.share(whole.count * FLOAT32),
        gathered=0,
        buckets=ZERO2_BUCKETS * _bucket_bytes(whole),
        waiting=sharding.share(whole.trained),
        stepping=sharding.share(whole.trained + whole.count * FLOAT32),
        kept=1 / sharding.processes,
    )


def _zero3(model: ModelWeights, sharding: Sharding) -> Held:
    """Return what a process holds with ZeRO-3.

    The documented formula has the largest layer only, and only one copy of the gradients. The code keeps those of the
    weights' dtype for the whole run, and layers stay gathered for their next use, up to `LIVE_PARAMETERS`.
    """
    whole = model.whole
    return replace(
        _zero2(model, sharding),
        frozen=sharding.share(whole.frozen),
        trained=sharding.share(whole.trained),
        gathered=round(whole.bytes * min(1, LIVE_PARAMETERS / whole.parameters)),
        buckets=_bucket_bytes(whole),
    )


def _bucket_bytes(whole: Weights) -> int:
    return REDUCE_BUCKET * whole.trained // whole.count


def _offloaded(held: Held, sharding: Sharding) -> Held:
    """Move to CPU memory what the settings say, with the gradients that the optimizer steps with."""
    if sharding.offload is None:
        return held
    offloaded = held.optimizer + held.stepping
    waiting = held.waiting if sharding.strategy == "fsdp" else 0  # they are whole, and not reduced yet
    held = replace(held, optimizer=0, waiting=waiting, stepping=0, kept=0)
    if sharding.offload == "parameters":
        offloaded += held.frozen + held.trained
        held = replace(held, frozen=0, trained=0)
    return replace(held, offloaded=offloaded)
