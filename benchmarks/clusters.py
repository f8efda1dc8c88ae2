"""The tables of docs/scaling.md: what 2 to 512 GPUs exchange, read and reach, computed from formulas.

    python benchmarks/clusters.py            prints them
    python benchmarks/clusters.py --write    puts them into docs/scaling.md

Nothing is measured, and nothing is loaded: the functions are those of `hymba-tune plan`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import torch

from hymba_tune.config import Method, SFTConfig
from hymba_tune.footprint import Batch, Sharding, StepMemory
from hymba_tune.footprint.cards import ETHERNET, H100, INFINIBAND
from hymba_tune.footprint.shares import ModelWeights
from hymba_tune.footprint.traffic import Collective, Network, bytes_sent, step_traffic
from hymba_tune.footprint.work import step_work
from hymba_tune.model.configuration_hymba import HymbaConfig
from hymba_tune.train.setup import lay_out

PAGE = Path(__file__).parent.parent / "docs" / "scaling.md"
GPUS = [2**power for power in range(1, 10)]
MACHINE = 8
"""GPUs of a machine."""
ROWS, LENGTH = 8, 2048
"""Rows of a GPU in a step, and tokens of a row: the defaults."""
GLOBAL_ROWS = 512
"""Rows of a step that all GPUs share, where it is fixed."""
WORTH = 1.5
"""A doubling of the GPUs pays if a step becomes faster by at least this factor."""
DATA_BYTES = 8
"""Bytes of a token in the encoded rows: its id and its label, 32 bits each."""
TOP_K = 64
"""The default of distill's --top-k."""
TARGET_BYTES = 4 + TOP_K * (2 + 2) + 2
"""Bytes of a token in a shard of targets before compression: its place, ids and logarithms of k tokens, the rest."""
TEACHER = 3.21e9
"""Parameters of Llama-3.2-3B, by its model card."""


def released() -> HymbaConfig:
    """Return the configuration of the released 1.5B model."""
    pairs = [[index, index + 1] for index in [*range(1, 15, 2), *range(19, 31, 2)]]
    return HymbaConfig(global_attn_idx=[0, 15, 31], kv_reuse_group=[*pairs, [16, 17, 18]])


@dataclass(frozen=True)
class Run:
    """A run on the released 1.5B model.

    Attributes:
        name: What is trained, and how it is divided.
        method: LoRA or every weight.
        strategy: What the processes share.
    """

    name: str
    method: Method
    strategy: str

    @cached_property
    def model(self) -> tuple[ModelWeights, float]:
        """The model's weights, and the seconds of a step for a token."""
        return weights_and_seconds(self.method)

    def sent(self, gpus: int) -> float:
        """Return the bytes that a GPU sends in a step."""
        return bytes_sent(self._traffic(gpus), gpus)

    def exchange(self, gpus: int, network: Network) -> float:
        """Return the seconds of a step's exchange."""
        return sum(network.seconds(collective, gpus) for collective in self._traffic(gpus))

    def computing(self, tokens: float) -> float:
        """Return the seconds that a GPU computes for some tokens."""
        return tokens * self.model[1]

    def _traffic(self, gpus: int) -> Sequence[Collective]:
        return step_traffic(self.model[0], Sharding(gpus, self.strategy))


@cache
def weights_and_seconds(method: Method) -> tuple[ModelWeights, float]:
    """Return the released model's weights as a method trains them, and the seconds of a batch for a token."""
    config = SFTConfig(method=method, gradient_checkpointing=True)
    dtype = torch.float32 if method is Method.full else torch.bfloat16
    model = lay_out(config, released(), dtype)
    weights, _ = StepMemory(model, dtype=torch.bfloat16, own_kernels=False).weights()
    batch = Batch.full(ROWS, LENGTH)
    work = step_work(
        model, batch, dtype=torch.bfloat16, own_kernels=False, checkpointing=True, optimizer=config.optimizer
    )
    return weights, work.seconds(H100.speeds) / batch.tokens


RUNS = [
    Run("LoRA, `ddp`", Method.lora, "ddp"),
    Run("LoRA, `fsdp`", Method.lora, "fsdp"),
    Run("every weight, `ddp`", Method.full, "ddp"),
    Run("every weight, `fsdp`", Method.full, "fsdp"),
    Run("every weight, `zero2`", Method.full, "zero2"),
    Run("every weight, `zero3`", Method.full, "zero3"),
]


def networks(gpus: int) -> dict[str, Network | None]:
    """Return the networks by name; NVLink connects one machine only."""
    devices = MACHINE if gpus > MACHINE else 1
    return {
        "NVLink": H100.network(0, MACHINE) if gpus <= MACHINE else None,
        "InfiniBand": H100.network(INFINIBAND * devices, devices),
        "Ethernet": H100.network(ETHERNET, devices),
    }


def sizes() -> Iterator[str]:
    """Yield the bytes that a GPU sends in a step of one batch."""
    yield "| GB that a GPU sends in a step | " + " | ".join(f"{gpus}" for gpus in GPUS) + " |"
    yield "|---|" + "---|" * len(GPUS)
    for run in RUNS:
        yield f"| {run.name} | " + " | ".join(three(run.sent(gpus) / 1e9) for gpus in GPUS) + " |"


def times() -> Iterator[str]:
    """Yield the seconds of a step's exchange, beside those of its computation."""
    yield "| ms of exchange in a step | over | " + " | ".join(f"{gpus}" for gpus in GPUS) + " |"
    yield "|---|---|" + "---|" * len(GPUS)
    for run in RUNS:
        for name in networks(2):
            cells = [
                "" if network is None else three(1e3 * run.exchange(gpus, network))
                for gpus in GPUS
                for network in [networks(gpus)[name]]
            ]
            yield f"| {run.name} | {name} | " + " | ".join(cells) + " |"


def efficiencies() -> Iterator[str]:
    """Yield the share of the time that GPUs compute, where each has as many rows as alone."""
    yield "| % of the time spent computing | over | " + " | ".join(f"{gpus}" for gpus in GPUS) + " |"
    yield "|---|---|" + "---|" * len(GPUS)
    for run in RUNS:
        alone = run.computing(ROWS * LENGTH)
        for name in networks(2):
            cells = [
                "" if network is None else f"{100 * alone / (alone + run.exchange(gpus, network)):.0f}"
                for gpus in GPUS
                for network in [networks(gpus)[name]]
            ]
            yield f"| {run.name} | {name} | " + " | ".join(cells) + " |"


def speedup(run: Run, name: str, gpus: int) -> float:
    """Return how much faster a step of `GLOBAL_ROWS` rows is than on one GPU; GPUs of a machine are on NVLink."""
    alone = run.computing(GLOBAL_ROWS * LENGTH)
    if gpus == 1:
        return 1.0
    known = networks(gpus)
    network = known["NVLink"] or known[name]
    assert network is not None
    return alone / (alone / gpus + run.exchange(gpus, network))


def limits() -> Iterator[str]:
    """Yield how many GPUs pay where the rows of a step are fixed."""
    yield f"| {GLOBAL_ROWS} rows in a step | over | " + " | ".join(f"{gpus}" for gpus in GPUS) + " | pays up to |"
    yield "|---|---|" + "---|" * (len(GPUS) + 1)
    for run in RUNS:
        for name in ("InfiniBand", "Ethernet"):
            speeds = [speedup(run, name, gpus) for gpus in [1, *GPUS]]
            pays = 1
            for gpus, before, after in zip(GPUS, speeds[:-1], speeds[1:], strict=True):
                if after < WORTH * before:
                    break
                pays = gpus
            yield f"| {run.name} | {name} | " + " | ".join(three(speed) for speed in speeds[1:]) + f" | {pays} |"


def rates() -> Iterator[str]:
    """Yield what has to be read, and what a teacher has to do, at the speed of GPUs that only compute."""
    yield "| GPUs | tokens/s | rows, MB/s | targets, MB/s | of them a machine | teacher GPUs to keep up |"
    yield "|---|---|---|---|---|---|"
    run = RUNS[0]
    alone = 1 / run.computing(1)
    teacher = H100.speeds.operations / (2 * TEACHER)
    for gpus in [1, *GPUS]:
        speed = gpus * alone
        targets = speed * TARGET_BYTES / 1e6
        share = targets / max(1, gpus / MACHINE)
        cells = [f"{speed:,.0f}", three(speed * DATA_BYTES / 1e6), three(targets), three(share), three(speed / teacher)]
        yield f"| {gpus} | " + " | ".join(cells) + " |"


def three(value: float) -> str:
    """Return a number with three digits, or all before the point."""
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


TABLES = {"bytes": sizes, "time": times, "efficiency": efficiencies, "limit": limits, "rates": rates}
"""The tables by the names that stand in the page's comments."""


def computed(page: str) -> str:
    """Return a page with its tables computed anew; each stands between two comments."""
    for name, table in TABLES.items():
        begin, end = f"<!-- {name}: computed by benchmarks/clusters.py -->\n", f"<!-- end of {name} -->"
        before, _, rest = page.partition(begin)
        _, _, after = rest.partition(end)
        page = f"{before}{begin}" + "".join(f"{line}\n" for line in table()) + end + after
    return page


def main() -> None:
    """Print the tables, or write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put them into docs/scaling.md")
    if parser.parse_args().write:
        PAGE.write_text(computed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        return
    for table in TABLES.values():
        sys.stdout.write("".join(f"{line}\n" for line in table()) + "\n")


if __name__ == "__main__":
    main()
