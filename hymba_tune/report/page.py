"""The report page of one run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hymba_tune.files import check_file, write_errors, write_text
from hymba_tune.formatting import duration, format_bytes
from hymba_tune.pages import render
from hymba_tune.report.commands import chosen, next_commands, repeat, written
from hymba_tune.report.curves import loss_plot, other_plots
from hymba_tune.report.evaluations import tabulate
from hymba_tune.report.heatmap import updates_plot
from hymba_tune.report.record import RunRecord, edits_explained
from hymba_tune.report.verdict import Verdict, judge
from hymba_tune.significance import METHOD

REPORT = "report.html"


def write_report(path: Path, out: Path | None = None, *, overwrite: bool = False) -> tuple[Path, Verdict]:
    """Write or refresh a run's ``report.html``.

    Args:
        path: The run's directory.
        out: Another file for the page.
        overwrite: Whether ``out`` is replaced if it exists; a ``report.html`` always is.

    Returns:
        The file of the page, and the verdict at its top.

    Raises:
        CheckpointError: If the directory is not a run, or its files hold something unexpected.
        ConfigError: If the page cannot be written.
    """
    if out is not None:
        check_file("--out", out, overwrite=overwrite)
    record = RunRecord.read(path)
    with edits_explained(path):
        verdict = judge(record)
        page = _page(record, verdict)
    page_path = out or path / REPORT
    with write_errors("--out", page_path):
        write_text(page_path, page, overwrite=overwrite or out is None)
    return page_path, verdict


def _page(record: RunRecord, verdict: Verdict) -> str:
    return render(
        "hymba_tune.report",
        "run.html.j2",
        record=record,
        verdict=verdict,
        method=METHOD,
        title=record.verb.title,
        state=_state(record),
        brief=_brief(record),
        loss=loss_plot(record),
        curves=other_plots(record),
        updates=updates_plot(record.updates.get("parts", []), from_base=record.settings.get("start") == "continue"),
        memory=_memory(record.facts),
        evaluations=[tabulate(facts) for facts in reversed(record.evaluations)],
        data=_data(record),
        chosen={name: written(value) for name, value in chosen(record).items()},
        by_size={
            name: written(record.settings[name]) for name in record.facts.get("by_size", []) if name in record.settings
        },
        settings={name: written(value) for name, value in record.settings.items()},
        repeat=repeat(record),
        next=next_commands(record),
    )


def _state(record: RunRecord) -> str:
    """Say how the run ended, in a few words."""
    ended = record.facts.get("ended", {})
    steps = f"step {record.last_step:,}"
    early = (record.facts.get("kept") or {}).get("ended")
    match ended.get("how"):
        case "finished":
            return f"finished early at {steps}: {early}" if early else f"finished at {steps}"
        case "interrupted":
            return f"interrupted at {steps}"
        case "failed":
            return f"failed at {steps}"
    return f"not finished, at {steps}"


def _brief(record: RunRecord) -> list[str]:
    """Return the model, method, data, time and memory of a run, for one line."""
    facts, settings = record.facts, record.settings
    size = facts.get("parameters", {})
    trained = f"{size['trainable']:,} of {size['total']:,} parameters trained" if size else ""
    took = [duration(facts["seconds"])] if "seconds" in facts else []
    took += [f"{facts['tokens_seen']:,} tokens"] if "tokens_seen" in facts else []
    took += [format_bytes(facts["peak_memory_bytes"])] if "peak_memory_bytes" in facts else []
    took += [f"{facts['processes']} processes"] if facts.get("processes", 1) > 1 else []
    parts = [str(settings.get("model", "")), str(settings.get("method", "")), ", ".join(settings.get("data", []))]
    return [part for part in (*parts, trained, facts.get("device", ""), *took) if part]


def _memory(facts: dict[str, Any]) -> str:
    """Compare predicted and measured memory; empty where one is unknown."""
    memory = facts.get("memory") or {}
    predicted, measured = memory.get("predicted_bytes"), memory.get("measured_bytes", facts.get("peak_memory_bytes"))
    if not predicted or not measured:
        return ""
    off = 100 * (measured / predicted - 1)
    of_ranks = memory.get("measured_bytes_by_rank", [])
    others = f"; by rank: {', '.join(map(format_bytes, of_ranks))}" if of_ranks else ""
    return f"Memory: {format_bytes(predicted)} predicted, {format_bytes(measured)} measured ({off:+.0f} %){others}."


def _data(record: RunRecord) -> list[tuple[str, str]]:
    """Return the counts of rows and tokens with their labels, without zeros."""
    counts = record.facts.get("data", {})
    names = {
        "rows": "rows read",
        "conversations": "conversations used",
        "texts": "texts used",
        "pairs": "pairs used",
        "prompts": "prompts used",
        "tokens": "tokens",
        "learned": "tokens learned",
        "longest": "tokens in the longest row",
        "weighted": "rows with loss weights",
        "special": "rows with special tokens inside their texts (--escape-special-tokens writes them as text)",
        "cut": "rows cut to --max-length",
        "too_long": "rows dropped: the answer begins past --max-length",
        "bad_rows": "rows dropped: invalid",
    }
    names |= {name: name.replace("_", " ") for name, value in counts.items() if isinstance(value, int)} | names
    return [(label, f"{counts[name]:,}") for name, label in names.items() if counts.get(name)]
