"""What the server gains under load: prompts in chunks, and prefixes that are reused.

Stall: eight texts are being generated when a prompt of 1,500 tokens arrives. The longest step is what the eight wait
for one token, compared with a step without a prompt; the first token is what the newcomer waits. Without chunks, the
whole prompt is computed in one step.

Reuse: chats that follow each other, with and without kept prefixes. Chats with one system prompt of 1,000 tokens and
questions of their own; and the turns of one chat, of 100 tokens each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from statistics import median
from typing import Any

import harness
import models
import torch
from transformers import PreTrainedModel

from hymba_tune.generate import ChunkedDecoder, Generation

RUNNING = 8
"""Number of texts that are being generated."""
NEWCOMER, SYSTEM, TURN, QUESTION = 1500, 1000, 100, 20
"""Numbers of prompt tokens."""
CHATS = 8
"""Number of chats with one system prompt, and of turns of one chat."""
STEPS = 40
"""Number of steps that are timed before a prompt arrives."""
CHUNKS = {"whole": 10**9, "512": 512, "256": 256, "128": 128, "64": 64}


class NoText:
    """A tokenizer of texts that never end."""

    eos_token_id = -1

    def decode(self, *_: Any, **__: Any) -> str:
        """Decode nothing."""
        return ""


def main(arguments: list[str] | None = None) -> None:
    """Measure and report."""
    options = harness.options(__doc__, arguments, repeats=3)
    toy, scale = (models.TOY, 0.02) if options.quick else ({}, 1.0)
    stalls: list[dict[str, harness.Cell]] = []
    reuses: list[dict[str, harness.Cell]] = []
    for dtype in options.dtypes:
        model = models.hymba(options.device, dtype, **toy).eval()
        stalls += compare_chunks(model, dtype, round(NEWCOMER * scale), options.repeats)
        reuses += compare_reuse(model, dtype, scale, options.repeats)
    notes = [f"{RUNNING} running texts, a prompt of {NEWCOMER:,} tokens, 15.75M parameters; medians of the rounds."]
    harness.report("serve_stall", list(stalls[0]), stalls, notes, options)
    notes = [f"{CHATS} chats, one after the other, in the same order; first token: mean of all but the first chat."]
    notes += ["x: duration of all prompts relative to those without reuse. MB: what is kept at the end."]
    harness.report("serve_reuse", list(reuses[0]), reuses, notes, options)


def compare_chunks(
    model: PreTrainedModel, dtype: torch.dtype, prompt: int, repeats: int
) -> list[dict[str, harness.Cell]]:
    """Time the steps around a prompt, for every size of chunks."""
    measured: dict[str, list[tuple[float, float, float]]] = {name: [] for name in CHUNKS}
    for _ in range(repeats):
        for name, chunk in CHUNKS.items():
            measured[name].append(stall(model, prompt, chunk))
    rows = []
    for name, rounds in measured.items():
        usual, longest, first = (median(values) for values in zip(*rounds, strict=True))
        rows.append(
            {"dtype": harness.short(dtype), "chunk": name, "step ms": usual * 1e3, "longest step ms": longest * 1e3}
            | {"steps stalled": longest / usual, "first token ms": first * 1e3}
        )
    return rows


def stall(model: PreTrainedModel, prompt: int, chunk: int) -> tuple[float, float, float]:
    """The seconds of a usual step, of the longest one with a prompt, and to the prompt's first token."""
    decoder = ChunkedDecoder(model, NoText(), chunk=chunk)  # type: ignore[arg-type]
    ids = models.random_ids(model, RUNNING + 1, prompt).tolist()
    decoder.add([Generation(text[:16], 10**6) for text in ids[:RUNNING]])
    usual = [timed(decoder.step) for _ in range(STEPS)][STEPS // 4 :]
    newcomer = Generation(ids[-1], 10**6)
    decoder.add([newcomer])
    steps = []
    while not newcomer.ids:
        steps.append(timed(decoder.step))
    return median(usual), max(steps), sum(steps)


def compare_reuse(
    model: PreTrainedModel, dtype: torch.dtype, scale: float, repeats: int
) -> list[dict[str, harness.Cell]]:
    """Time chats that begin alike."""
    system, turn, question = (max(round(size * scale), 2) for size in (SYSTEM, TURN, QUESTION))
    ids = models.random_ids(model, CHATS, system + turn).tolist()
    shared = [(ids[0][:system] + text[:question], (system,)) for text in ids]
    whole = [token for text in ids for token in text[:turn]]
    ends = list(accumulate([turn] * CHATS))
    turns = [(whole[:end], tuple(cut for cut in ends if cut < end)) for end in ends]

    rows = []
    for name, chats in (("one system prompt", shared), ("turns of one chat", turns)):
        kept = 0

        def talk(reuses: bool, chats: Sequence[tuple[list[int], tuple[int, ...]]] = chats) -> list[float]:
            nonlocal kept
            decoder = ChunkedDecoder(model, NoText(), prefix_bytes=2**40 if reuses else 0)  # type: ignore[arg-type]
            seconds = []
            for prompt, cuts in chats:
                one = Generation(prompt, 1, cuts=cuts)
                decoder.add([one])
                begin = time.perf_counter()
                while decoder.active:
                    decoder.step()
                seconds.append(time.perf_counter() - begin)
            kept = max(kept, decoder.prefixes.nbytes)
            return seconds

        rounds = [(talk(False), talk(True)) for _ in range(repeats + 1)][1:]
        for number, reuses in enumerate(("no", "yes")):
            first = median(sum(pair[number][1:]) / (CHATS - 1) for pair in rounds)
            ratio = median(sum(pair[number]) / sum(pair[0]) for pair in rounds)
            rows.append(
                {"dtype": harness.short(dtype), "chats": name, "reuse": reuses, "first token ms": first * 1e3}
                | {"x": ratio, "MB": harness.megabytes(kept) if number else 0.0}
            )
    return rows


def timed(work: Callable[[], object]) -> float:
    """The seconds of some work."""
    begin = time.perf_counter()
    work()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
