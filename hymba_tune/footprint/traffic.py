"""The bytes that the processes of a run exchange in a step, and the time that this takes at least.

Sources of the figures:
    Bytes that a process sends: NCCL's page "Performance reported by NCCL tests": with n processes, 2 (n - 1) / n of the
        tensor in an all-reduce, (n - 1) / n in an all-gather or a reduce-scatter. The slowest link bounds the speed.
    Time before the first byte: NCCL's own model of its ring and tree (src/graph/tuning.cc, the protocol Simple).
    Which tensors: the ZeRO paper (Rajbhandari et al. 2020, section 7), and the code of torch 2.13, Accelerate 1.15 and
        DeepSpeed 0.19.8, where it differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log2

from hymba_tune.distributed.strategies import REDUCE_BUCKET
from hymba_tune.footprint.shares import ModelWeights, Sharding

ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER = "all-reduce", "all-gather", "reduce-scatter"
DDP_BUCKET = 25 * 2**20
"""Bytes of a bucket of DistributedDataParallel (bucket_cap_mb)."""
GATHER_BUCKET = 5 * 10**8
"""Parameters that ZeRO-2 gathers at a time after a step (allgather_bucket_size)."""
PREFETCH_BUCKET = 5 * 10**7
"""Parameters that ZeRO-3 gathers at a time (stage3_prefetch_bucket_size)."""
START, IN_MACHINE, IN_MACHINE_TREE, BETWEEN = 8.4e-6, 3.4e-6, 4.0e-6, 14e-6
"""Seconds of NCCL's model: to start an operation, and for each hop of a ring or tree over NVLink, or to another machine
(baseLat and hwLat, NVLINK and NET)."""


@dataclass(frozen=True)
class Collective:
    """The operations of one kind in a step.

    Attributes:
        kind: ``all-reduce``, ``all-gather`` or ``reduce-scatter``.
        size: The bytes of the tensors that all processes have in common, over all operations.
        operations: The number of operations.
    """

    kind: str
    size: int
    operations: int

    def sent(self, processes: int) -> float:
        """Return the bytes that a process sends, and receives."""
        passes = 2 if self.kind == ALL_REDUCE else 1
        return passes * self.size * (processes - 1) / processes


@dataclass(frozen=True)
class Network:
    """The links of a cluster of equal machines.

    Attributes:
        inside: Bytes a second that a device sends to others of its machine.
        between: Bytes a second that a machine sends to others, over all its ports.
        devices: The devices of a machine.
    """

    inside: float
    between: float
    devices: int

    def seconds(self, collective: Collective, processes: int) -> float:
        """Return the time of a step's operations of one kind, which do not overlap with each other or with others.

        A ring through all devices crosses each machine's ports once, so both speeds bound it alike.
        """
        machines = ceil(processes / self.devices)
        speed = min(self.inside, self.between) if machines > 1 else self.inside
        passes = 2 if collective.kind == ALL_REDUCE else 1
        across = passes * (machines - 1)
        latency = START + (passes * (processes - 1) - across) * IN_MACHINE + across * BETWEEN
        if collective.kind == ALL_REDUCE:
            # NCCL takes a tree where it starts sooner.
            hops = (processes / machines - 1) * IN_MACHINE_TREE + log2(machines) * BETWEEN
            latency = min(latency, START + 2 * hops)
        return collective.sent(processes) / speed + collective.operations * latency


def step_traffic(model: ModelWeights, sharding: Sharding, *, batches: int = 1) -> list[Collective]:
    """Return the operations of an optimizer step.

    Args:
        model: The model's weights.
        sharding: How processes share it.
        batches: The batches of a step (gradient accumulation).
    """
    if sharding.processes == 1:
        return []
    functions = {"ddp": _ddp, "fsdp": _fsdp, "zero2": _zero2, "zero3": _zero3}
    return functions[sharding.strategy](model, batches)


def bytes_sent(traffic: Sequence[Collective], processes: int) -> float:
    """Return the bytes that a process sends in a step."""
    return sum(collective.sent(processes) for collective in traffic)


def _ddp(model: ModelWeights, batches: int) -> list[Collective]:
    """Return one all-reduce of the gradients after the last batch."""
    del batches
    size = model.whole.trained
    return [Collective(ALL_REDUCE, size, ceil(size / DDP_BUCKET))]


def _fsdp(model: ModelWeights, batches: int) -> list[Collective]:
    """Return the gathers of each layer in the forward and the backward of each batch, and one reduction."""
    layers, units = sum(layer.bytes for layer in model.layers), len(model.layers)
    reduced = sum(part.count > 0 for part in [*model.layers, model.around])
    return [
        Collective(ALL_GATHER, batches * (2 * layers + model.around.bytes), batches * (2 * units + 1)),
        Collective(REDUCE_SCATTER, model.whole.trained, reduced),
    ]


def _zero2(model: ModelWeights, batches: int) -> list[Collective]:
    """Return the reduction of each batch's gradients, and the gather of the new weights.

    By default DeepSpeed reduces by an all-reduce of each bucket (use_multi_rank_bucket_allreduce), twice the bytes of
    the reduce-scatter that the paper has.
    """
    whole = model.whole
    return [
        Collective(ALL_REDUCE, batches * whole.trained, batches * ceil(whole.count / REDUCE_BUCKET)),
        Collective(ALL_GATHER, whole.trained, ceil(whole.count / GATHER_BUCKET)),
    ]


def _zero3(model: ModelWeights, batches: int) -> list[Collective]:
    """Return the gathers of the weights in the forward and the backward of each batch, and its reduction.

    Layers that are still gathered from the forward are counted as gathered again, so it may be less.
    """
    whole = model.whole
    return [
        Collective(ALL_GATHER, batches * 2 * whole.bytes, batches * 2 * ceil(whole.parameters / PREFETCH_BUCKET)),
        Collective(REDUCE_SCATTER, batches * whole.trained, batches * ceil(whole.count / REDUCE_BUCKET)),
    ]
