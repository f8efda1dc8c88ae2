"""Searches for the modules to leave unquantized, and quantizes the model accordingly."""

from __future__ import annotations

import gc
from dataclasses import dataclass

from hymba_tune.adapters import open_model
from hymba_tune.config import QuantizeConfig
from hymba_tune.data.training import Working
from hymba_tune.files import check_new_folder
from hymba_tune.hub.quantizing import QuantizationPlan, QuantizedModel, inputs_of, plan_quantization, quantize
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
    """The result of a search.

    Attributes:
        search: The trials and the proposal.
        skip: All modules to leave unquantized: those of --skip, and the proposed ones.
        written: The model quantized with these exceptions, if a folder was given and there is a proposal.
    """

    search: Search
    skip: tuple[str, ...]
    written: QuantizedModel | None = None


def search_skips(config: QuantizeConfig, working: Working) -> Searched:
    """Find the modules to leave unquantized so that the perplexity rises within a limit; --out writes that model.

    Args:
        config: The settings of the search.
        working: Shows the progress of long steps.

    Raises:
        HymbaTuneError: If a setting, the model or the data cannot be used.
    """
    plan = plan_quantization(config, working)
    if config.out is not None:
        check_new_folder(config.out, overwrite=config.overwrite, inputs=inputs_of(config, plan))
    result = _search(plan, config.max_rise / 100, working)
    skip = (*config.skip, *(result.skip or ()))
    if config.out is None or result.skip is None:
        return Searched(result, skip)
    gc.collect()
    written = quantize(config.model_copy(update={"skip": list(skip)}), working)
    return Searched(result, skip, written)


def _search(plan: QuantizationPlan, max_rise: float, working: Working) -> Search:
    with working("loading the weights"):
        model = open_model(plan.source, dtype=plan.dtype, device=plan.device).eval()
    with working("predicting with the original model") as progress:
        reference = refer(model, plan.rows, progress)
    with working("quantizing"):
        quantized = quantize_model(model, plan.quantization).eval()
        kinds = weight_errors(model, quantized)

    def measure(chosen: frozenset[str]) -> QuantizationDrift:
        modules = f"{len(chosen)} kinds" if len(chosen) > 1 else "".join(chosen)
        with (
            working(f"predicting with {modules} quantized") as progress,
            quantized_only(model, quantized, chosen) as mixed,
        ):
            return compare(reference, mixed, progress)

    return search({kind: error.bytes_before - error.bytes_after for kind, error in kinds.items()}, measure, max_rise)
