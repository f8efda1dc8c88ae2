"""Several runs on one page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from hymba_tune.errors import ConfigError
from hymba_tune.files import check_file, write_errors, write_text
from hymba_tune.formatting import duration, format_bytes
from hymba_tune.pages import render
from hymba_tune.report.commands import defaults, written
from hymba_tune.report.curves import overlaid_plots
from hymba_tune.report.measures import measure
from hymba_tune.report.record import RunRecord, edits_explained
from hymba_tune.significance import LEVEL, METHOD, compare_sums

MOST = len(ascii_uppercase)
CHOOSING = ("model", "data", "caps", "eval_data", "eval_split", "eval_max_rows", "seed", "max_length", "learn", "map")
"""The settings that choose the held-out rows of a run that has not recorded their digest."""


def write_comparison(
    paths: Sequence[Path], out: Path, *, overwrite: bool = False
) -> list[tuple[str, RunRecord, dict[str, str]]]:
    """Write a page that compares runs: curves, final figures, settings that differ, answers.

    Args:
        paths: The directories of two runs or more.
        out: The file of the page.
        overwrite: Whether an existing file is replaced.

    Returns:
        For each run its letter on the page, its record, and its final figures.

    Raises:
        CheckpointError: If a directory is not a run, or its files cannot be read.
        ConfigError: If there are too many, or the page cannot be written.
    """
    if len(paths) > MOST:
        raise ConfigError(f"{len(paths)} runs are too many for one page.", expected=f"at most {MOST}")
    check_file("--out", out, overwrite=overwrite)
    records = dict(zip(ascii_uppercase, map(RunRecord.read, paths), strict=False))
    with edits_explained(*paths):
        figures = {letter: final_figures(record) for letter, record in records.items()}
        settings = {letter: {"verb": r.verb.name, **defaults(r.verb), **r.settings} for letter, r in records.items()}
        page = render(
            "hymba_tune.report",
            "compare.html.j2",
            records=records,
            best=best_run(records),
            method=METHOD,
            figures=_aligned(figures),
            plots=overlaid_plots(records),
            differing=differing(settings),
            samples=_samples(records),
        )
    with write_errors("--out", out):
        write_text(out, page, overwrite=overwrite)
    return [(letter, record, figures[letter]) for letter, record in records.items()]


def final_figures(record: RunRecord) -> dict[str, str]:
    """Return the final figures of a run, by their labels."""
    figures: dict[str, str] = {}
    for name in record.measures:
        measured = measure(name, record.verb)
        _, held_out = record.held_out(name)
        if held_out:
            ends = {"last": held_out[-1]}
            if not name.startswith("loss/"):  # for a single source the last loss is enough
                ends = {"before": held_out[0], **ends}
                if measured.better:
                    ends["best"] = (min if measured.better < 0 else max)(held_out)
            title = f"{measured.title[0].lower()}{measured.title[1:]}"
            figures |= {f"held-out {title}, {when}": measured.written(end) for when, end in ends.items()}
    facts = record.facts
    figures["steps"] = f"{record.last_step:,}"
    if "seconds" in facts:
        figures["time"] = duration(facts["seconds"])
    _, speeds = record.series("tokens_per_s")
    if speeds:
        figures["speed, median"] = measure("tokens_per_s", record.verb).written(sorted(speeds)[len(speeds) // 2])
    if "peak_memory_bytes" in facts:
        figures["peak memory"] = format_bytes(facts["peak_memory_bytes"])
    if "parameters" in facts:
        figures["parameters trained"] = f"{facts['parameters']['trainable']:,}"
    return figures


def differing(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return the settings that differ between runs: the values in the order of the runs, with a dash for none."""
    names = dict.fromkeys(name for one in settings.values() for name in one)
    rows = {name: [_written(one.get(name)) for one in settings.values()] for name in names}
    return {name: row for name, row in rows.items() if len(set(row)) > 1}


def _written(value: Any) -> str:
    if value is None or value == []:
        return "–"
    return written(value)


def _aligned(figures: dict[str, dict[str, str]]) -> dict[str, list[str]]:
    names = dict.fromkeys(name for one in figures.values() for name in one)
    return {name: [one.get(name, "–") for one in figures.values()] for name in names}


def best_run(records: Mapping[str, RunRecord]) -> str:
    """Say which run ended with the lowest held-out loss, or why that cannot be said."""
    final = {letter: record.series("eval_loss")[1][record.final_evaluation :] for letter, record in records.items()}
    known = {letter: losses[0] for letter, losses in final.items() if losses}
    if (reason := _reason_against_comparing(records, list(known))) is not None:
        return reason
    lost = [letter for letter, loss in known.items() if not math.isfinite(loss)]
    set_aside = f" The losses of {', '.join(lost)} are not finite." if lost else ""
    known = {letter: loss for letter, loss in known.items() if letter not in lost}
    if not known:
        return "None of these runs ended with a finite loss."
    ranked = sorted(known, key=lambda letter: known[letter])
    rewarded = bool(_rewards(records[ranked[0]]))
    losses = ", ".join(f"{letter} {-known[letter] if rewarded else known[letter]:.3f}" for letter in ranked)
    rows = records[ranked[0]].held_out_rows
    n = "" if rows is None else f" on {rows:,} held-out {'prompts' if rewarded else 'rows'}"
    chances = [_chance(records[ranked[0]], records[letter]) for letter in ranked[1:]]
    if None in chances:
        return (
            "Which run is best was not tested, as they have not recorded the losses of the same parts of the data: "
            f"{losses}{n}.{set_aside}"
        )
    # The more pairs of runs there are, the more often one of them differs by chance.
    pairs = len(known) * (len(known) - 1) // 2
    equal = [letter for letter, p in zip(ranked[1:], chances, strict=True) if p is None or p * pairs > LEVEL]
    if equal:
        return f"Too few rows to say which is best, {' or '.join([ranked[0], *equal])}: {losses}{n}.{set_aside}"
    what = "highest held-out reward" if rewarded else "lowest held-out loss"
    return f"{ranked[0]} is best, with the {what}: {losses}{n}.{set_aside}"


def _reason_against_comparing(records: Mapping[str, RunRecord], known: Sequence[str]) -> str | None:
    """Return why the losses of runs cannot be compared, of which some are known; None if they can."""
    if len(known) < 2:
        return "Fewer than two of these runs have a held-out loss, so they cannot be compared."
    if len({record.verb for record in records.values()}) > 1:
        return "These runs minimize different losses, which cannot be compared."
    if len({_held_out_data(records[letter]) for letter in known}) > 1:
        return "These runs were evaluated on different held-out data, so their losses cannot be compared."
    if len({_rewards(records[letter]) for letter in known}) > 1:
        return "These runs have different rewards, which cannot be compared."
    return None


def _chance(best: RunRecord, other: RunRecord) -> float | None:
    """Return the p-value of the difference of two runs at their ends; None where it cannot be tested."""
    ends = []
    for record in (best, other):
        step = record.series("eval_loss")[0][record.final_evaluation]
        if step not in record.parts:
            return None
        ends.append(record.parts[step])
    (sums, counts), (other_sums, other_counts) = ends
    return compare_sums(other_sums, sums).p if counts == other_counts else None


def _rewards(record: RunRecord) -> str:
    """Return the rewards of a run with their weights; empty where it has none."""
    return (
        json.dumps([record.settings["reward"], record.settings.get("reward_weights")])
        if "reward" in record.settings
        else ""
    )


def _held_out_data(record: RunRecord) -> str:
    """Return what is the same for runs with the same held-out data: its digest, or the settings that choose it."""
    if (digest := record.facts.get("held_out", {}).get("fingerprint")) is not None:
        return str(digest)
    settings = {**defaults(record.verb), **record.settings}
    return json.dumps({name: settings.get(name) for name in CHOOSING}, sort_keys=True, default=str)


def _samples(records: dict[str, RunRecord]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return every prompt with the answers after training, each with the letter of its run."""
    prompts = dict.fromkeys(sample["prompt"] for record in records.values() for sample in record.samples)
    return [
        (
            prompt,
            [
                (letter, sample["after"])
                for letter, record in records.items()
                for sample in record.samples
                if sample["prompt"] == prompt and "after" in sample
            ],
        )
        for prompt in prompts
    ]
