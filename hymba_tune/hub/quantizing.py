"""Quantizes a model, writes and reloads it, and measures the cost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase

from hymba_tune.adapters import folders_of, folding_note, open_model, short_count, sources_of, tokenizer_of, weights_of
from hymba_tune.checkpoint import choose_device, choose_dtype, load_config, weight_files
from hymba_tune.config import ExportConfig, QuantizeConfig, Scheme, as_mapping
from hymba_tune.data import Encoded, open_sources, with_chat_template
from hymba_tune.data.mixes import local_files
from hymba_tune.data.training import Working
from hymba_tune.evaluate.texts import ScoringTexts, TextCounts
from hymba_tune.files import MODEL, check_folder, new_folder
from hymba_tune.files.checkpoints import at_checkpoint
from hymba_tune.hub.card import write_card
from hymba_tune.hub.checks import sample_logits, write_sums
from hymba_tune.hub.layout import write_model
from hymba_tune.hub.lineage import trace
from hymba_tune.hub.writing import default_folder, reload_model
from hymba_tune.inputs import check_inputs
from hymba_tune.quant import Damage, check_quantizable, compare, damage_page, quantize_model, refer, weight_errors
from hymba_tune.registry import ModelSource, resolve_model
from hymba_tune.schemes import quantization, reasons

DAMAGE, PAGE = "damage.json", "damage.html"


@dataclass(frozen=True)
class QuantizedModel:
    """A quantized model that was written.

    Attributes:
        folder: The written folder.
        damage: The measured cost of the quantization.
        difference: The largest difference between logits of the quantized model in memory and of the reloaded one.
        size: The number of parameters, in words.
        note: A note on how its adapters were merged, if there is one.
    """

    folder: Path
    damage: Damage
    difference: float
    size: str
    note: str | None


@dataclass(frozen=True)
class QuantizationPlan:
    """A quantization whose settings, model and data are checked, before the weights are loaded.

    Attributes:
        source: The model.
        config: The configuration of the model below all adapters.
        tokenizer: The tokenizer, with a chat template.
        dtype: The dtype of the computation.
        device: The device of the computation.
        scheme: The quantization scheme.
        skip: The modules to leave unquantized, in addition to those that always are.
        quantization: The quantization configuration for transformers.
        rows: The rows on which the damage is measured.
        texts: The counts of these rows.
        data: The names of the data; files without their folders.
    """

    source: ModelSource
    config: Any
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    device: torch.device
    scheme: Scheme
    skip: Sequence[str]
    quantization: BitsAndBytesConfig
    rows: list[Encoded]
    texts: TextCounts
    data: list[str]


def plan_quantization(config: QuantizeConfig, working: Working) -> QuantizationPlan:
    """Check the settings, find the model, and read the data.

    Raises:
        HymbaTuneError: If a setting, the model or the data cannot be used.
    """
    check_inputs(config)
    device = choose_device(config.device)
    if config.out:
        check_folder(config.out, MODEL, overwrite=config.overwrite)
    source = resolve_model(at_checkpoint(config.model, config.checkpoint))
    check_quantizable(source)
    model_config = load_config(weights_of(source))
    stored = model_config.dtype or torch.float32
    dtype = stored if config.dtype == "auto" else choose_dtype(config.dtype, device)
    model_quantization = quantization(model_config, config.scheme, dtype, config.skip)
    tokenizer = with_chat_template(tokenizer_of(source), config.chat_template)
    texts = ScoringTexts(
        open_sources(config.data),
        tokenizer,
        config.max_length,
        as_mapping(config.map),
        config.learn,
        config.on_bad_row,
    )
    with working("reading the data"):
        rows, counts = texts.sample(config.max_tokens)
    return QuantizationPlan(
        source=source,
        config=model_config,
        tokenizer=tokenizer,
        dtype=dtype,
        device=device,
        scheme=config.scheme,
        skip=config.skip,
        quantization=model_quantization,
        rows=[row.encoded for row in rows],
        texts=counts,
        data=[Path(name).name if Path(name).exists() else name for name in config.data],
    )


def quantize(config: QuantizeConfig, working: Working) -> QuantizedModel:
    """Quantize a model, or the model of a run with its adapter merged.

    Args:
        config: The settings of the quantization.
        working: Shows the progress of long steps.

    Raises:
        HymbaTuneError: If a setting, the model or the data cannot be used. The folder is then complete, or does not
            exist.
    """
    plan = plan_quantization(config, working)
    lineage = trace(plan.source)
    out = config.out or default_folder(plan.source, ending=f"-{config.scheme}")
    with new_folder(out, overwrite=config.overwrite, inputs=inputs_of(config, plan)) as folder:
        model = write_quantized(plan, folder, lineage.base, working)
        write_card(folder, out.name, lineage, ExportConfig(), size=model.size, quantized=True, damage=model.damage)
        write_sums(folder)
    return replace(model, folder=out)


def inputs_of(config: QuantizeConfig, plan: QuantizationPlan) -> list[Path]:
    """Return the files and folders that a quantization reads: those of the model, and those of the data."""
    return [*folders_of(plan.source), *local_files(config.data)]


def write_quantized(plan: QuantizationPlan, folder: Path, base: str | None, working: Working) -> QuantizedModel:
    """Quantize a model, write and reload it, and measure the cost.

    Args:
        plan: The plan from `plan_quantization`.
        folder: An existing folder.
        base: The base model, as for `write_model`.
        working: Shows the progress of long steps.

    Raises:
        CheckpointError: If the weights cannot be used, or if the reloaded model differs from the one that was written.
    """
    tokenizer = plan.tokenizer
    with working("loading the weights"):
        model = open_model(plan.source, dtype=plan.dtype, device=plan.device).eval()
    with working("predicting with the original model") as progress:
        reference = refer(model, plan.rows, progress)
    with working("quantizing"):
        quantized = quantize_model(model, plan.quantization).eval()
        kinds = weight_errors(model, quantized)
    before, after = (each.get_memory_footprint(return_buffers=False) for each in (model, quantized))
    del model

    with working("writing"):
        logits = sample_logits(quantized, tokenizer)
        write_model(quantized, tokenizer, folder, "kit", base)
    del quantized
    with working("reloading it"):
        reloaded, difference = reload_model(folder, tokenizer, logits, dtype=plan.dtype, device=plan.device)
    with working("predicting with the quantized model") as progress:
        drift = compare(reference, reloaded, progress)

    damage = Damage(
        model=plan.source.published or Path(plan.source.name).name,
        scheme=plan.scheme,
        dtype=str(plan.dtype).removeprefix("torch."),
        kept=reasons(plan.config, plan.quantization, plan.skip),
        kinds=kinds,
        drift=drift,
        data=plan.data,
        texts=plan.texts,
        weight_bytes=(before, after),
        file_bytes=(_file_bytes(plan.source), _file_bytes(ModelSource(folder.name, folder))),
    )
    (folder / DAMAGE).write_text(json.dumps(damage.facts(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / PAGE).write_text(damage_page(damage), encoding="utf-8")
    return QuantizedModel(
        folder,
        damage,
        difference,
        f"{short_count(reloaded.num_parameters())} parameters",
        folding_note(plan.source, whole=True),
    )


def _file_bytes(source: ModelSource) -> int:
    """Return the bytes of the weight files of a model, including those of adapters."""
    files: list[Path] = []
    for found in sources_of(source):
        files += weight_files(found.folder) if found.adapter is None else found.adapter.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)
