"""Exports a model for any library: writes it, reloads and compares it, describes it, and publishes it."""

from __future__ import annotations

import gc
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME as ADAPTER_WEIGHTS
from safetensors.torch import load_file
from transformers import PreTrainedModel

from hymba_tune.adapters import (
    base_of,
    folders_of,
    folding_note,
    load_adapter,
    open_model,
    short_count,
    tokenizer_of,
    weights_of,
)
from hymba_tune.checkpoint import choose_device, choose_dtype, load_config, load_tokenizer
from hymba_tune.config import ExportConfig, QuantizeConfig
from hymba_tune.data import with_chat_template
from hymba_tune.data.training import Working
from hymba_tune.errors import CheckpointError, ConfigError, command
from hymba_tune.files import MODEL, check_folder, new_folder
from hymba_tune.files.checkpoints import at_checkpoint
from hymba_tune.hub.card import check_publishable, write_card
from hymba_tune.hub.checks import SUMS, check_logits, check_sums, check_tokens, sample_logits, write_sums
from hymba_tune.hub.layout import check_released_format, write_model, write_tokenizer
from hymba_tune.hub.lineage import Lineage, card_data, license_of, trace
from hymba_tune.hub.push import UploadTarget, check_target, push
from hymba_tune.hub.quantizing import QuantizationPlan, plan_quantization, write_quantized
from hymba_tune.hub.writing import default_folder, reload_model
from hymba_tune.inputs import check_inputs
from hymba_tune.registry import (
    ADAPTER_CONFIG,
    NANO,
    ModelSource,
    fetch_weights,
    hub_name,
    loadable_name,
    resolve_model,
)
from hymba_tune.schemes import scheme_of, stored_quantization


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    Attributes:
        folder: The written folder.
        size: The bytes of the folder.
        difference: The largest difference between logits before and after; None for a folder that was only uploaded.
        address: The address on the Hub, if it was uploaded.
        note: A note on how its adapters were merged, if there is one.
    """

    folder: Path
    size: int
    difference: float | None
    address: str | None
    note: str | None = None


def export(config: ExportConfig, working: Working) -> Exported:
    """Export a model or a run, and upload it with --push. A folder that was exported before is uploaded as it is.

    Args:
        config: The settings of the export.
        working: Shows the progress of long steps.

    Raises:
        HymbaTuneError: If a setting or the model cannot be used, or the Hub refuses. The folder is then complete, or
            does not exist.
    """
    check_inputs(config)
    choose_device(config.device)
    if config.out:
        check_folder(config.out, MODEL, overwrite=config.overwrite)
    target = None
    if config.push is not None:
        target = UploadTarget(config.push, private=config.private, revision=config.revision, update=config.update)
        check_target(target)
    source = resolve_model(at_checkpoint(config.model, config.checkpoint))
    is_export = (source.folder / SUMS).is_file() and source.published is None
    if target and is_export and config.out is None and config.quantize is None:
        folder = source.folder
        difference = None
        with working("comparing checksums"):
            check_sums(folder)
        card = card_data(folder)
        check_publishable(Lineage(card.get("base_model"), license_of(card)))
        _check_named_base(source, config.push or "")
    else:
        folder = config.out or default_folder(source, ending=f"-{config.quantize}" if config.quantize else "")
        difference = _export(config, source, folder, working)
    note = None if config.adapter_only else folding_note(source, whole=True)
    address = None
    if target is not None:
        revision = ["--revision", target.revision] if target.revision else []
        retry = command("export", folder, "--push", target.repository, *revision)
        with working(f"uploading to {target.repository}"):
            address = push(folder, target, message="Upload by hymba-tune", retry=retry)
    return Exported(folder, sum(file.stat().st_size for file in folder.iterdir()), difference, address, note)


def _export(config: ExportConfig, source: ModelSource, out: Path, working: Working) -> float:
    if config.adapter_only and source.adapter is None:
        raise CheckpointError(f"--adapter-only: {source.name} has no adapter.", fix="leave it out")
    stored = None if source.adapter else stored_quantization(load_config(source))
    if config.format == "hymba":
        below = load_config(weights_of(source))
        dtype = _dtype(config, source, choose_device(config.device))
        check_released_format(source.name, below, dtype, tokenizer_of(source), adapter=source.adapter is not None)
    lineage = _lineage(config, source)
    if config.push is not None:
        check_publishable(lineage)
    name = config.push or out.name
    damage = None
    plan = _to_quantize(config, working)
    with new_folder(out, overwrite=config.overwrite, inputs=folders_of(source)) as folder:
        if plan is not None:
            quantized = write_quantized(plan, folder, lineage.base, working)
            difference, size, damage = quantized.difference, quantized.size, quantized.damage
        else:
            write = _write_adapter if config.adapter_only else _write_model
            difference, size = write(config, source, lineage, folder, working)
        if stored:
            size += f", quantized to {scheme_of(stored)} by bitsandbytes"
        write_card(folder, name, lineage, config, size=size, quantized=bool(stored or plan), damage=damage)
        write_sums(folder)
    return difference


def _to_quantize(config: ExportConfig, working: Working) -> QuantizationPlan | None:
    if config.quantize is None:
        return None
    shared_settings = config.model_dump(include={"model", "checkpoint", "dtype", "device"})
    return plan_quantization(QuantizeConfig(scheme=config.quantize, **shared_settings), working)


def _lineage(config: ExportConfig, source: ModelSource) -> Lineage:
    """Trace the lineage of the model; the user's settings override the base model and the license."""
    lineage = trace(source)
    if config.adapter_only:
        if lineage.steps > 1:
            raise CheckpointError(
                f"--adapter-only: the adapter {source.name} is useless without its base model, which is another run.",
                fix="leave --adapter-only out, to export one merged model",
            )
        base = config.base_model or lineage.adapter_base  # and not the model which that was made from
        lineage = replace(lineage, base=base and hub_name(base)[0], adapter_base=base)
    elif config.base_model:
        lineage = replace(lineage, base=hub_name(config.base_model)[0])
    if config.license:
        lineage = replace(lineage, license={"license": config.license})
    return lineage


def _dtype(config: ExportConfig, source: ModelSource, device: torch.device) -> torch.dtype:
    """Return the dtype in which a full model is written."""
    stored: torch.dtype = load_config(weights_of(source)).dtype or torch.float32
    return stored if config.dtype == "auto" else choose_dtype(config.dtype, device)


def _write_model(
    config: ExportConfig, source: ModelSource, lineage: Lineage, folder: Path, working: Working
) -> tuple[float, str]:
    """Write a full model and reload it, without both in memory at once; return the difference and the size in words."""
    device = choose_device(config.device)
    dtype = _dtype(config, source, device)
    tokenizer = with_chat_template(tokenizer_of(source))
    with working("loading the weights"):
        model: PreTrainedModel = open_model(source, dtype=dtype, device=device)
    size = f"{short_count(model.num_parameters())} parameters in {str(dtype).removeprefix('torch.')}"
    with working("writing"):
        original = sample_logits(model, tokenizer)
        write_model(model, tokenizer, folder, config.format, lineage.base)
    del model
    with working("reloading it"):
        return reload_model(folder, tokenizer, original, dtype=dtype, device=device)[1], size


def _write_adapter(
    config: ExportConfig, source: ModelSource, lineage: Lineage, folder: Path, working: Working
) -> tuple[float, str]:
    """Write an adapter and reload it on the same base model; return the difference and the size in words."""
    assert source.adapter is not None
    device = choose_device(config.device)
    base = base_of(source)
    tokenizer = with_chat_template(tokenizer_of(source))
    dtype = load_config(weights_of(source)).dtype or torch.float32
    with working("loading the weights"):
        fetch_weights(source)
        adapted = load_adapter(open_model(base, dtype=dtype, device=device), source.adapter)
    for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        shutil.copyfile(source.adapter / file, folder / file)
    settings = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    settings |= _named_base(config, lineage.adapter_base or str(source.base))
    (folder / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    write_tokenizer(tokenizer, folder)

    count = sum(tensor.numel() for tensor in load_file(folder / ADAPTER_WEIGHTS).values())
    original = sample_logits(adapted, tokenizer)
    del adapted  # two models must not be in memory at once, and the adapter may have changed the weights of its base
    gc.collect()
    with working("reloading it"):
        reloaded = load_adapter(open_model(base, dtype=dtype, device=device), folder)
        check_tokens(load_tokenizer(folder), tokenizer, folder)
        return check_logits(sample_logits(reloaded, tokenizer), original, folder), f"{short_count(count)} parameters"


def _check_named_base(source: ModelSource, repository: str) -> None:
    """Check that an adapter that was exported for this machine is not uploaded as it is.

    Raises:
        ConfigError: If its base model is named by a folder.
    """
    if source.adapter is None:
        return
    settings = json.loads((source.adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    if Path(settings.get("base_model_name_or_path") or "").is_absolute():
        raise ConfigError(
            f"--push: the adapter {source.name} names a folder of this machine as its base model.",
            expected=f"a model on the Hub, or {NANO}",
            fix=f"{command('export', 'RUN', '--adapter-only', '--push', repository)}, which exports it again",
        )


def _named_base(config: ExportConfig, base: str) -> dict[str, str | None]:
    """Return the settings of an adapter that name its base model, by which PEFT finds it."""
    if config.push is not None and base == NANO:  # its folder on this machine says nothing to others
        return {"base_model_name_or_path": NANO, "revision": None}
    name, revision = loadable_name(base, flag="--base-model")
    return {"base_model_name_or_path": name, "revision": revision}
