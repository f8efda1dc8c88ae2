"""The cost of quantizing a model's weights: errors, drift, perplexity and size; and which modules to leave unquantized.

    python benchmarks/quantize.py [--gsm8k FOLDER] [--model nvidia/Hymba-1.5B-Base --device cuda]

The texts are the packaged demo, GSM8K's test answers if its folder is given, and for hymba-nano, the Python
documentation that it was not trained on. The search for modules to leave unquantized uses the last text.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import harness

from hymba_tune.assets.build_nano import corpus_rows, split_rows
from hymba_tune.config import QuantizeConfig, Scheme
from hymba_tune.hub import quantize, search_skips
from hymba_tune.quant import Damage, Search
from hymba_tune.registry import NANO

TOKENS = 16_384
"""Number of tokens of each text."""
MAX_RISE = 0.5
"""Maximum rise of perplexity in the search, in percent."""


def main(arguments: list[str] | None = None) -> None:
    """Quantize, measure and report."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--model", default=NANO)
    parser.add_argument("--gsm8k", type=Path)
    own, rest = parser.parse_known_args(arguments)
    options = harness.options(__doc__, rest, repeats=1)
    with tempfile.TemporaryDirectory() as folder:
        texts = find_texts(own.model, own.gsm8k, Path(folder), options)
        common: dict[str, Any] = {
            "model": own.model,
            "device": str(options.device),
            "dtype": harness.short(options.dtypes[-1]),
            "max_tokens": 50 if options.quick else TOKENS,
        }
        schemes = list(Scheme)[:1] if options.quick else list(Scheme)
        damages = [
            (name, quantize(QuantizeConfig(**common, **text, scheme=scheme, out=Path(folder, name, scheme)), silent))
            for name, text in texts.items()
            for scheme in schemes
        ]
        report(own.model, [(name, done.damage) for name, done in damages], options)
        name, text = list(texts.items())[-1]
        searches = {
            scheme: search_skips(
                QuantizeConfig(**common, **text, scheme=scheme, search=True, max_rise=MAX_RISE), silent
            ).search
            for scheme in schemes[:2]
        }
        report_search(name, searches, options)


def find_texts(model: str, gsm8k: Path | None, folder: Path, options: harness.Options) -> dict[str, dict[str, Any]]:
    """The data settings of each text, by its name."""
    texts: dict[str, dict[str, Any]] = {"demo": {"data": ["demo"]}}
    if gsm8k is not None:
        mapping = ["prompt=question", "completion=answer"]
        texts["gsm8k"] = {"data": [str(gsm8k / "test.jsonl")], "map": mapping}
    if model == NANO and not options.quick:
        _, held_out = split_rows(corpus_rows())
        lines = [json.dumps(row) + "\n" for row in held_out if "text" in row]
        (folder / "python.jsonl").write_text("".join(lines), encoding="utf-8")
        texts["python"] = {"data": [str(folder / "python.jsonl")]}
    return texts


def report(model: str, damages: list[tuple[str, Damage]], options: harness.Options) -> None:
    """Report the predictions by text and scheme, and the weights by scheme and kind of module."""
    rows: list[dict[str, harness.Cell]] = [
        {
            "text": name,
            "scheme": str(damage.scheme),
            "perplexity before": damage.drift.perplexity_before,
            "after": damage.drift.perplexity_after,
            "rise %": 100 * damage.drift.rise,
            "KL mnat": 1000 * damage.drift.kl,
            "same likeliest %": 100 * damage.drift.same,
            "tokens": damage.texts.tokens,
            "MB before": damage.file_bytes[0] / 1e6,
            "MB after": damage.file_bytes[1] / 1e6,
        }
        for name, damage in damages
    ]
    first = damages[0][1]
    notes = [
        f"{model}, {first.dtype}. KL(before || after) in millinats per token; MB is the size of the weights' files.",
        f"Not quantized: {', '.join(first.kept)}.",
    ]
    harness.report("quantize", list(rows[0]), rows, notes, options)
    kinds: list[dict[str, harness.Cell]] = [
        {
            "scheme": str(damage.scheme),
            "kind": kind,
            "modules": error.modules,
            "error %": 100 * error.error,
            "MB before": error.bytes_before / 1e6,
            "MB after": error.bytes_after / 1e6,
        }
        for name, damage in damages
        if name == damages[0][0]
        for kind, error in damage.kinds.items()
    ]
    harness.report(
        "quantize_weights", list(kinds[0]), kinds, ["error: ||W' - W|| / ||W|| over all modules of a kind."], options
    )


def report_search(text: str, searches: dict[Scheme, Search], options: harness.Options) -> None:
    """Report the effect of each kind alone, and of the sets that were tried."""
    rows: list[dict[str, harness.Cell]] = []
    notes = [f"On {text}; a rise of up to {MAX_RISE} % is allowed."]
    for scheme, search in searches.items():
        trials = [(f"{' '.join(trial.kinds)} alone", trial) for trial in search.alone]
        trials += [
            (f"all but {' '.join(left)}" if (left := search.left_of(one)) else "all", one) for one in search.whole
        ]
        rows += [
            {
                "scheme": str(scheme),
                "quantized": label,
                "rise %": 100 * trial.drift.rise,
                "KL mnat": 1000 * trial.drift.kl,
                "MB saved": trial.saved / 1e6,
            }
            for label, trial in trials
        ]
        proposed = (
            "no set meets the limit" if search.skip is None else f"leave {' '.join(search.skip) or 'nothing more'}"
        )
        notes.append(f"{scheme}: {proposed}.")
    harness.report("quantize_search", list(rows[0]), rows, notes, options)


def silent(_: str) -> AbstractContextManager[Any]:
    """Shows no progress, unlike the command line."""
    return nullcontext(lambda _: None)


if __name__ == "__main__":
    main()
