"""The banner: what a run is about to do, in a few lines."""

from __future__ import annotations

import torch

from hymba_tune.adapters import count_parameters, describe, folding_note, short_count
from hymba_tune.config import Method, TrainingConfig
from hymba_tune.distributed.environment import world_size
from hymba_tune.formatting import format_bytes
from hymba_tune.train.arguments import global_batch
from hymba_tune.train.limits import memory_advice
from hymba_tune.train.memory_estimate import MemoryEstimate
from hymba_tune.train.outline import Outline
from hymba_tune.train.setup import Data, Setup


def describe_run(setup: Setup, data: Data, outline: Outline, memory_estimate: MemoryEstimate) -> dict[str, str]:
    """Return the banner's lines by their labels."""
    config, report = setup.config, data.report
    trainable, total = count_parameters(outline.model)
    size = total if config.method is Method.full else total - trainable
    dtype = str(setup.dtype).removeprefix("torch.")
    stored = f"{setup.scheme} weights · " if setup.scheme else ""
    dropped = {"too long": report.too_long, "bad row" if report.bad_rows == 1 else "bad rows": report.bad_rows}
    dropped_lines = [f"{count:,} {why}" for why, count in dropped.items() if count]

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
                *(
                    [f"dropped {', '.join(dropped_lines)} → {setup.run.path / 'dropped.jsonl'}"]
                    if dropped_lines
                    else []
                ),
            ]
        ),
        **({"mix": shares} if (shares := report.shares()) else {}),
        "batch": " · ".join([describe_batch(config), lengths, _steps(outline)]),
        **({"optimizer": line} if (line := _optimizer(setup, outline)) else {}),
        "memory": describe_memory(setup, memory_estimate),
        "run": str(setup.run.path),
    }

    subject = "row is longer than --max-length and was"
    if report.cut > 1:
        subject = "rows are longer than --max-length and were"
    cut = f"{report.cut:,} {subject} cut to it" if report.cut else None
    special = f"{report.special:,} {'row contains' if report.special == 1 else 'rows contain'} special tokens as text"
    read = f"{special} (hymba-tune data check lists them; --escape-special-tokens)" if report.special else None
    if notes := [note for note in (cut, read, data.length_warning) if note]:
        lines["note"] = " · ".join(notes)
    return lines


def describe_batch(config: TrainingConfig) -> str:
    """Describe the rows of a step; those of several processes with their number."""
    own = f"{config.batch_size} × {config.grad_accum} (accumulation)"
    processes = world_size()
    return own if processes == 1 else f"{own} × {processes} processes = {global_batch(config)} rows a step"


def _steps(outline: Outline) -> str:
    """Describe the number of steps, and the epochs that few rows are given."""
    steps = "1 step" if outline.steps == 1 else f"{outline.steps:,} steps"
    epochs = outline.by_size.get("epochs", 1)
    return f"{steps} ({epochs:g} epochs, by model size and rows)" if epochs > 1 else steps


def _optimizer(setup: Setup, outline: Outline) -> str:
    """Describe an optimizer other than the default, or learning rates that differ; empty where there are none."""
    config = setup.config
    rate = outline.by_size.get("lr")
    by_size = rate is not None and rate != config.learning_rates[config.method]
    rates = {group["name"].removesuffix(", no decay"): group["lr"] for group in outline.groups}
    parts = [f"learning rate {short_rate(rate)}, by model size"] if rate is not None and by_size else []
    parts += [config.optimizer] if config.optimizer != "adamw" or len(rates) > 1 else []
    if config.optimizer.startswith("paged") and setup.device.type == "cpu":
        parts.append("not paged: there is no GPU to page out of")
    return " · ".join(parts + ([f"{name} {rate:.1e}" for name, rate in rates.items()] if len(rates) > 1 else []))


def short_rate(rate: float) -> str:
    """Write a learning rate as people do: ``4e-3``."""
    digits, _, exponent = f"{rate:.1e}".partition("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


def describe_memory(setup: Setup, memory_estimate: MemoryEstimate) -> str:
    """Describe the memory that a run is estimated to need, and what to change where the device has less."""
    line = f"needs about {format_bytes(memory_estimate.needs)} of {format_bytes(memory_estimate.has)}"
    return line if memory_estimate.fits else f"{line}, and may run out: {memory_advice(setup.config)[0]}"


def device_in_words(device: torch.device) -> str:
    """Describe a device: its name, and how many GPUs there are."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory / 2**30
        others = f", 1 of {count} GPUs" if (count := torch.cuda.device_count()) > 1 else ""
        return f"{device} ({torch.cuda.get_device_name(device)}, {memory:.0f} GB{others})"
    threads = torch.get_num_threads()
    return f"cpu ({threads} thread{'s' if threads > 1 else ''})"
