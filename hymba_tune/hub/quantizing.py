"""A model stored in fewer bits: quantized, written, read again, compared, and measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase

from hymba_tune.adapters import base_of, folders_of, folding_note, open_model, short_count, tokenizer_of, weights_of
from hymba_tune.checkpoint import choose_device, choose_dtype, load_config, weight_files
from hymba_tune.config import ExportConfig, QuantizeConfig, Scheme, as_mapping
from hymba_tune.data import Encoded, open_sources, with_chat_template
from hymba_tune.data.mixes import local_files
from hymba_tune.data.training import Working
from hymba_tune.evaluate.texts import ScoringTexts, TextCounts
from hymba_tune.files import MODEL, check_folder, new_folder
from hymba_tune.hub.card import write_card
from hymba_tune.hub.checks import sample_logits, write_sums
from hymba_tune.hub.layout import write_model
from hymba_tune.hub.lineage import trace
from hymba_tune.hub.writing import read_again, usual_folder
from hymba_tune.inputs import check_inputs
from hymba_tune.quant import Damage, check_quantizable, compare, damage_page, quantize_model, refer, weight_errors
from hymba_tune.registry import ModelSource, resolve_model
from hymba_tune.schemes import quantization, reasons

DAMAGE, PAGE = "damage.json", "damage.html"


@dataclass(frozen=True)
class QuantizedModel:
    """What came of it.

    Attributes:
        folder: Where it is.
        damage: What it cost.
        difference: The largest between logits of the quantized model in memory and of what was read again.
        size: Its parameters, in words.
        note: What is worth knowing of how its adapters were folded in.
    """

    folder: Path
    damage: Damage
    difference: float
    size: str
    note: str | None


@dataclass(frozen=True)
class QuantizationPlan:
    """What is to be quantized, all of it found and checked before the weights load.

    Attributes:
        source: The model.
        config: The configuration of the model below all adapters.
        tokenizer: With a chat template.
        dtype: What is computed in.
        device: Where.
        scheme: How its weights are to be stored.
        skip: What is to be left as it is, beside what always is.
        quantization: The quantization configuration for transformers.
        rows: ScoringTexts that the damage is measured on.
        texts: What was read of them.
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


def find(config: QuantizeConfig, working: Working) -> QuantizationPlan:
    """Find a model and texts.

    Raises:
        HymbaTuneError: If something cannot be used.
    """
    check_inputs(config)
    device = choose_device(config.device)
    if config.out:
        check_folder(config.out, MODEL, overwrite=config.overwrite)
    source = resolve_model(config.model)
    check_quantizable(source)
    model_config = load_config(weights_of(source))
    stored = model_config.dtype or torch.float32
    dtype = stored if config.dtype == "auto" else choose_dtype(config.dtype, device)
    stored_as = quantization(model_config, config.scheme, dtype, config.skip)
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
        quantization=stored_as,
        rows=[row.encoded for row in rows],
        texts=counts,
        data=[Path(name).name if Path(name).exists() else name for name in config.data],
    )


def quantize(config: QuantizeConfig, working: Working) -> QuantizedModel:
    """Quantize a model, or a run's with its adapter folded in.

    Args:
        config: Which, how, and where to.
        working: Shows the steps that take long.

    Raises:
        HymbaTuneError: If something is to be mended first. The folder is then whole, or not there.
    """
    plan = find(config, working)
    lineage, out = trace(plan.source), config.out or usual_folder(plan.source, ending=f"-{config.scheme}")
    with new_folder(out, overwrite=config.overwrite, inputs=inputs_of(config, plan)) as folder:
        done = write_quantized(plan, folder, lineage.base, working)
        write_card(folder, out.name, lineage, ExportConfig(), size=done.size, quantized=True, damage=done.damage)
        write_sums(folder)
    return replace(done, folder=out)


def inputs_of(config: QuantizeConfig, plan: QuantizationPlan) -> list[Path]:
    """The files and folders that are read for a quantized model: the model's, and those of the data."""
    return [*folders_of(plan.source), *local_files(config.data)]


def write_quantized(plan: QuantizationPlan, folder: Path, base: str | None, working: Working) -> QuantizedModel:
    """Quantize a model into a folder, read it again, and measure what that cost.

    Args:
        plan: What to quantize, from `find`.
        folder: Is there.
        base: As `write_model` takes it.
        working: Shows the steps that take long.

    Raises:
        CheckpointError: If the weights cannot be used, or what was written is not what was meant.
    """
    tokenizer = plan.tokenizer
    with working("loading the weights"):
        model = open_model(plan.source, dtype=plan.dtype, device=plan.device).eval()
    with working("predicting with the model as it is") as progress:
        reference = refer(model, plan.rows, progress)
    with working("quantizing"):
        made = quantize_model(model, plan.quantization).eval()
        kinds = weight_errors(model, made)
    before, after = (each.get_memory_footprint(return_buffers=False) for each in (model, made))
    del model
    with working("writing"):
        meant = sample_logits(made, tokenizer)
        write_model(made, tokenizer, folder, "kit", base)
    del made
    with working("reading it again"):
        again, difference = read_again(folder, tokenizer, meant, dtype=plan.dtype, device=plan.device)
    with working("predicting with the quantized model") as progress:
        drift = compare(reference, again, progress)
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
        folder, damage, difference, f"{short_count(again.num_parameters())} parameters", folding_note(plan.source)
    )


def _file_bytes(source: ModelSource) -> int:
    """Of the files that hold a model's weights, those of adapters included."""
    size = 0
    while source.adapter is not None:
        size += sum(file.stat().st_size for file in source.adapter.glob("*.safetensors"))
        source = base_of(source)
    return size + sum(file.stat().st_size for file in weight_files(source.folder))
