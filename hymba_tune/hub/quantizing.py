"""A model stored in fewer bits: quantised, written, read again and compared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from hymba_tune.adapters import open_model, short_count, weights_of
from hymba_tune.checkpoint import choose_device, choose_dtype, load_config, load_tokenizer, weight_files
from hymba_tune.config import ExportConfig, QuantizeConfig
from hymba_tune.data import with_chat_template
from hymba_tune.data.training import Working
from hymba_tune.folders import new_folder
from hymba_tune.hub.card import write_card
from hymba_tune.hub.checks import write_sums
from hymba_tune.hub.lineage import trace
from hymba_tune.hub.writing import usual_folder, write_checked
from hymba_tune.quant import check_quantisable, quantise
from hymba_tune.registry import resolve_model
from hymba_tune.schemes import quantization


@dataclass(frozen=True)
class Quantised:
    """What came of it.

    Attributes:
        folder: Where it is.
        bytes_before: Of the model's weights, not quantised.
        bytes_after: Of those that were written.
        difference: The largest between logits of the quantised model in memory and of what was read again.
    """

    folder: Path
    bytes_before: int
    bytes_after: int
    difference: float


def quantize(config: QuantizeConfig, working: Working) -> Quantised:
    """Quantise a model, or a run's with its adapter folded in.

    Args:
        config: Which, how, and where to.
        working: Shows the steps that take long.

    Raises:
        HymbaTuneError: If something is to be mended first. The folder is then whole, or not there.
    """
    source = resolve_model(config.model)
    check_quantisable(source)
    device, model_config = choose_device(config.device), load_config(weights_of(source))
    stored = model_config.dtype or torch.float32
    dtype = stored if config.dtype == "auto" else choose_dtype(config.dtype, device)
    asked = quantization(model_config, config.scheme, dtype, config.skip)
    tokenizer, lineage = with_chat_template(load_tokenizer(source.folder)), trace(source)
    out = config.out or usual_folder(source, ending=f"-{config.scheme}")
    before = 0

    def make() -> PreTrainedModel:
        nonlocal before
        with working("loading the weights"):
            model = open_model(source, dtype=dtype, device=device)
        before = model.get_memory_footprint(return_buffers=False)
        with working("quantising"):
            return quantise(model, asked)

    with new_folder(out) as folder:
        written = write_checked(make, tokenizer, folder, layout="kit", base=lineage.base, working=working)
        size = f"{short_count(written.model.num_parameters())} parameters"
        write_card(folder, out.name, lineage, ExportConfig(), size=size, scheme=config.scheme)
        write_sums(folder)
        after = sum(file.stat().st_size for file in weight_files(folder))
    return Quantised(out, before, after, written.difference)
