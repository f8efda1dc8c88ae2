"""What to leave as it is when a model is quantized: searched for, and written so."""

from __future__ import annotations

import gc
from dataclasses import dataclass

from hymba_tune.adapters import open_model
from hymba_tune.config import QuantizeConfig
from hymba_tune.data.training import Working
from hymba_tune.files import check_new_folder
from hymba_tune.hub.quantizing import QuantizationPlan, QuantizedModel, find, inputs_of, quantize
from hymba_tune.quant import (
    QuantizationDrift,
    Search,
    compare,
    quantize_model,
    quantized_only,
    refer,
    search,
    weight_errors,
)


@dataclass(frozen=True)
class Searched:
    """What came of a search.

    Attributes:
        search: What was tried, and what is proposed.
        skip: All that is to be left: what the user said, and what was found.
        written: The model so quantized, if a folder was named and something was found.
    """

    search: Search
    skip: tuple[str, ...]
    written: QuantizedModel | None = None


def search_skips(config: QuantizeConfig, working: Working) -> Searched:
    """Find the modules to leave so that the perplexity rises by no more than a limit; with --out write the model.

    Args:
        config: Which model, in which scheme, and the limit.
        working: Shows the steps that take long.

    Raises:
        HymbaTuneError: If something is to be mended first.
    """
    plan = find(config, working)
    if config.out is not None:
        check_new_folder(config.out, overwrite=config.overwrite, inputs=inputs_of(config, plan))
    found = _search(plan, config.max_rise / 100, working)
    skip = (*config.skip, *(found.skip or ()))
    if config.out is None or found.skip is None:
        return Searched(found, skip)
    gc.collect()
    written = quantize(config.model_copy(update={"skip": list(skip)}), working)
    return Searched(found, skip, written)


def _search(plan: QuantizationPlan, max_rise: float, working: Working) -> Search:
    with working("loading the weights"):
        model = open_model(plan.source, dtype=plan.dtype, device=plan.device).eval()
    with working("predicting with the model as it is") as progress:
        reference = refer(model, plan.rows, progress)
    with working("quantizing"):
        made = quantize_model(model, plan.quantization).eval()
        kinds = weight_errors(model, made)

    def measure(chosen: frozenset[str]) -> QuantizationDrift:
        what = f"{len(chosen)} kinds" if len(chosen) > 1 else "".join(chosen)
        with (
            working(f"predicting with {what} quantized") as progress,
            quantized_only(model, made, chosen) as mixed,
        ):
            return compare(reference, mixed, progress)

    return search({kind: error.bytes_before - error.bytes_after for kind, error in kinds.items()}, measure, max_rise)
