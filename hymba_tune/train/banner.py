"""What a run is about to do, in a few lines."""

from __future__ import annotations

import torch

from hymba_tune.adapters import count_parameters, describe, folding_note, short_count
from hymba_tune.config import Method
from hymba_tune.train.limits import GB, memory_advice
from hymba_tune.train.memory_estimate import MemoryEstimate
from hymba_tune.train.outline import Outline
from hymba_tune.train.setup import Data, Setup


def describe_run(setup: Setup, data: Data, outline: Outline, memory_estimate: MemoryEstimate) -> dict[str, str]:
    """A label and a line for each thing worth knowing before a run."""
    config, report = setup.config, data.report
    trainable, total = count_parameters(outline.model)
    size = total if config.method is Method.full else total - trainable
    dtype = str(setup.dtype).removeprefix("torch.")
    stored = f"{setup.scheme} weights · " if setup.scheme else ""
    dropped = {"too long": report.too_long, "bad row" if report.bad_rows == 1 else "bad rows": report.bad_rows}
    lost = [f"{count:,} {why}" for why, count in dropped.items() if count]
    lengths = f"up to {config.max_length:,} tokens each"
    if outline.packed_share is not None:
        lengths = f"packed to {config.max_length:,}, {outline.packed_share:.1%} full"
    lines = {
        "model": f"{setup.source.name} · {short_count(size)} · {stored}{dtype} · {device_in_words(setup.device)}",
        **({"weights": note} if (note := None if setup.continues else folding_note(setup.source)) else {}),
        "kernels": " · ".join(f"{name} {choice.taken}" for name, choice in setup.kernels.items()),
        "trained": describe(outline.model, config.targets),
        "data": " · ".join(
            [
                *data.summary,
                f"{len(data.held_out):,} held out" if data.held_out is not None else "none held out",
                *([f"dropped {', '.join(lost)} → {setup.run.path / 'dropped.jsonl'}"] if lost else []),
            ]
        ),
        **({"mix": shares} if (shares := report.shares()) else {}),
        "batch": " · ".join(
            [f"{config.batch_size} × {config.grad_accum} (accumulation)", lengths, f"{outline.steps:,} steps"]
        ),
        **({"optimizer": line} if (line := _optimizer(setup, outline)) else {}),
        "memory": describe_memory(setup, memory_estimate),
        "run": str(setup.run.path),
    }
    were = "row is longer than --max-length and was"
    if report.cut > 1:
        were = "rows are longer than --max-length and were"
    cut = f"{report.cut:,} {were} cut to it" if report.cut else None
    if notes := [note for note in (cut, data.length_warning) if note]:
        lines["note"] = " · ".join(notes)
    return lines


def _optimizer(setup: Setup, outline: Outline) -> str:
    """What there is to say of an optimizer that is not the usual one, or of rates that differ."""
    config = setup.config
    rates = {group["name"].removesuffix(", no decay"): group["lr"] for group in outline.groups}
    said: list[str] = [config.optimizer] if config.optimizer != "adamw" or len(rates) > 1 else []
    if config.optimizer.startswith("paged") and setup.device.type == "cpu":
        said.append("not paged: there is no GPU to page out of")
    return " · ".join(said + ([f"{name} {rate:.1e}" for name, rate in rates.items()] if len(rates) > 1 else []))


def describe_memory(setup: Setup, memory_estimate: MemoryEstimate) -> str:
    """What a run is estimated to take of memory, and what to change where that is more than there is."""
    line = f"needs about {memory_estimate.needs / GB:.1f} of {memory_estimate.has / GB:.1f} GB"
    return line if memory_estimate.fits else f"{line}, and may run out: {memory_advice(setup.config)[0]}"


def device_in_words(device: torch.device) -> str:
    """A device, what it is, and of how many it is one."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory / 2**30
        others = f", 1 of {count} GPUs" if (count := torch.cuda.device_count()) > 1 else ""
        return f"{device} ({torch.cuda.get_device_name(device)}, {memory:.0f} GB{others})"
    return f"cpu ({torch.get_num_threads()} threads)"
