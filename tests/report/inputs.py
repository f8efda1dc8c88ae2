"""Run directories whose files are written by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

NASTY = "<script>document.title = 'taken'</script> & \"quotes\" $x_1$ 日本語 🙂 " + "w" * 200


def write_run(
    path: Path,
    losses: Sequence[float] = (),
    evaluations: Sequence[float] = (),
    *,
    facts: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    columns: dict[str, Sequence[float]] | None = None,
) -> Path:
    """Writes a run's directory.

    Args:
        path: The directory to create.
        losses: The training losses at steps 10, 20, 30 …
        evaluations: The held-out losses at steps 0, 10, 20 …
        facts: The content of run.json.
        settings: Settings in config.yaml in addition to a model and data.
        columns: Further measures with one value for each training loss, or for each evaluation (``eval_...``).

    The held-out rows, 40 unless ``facts`` says otherwise, all have the mean loss.
    """
    path.mkdir()
    columns = columns or {}
    held_out = {name: values for name, values in columns.items() if name.startswith("eval_")}
    rows = [
        {"step": 10 * i, "eval_loss": loss} | {name: values[i] for name, values in held_out.items()}
        for i, loss in enumerate(evaluations)
    ]
    rows += [
        {"step": 10 * i + 10, "loss": loss} | {name: columns[name][i] for name in columns if name not in held_out}
        for i, loss in enumerate(losses)
    ]
    content = {"verb": "sft", "model": "hymba-nano", "data": ["demo"], **(settings or {})}
    (path / "config.yaml").write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    (path / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in sorted(rows, key=lambda r: r["step"]))
    )
    held_out_facts = (facts or {}).get("held_out", {})
    count = held_out_facts.get("rows", 40) if isinstance(held_out_facts, dict) else 40
    parts = [{"step": 10 * i, "sums": [loss] * count, "counts": [1] * count} for i, loss in enumerate(evaluations)]
    (path / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in parts))
    if facts is not None:
        (path / "run.json").write_text(json.dumps(facts))
    return path


def write_nasty_run(path: Path) -> Path:
    """Writes a large preference run whose data holds HTML and characters that are hard to display."""
    steps = 30
    falling = [2.0 - 0.05 * i for i in range(steps)]
    run = write_run(
        path,
        falling,
        falling[:6],
        facts={
            "memory": {"predicted_bytes": 3 * 2**30, "measured_bytes": 2.9 * 2**30},
            "data": {"rows": 9_412_000, "pairs": 9_411_988, "too_long": 11, "bad_rows": 1, "fingerprint": "ab" * 32},
            "described": {"reference": NASTY},
            "ended": {"how": "failed", "what": NASTY},
            "peak_memory_bytes": 2.9 * 2**30,
            "seconds": 4000.0,
        },
        settings={"verb": "dpo", "data": [NASTY + ".jsonl"], "targets": ["all"], "packing": True},
        columns={
            "learning_rate": [2e-4 / (i + 1) for i in range(steps)],
            "grad_norm": [float("nan"), *[10.0**i for i in range(steps - 1)]],
            "tokens_per_s": [12_345.6] * steps,
            "memory_bytes": [2**30 * (1 + i / 20) for i in range(steps)],
            "accuracy": [0.5 + i / 100 for i in range(steps)],
            "margin": [i / 10 for i in range(steps)],
            "eval_accuracy": [0.5, 0.6, 0.7, 0.7, 0.8, 0.82],
            "eval_margin": [0, 0.2, 0.4, 0.5, 0.7, 0.8],
            **{f"eval_loss/a source of pairs {i}.jsonl": [2.0 + i / 5 - j / 9 for j in range(6)] for i in range(6)},
            f"eval_loss/{NASTY}": [2.0] * 6,
            "unknown_measure": [1.0] * steps,
        },
    )
    groups = {"attention": "qkv", "SSM": ["x", "gate", "x_proj"], "attention + SSM": ["out_proj"], "MLP": ["up_proj"]}
    parts = [
        {"group": group, "part": part, "layer": layer, "size": None if layer == 3 else 0.01 * (layer + len(part))}
        for group, names in groups.items()
        for part in names
        for layer in range(32)
    ]
    parts.append({"group": "meta tokens", "part": "memory_tokens", "layer": None, "size": 0.5})
    (run / "updates.json").write_text(json.dumps({"parts": parts}))
    samples = [{"prompt": NASTY, "reference": NASTY, "before": NASTY, "after": "<b>after</b>\n\n" + "x" * 500}]
    (run / "samples.json").write_text(json.dumps(samples))
    dropped = [{"file": NASTY, "line": i, "reason": "too long", "what": f"<i>{i}</i>{NASTY}"} for i in range(1, 12)]
    dropped.append({"file": "b.jsonl", "row": 7, "reason": "bad row", "what": "role"})
    (run / "dropped.jsonl").write_text("".join(json.dumps(row) + "\n" for row in dropped))
    return run
