"""What a run is about to do, in a few lines."""

from __future__ import annotations

import torch
from transformers import Trainer

from hymba_tune.adapters import count_parameters, describe, short_count
from hymba_tune.config import Method
from hymba_tune.train.setup import Data, Setup


def describe_run(setup: Setup, data: Data, trainer: Trainer) -> dict[str, str]:
    """A label and a line for each thing worth knowing before a run."""
    config, report = setup.config, data.report
    trainable, total = count_parameters(trainer.model)
    size = total if config.method is Method.full else total - trainable
    dtype = str(setup.dtype).removeprefix("torch.")
    dropped = {"too long": report.too_long, "bad rows": report.bad_rows}
    lost = [f"{count:,} {why}" for why, count in dropped.items() if count]
    lengths = f"packed to {config.max_length:,}" if config.packing else f"up to {config.max_length:,} tokens each"
    lines = {
        "model": f"{setup.source.name} · {short_count(size)} · {dtype} · {_device(setup.device)}",
        "kernels": " · ".join(f"{name} {choice.taken}" for name, choice in setup.kernels.items()),
        "trained": describe(trainer.model, config.targets),
        "data": " · ".join(
            [
                *data.summary,
                f"{len(data.held_out):,} held out" if data.held_out is not None else "none held out",
                *([f"dropped {', '.join(lost)} → {setup.run.path / 'dropped.jsonl'}"] if lost else []),
            ]
        ),
        **({"mix": shares} if (shares := report.shares()) else {}),
        "batch": " · ".join(
            [f"{config.batch_size} × {config.grad_accum} (accumulation)", lengths, f"{trainer.args.max_steps:,} steps"]
        ),
        "run": str(setup.run.path),
    }
    cut = f"{report.cut:,} rows are longer than --max-length and were cut to it" if report.cut else None
    if notes := [note for note in (cut, data.length_warning) if note]:
        lines["note"] = " · ".join(notes)
    return lines


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory / 2**30
        return f"{device} ({torch.cuda.get_device_name(device)}, {memory:.0f} GB)"
    return f"cpu ({torch.get_num_threads()} threads)"
