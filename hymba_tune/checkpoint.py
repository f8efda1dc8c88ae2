"""Opening models and tokenizers; weights are checked against the model before they are loaded."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hymba_tune.errors import CheckpointError, ConfigError
from hymba_tune.model import use_kernels  # this import registers Hymba with the Auto classes
from hymba_tune.model.backends import AUTO, OPERATIONS, Choice, Task, survey
from hymba_tune.registry import ModelSource, fetch_weights
from hymba_tune.schemes import quantized, settle, stored_quantization, stored_shapes, stored_state

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Endings of files that are never opened: reading one can run code."""
META_TOKENS = "model.memory_tokens"


def choose_device(name: str) -> torch.device:
    """The device of this name; "auto" is the first CUDA device, else the CPU.

    A CUDA device becomes the current one of this process: some kernels always start on that one.

    Raises:
        ConfigError: If there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name}: no such device.", expected="auto, cpu, cuda or cuda:1") from error
    if device.type != "cuda":
        return device
    device = torch.device("cuda", device.index or 0)
    if device.index >= torch.cuda.device_count():
        raise ConfigError(
            f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices.", fix="--device cpu"
        )
    torch.cuda.set_device(device)
    return device


def describe_choice(device: torch.device) -> str | None:
    """Which GPU is used, in a sentence; None if there is no other."""
    count = torch.cuda.device_count()
    if device.type != "cuda" or count < 2:
        return None
    return f"{count} GPUs are visible and one is used, {device}; --device chooses another"


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The number format of this name; "auto" is bfloat16 where the device computes in it, else float32.

    Raises:
        ConfigError: If the device cannot train in it.
    """
    if name == "auto":
        return torch.bfloat16 if _computes_bfloat16(device) else torch.float32
    if name == "float16" and device.type == "cpu":
        raise ConfigError("--dtype float16 needs a CUDA device.", fix="--dtype bfloat16 or --dtype float32 on a CPU")
    return getattr(torch, name)  # type: ignore[no-any-return]


def _computes_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # Without these instructions a CPU only emulates bfloat16, several times slower than float32.
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def choose_kernels(
    chosen: Mapping[str, str], config: Any, device: torch.device, dtype: torch.dtype
) -> dict[str, Choice]:
    """Choose the ways to compute for this process, and say which will be taken to train with.

    Args:
        chosen: Backends by operation: ``{"scan": "torch"}``; the fastest that can for the others.
        config: The model's configuration.
        device: Where it computes.
        dtype: In which number format.

    Returns:
        What is taken and why not another, by operation.

    Raises:
        ConfigError: If there is no such backend, or it cannot do it; the message says which can.
    """
    task = Task(device.type, dtype, widths=(config.head_dim, config.value_dim), taps=config.mamba_d_conv)
    try:
        use_kernels(**{name: chosen.get(name, AUTO) for name in (*OPERATIONS, *chosen)})
        return survey(task)
    except ValueError as error:
        raise ConfigError(f"--kernels: {error}.", fix="hymba-tune doctor shows what can be used here") from error


def check_length(tokens: int, config: Any, *, strict: bool) -> str | None:
    """Compare a text's length with what the model was made for.

    Args:
        tokens: The tokens of the longest text, without the meta tokens.
        config: The model's configuration.
        strict: Whether more is refused.

    Returns:
        A warning, or None if it is not longer.

    Raises:
        ConfigError: If it is longer and ``strict``.
    """
    if tokens <= config.max_position_embeddings:
        return None
    said = f"{tokens:,} tokens are more than the {config.max_position_embeddings:,} the model was made for"
    if strict:
        raise ConfigError(f"--strict-length: {said} (max_position_embeddings).", fix="shorter texts, or leave it out")
    return f"{said}; expect worse answers"


def load_config(source: ModelSource) -> Any:
    """The model's configuration.

    Raises:
        CheckpointError: If it is missing, unreadable, not a Hymba's, asks for what cannot be built, or is quantized by
            something else than bitsandbytes.
    """
    try:
        config = AutoConfig.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, TypeError, StrictDataclassError) as error:
        raise CheckpointError(f"{source.folder}/config.json cannot be used: {error}") from error
    if config.model_type != "hymba":
        raise CheckpointError(f"{source.name} is a {config.model_type} model.", expected="a Hymba model")
    stored_quantization(config)
    return config


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a model's folder, with the ids of its own tokenizer.json.

    Raises:
        CheckpointError: If there is none, or it cannot be read.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(f"No tokenizer can be read from {folder}: {error}", expected="tokenizer.json") from error


def load_weights(
    source: ModelSource, *, dtype: torch.dtype, device: torch.device, quantization: BitsAndBytesConfig | None = None
) -> PreTrainedModel:
    """A model with its weights, which are checked by their names and shapes before they are read.

    Those of a Hub model are downloaded first.

    Args:
        source: Without an adapter.
        dtype: What it computes in, and what its weights are stored in unless they are quantized.
        device: Where to.
        quantization: The quantization to apply to the weights; None if they are loaded as they are stored.

    Raises:
        CheckpointError: Naming the file or tensor that is missing, unknown, misshapen or cut short.
        HubError: If they cannot be downloaded.
    """
    config = load_config(source)
    fetch_weights(source)
    check_weights(source.folder, config)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        source.folder,
        config=config,
        dtype=dtype,
        device_map={"": device},
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        quantization_config=quantization,
    )
    settle(model, dtype)
    return model


def check_weights(folder: Path, config: Any) -> None:
    """Compare the safetensors files in a folder with the model that the configuration describes.

    Reads headers only.

    Raises:
        CheckpointError: Naming the file or tensor that is missing, unknown, misshapen or cut short.
    """
    found: dict[str, tuple[list[int], str]] = {}
    for file in weight_files(folder):
        found.update({name: (shape, file.name) for name, shape in read_header(file).items()})
    expected = _expected(config, found)
    if config.tie_word_embeddings:
        # Tied to the embedding, and written by some tools all the same.
        head = expected.pop("lm_head.weight")
        if "lm_head.weight" in found and found["lm_head.weight"][0] == head:
            del found["lm_head.weight"]
    for name, shape in expected.items():
        if name not in found:
            raise CheckpointError(f"{folder}: tensor {name} is missing.", expected=f"a tensor of shape {shape}")
        if found[name][0] != shape:
            raise CheckpointError(
                f"{folder / found[name][1]}: tensor {name} has shape {found[name][0]}.",
                expected=f"{shape}, as config.json says",
            )
    if extra := [name for name in found if name not in expected]:
        raise CheckpointError(
            f"{folder / found[extra[0]][1]}: tensor {extra[0]} belongs to no part of the model"
            + (f", nor do {len(extra) - 1} others." if len(extra) > 1 else "."),
            expected="only the tensors that config.json describes",
        )


def _expected(config: Any, found: Mapping[str, tuple[list[int], str]]) -> dict[str, list[int]]:
    """The shapes of the tensors of a checkpoint, by their names."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = {
        name.replace(f"{META_TOKENS}.weight", META_TOKENS): list(t.shape) for name, t in model.state_dict().items()
    }
    if (quantization := stored_quantization(config)) is not None:
        for name, layer in quantized(model, quantization).items():
            expected |= stored_shapes(name, layer, quantization)
            state = stored_state(name, quantization)
            if state is not None and state in found:
                expected[state] = found[state][0]  # as long as what it says
    return expected


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model.

    Raises:
        CheckpointError: If there are none, or one that the index names is missing.
    """
    if (folder / INDEX).is_file():
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            names = sorted(set(index["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{folder / INDEX} is no index of shards: {error!r}", fix="download or copy it again"
            ) from error
    elif (folder / SINGLE).is_file():
        names = [SINGLE]
    else:
        pickles = [file.name for file in folder.iterdir() if file.suffix in PICKLES]
        raise CheckpointError(
            f"{folder}: no weights" + (f" but pickled ones, {pickles[0]}, which can run code." if pickles else "."),
            expected=f"{SINGLE}, or shards with {INDEX}",
            fix="have whoever made it save it as safetensors" if pickles else "",
        )
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{folder / INDEX} points outside its folder: {name}", expected="plain file names")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: the shard {name} is missing.", fix="download or copy the model again")
    return [folder / name for name in names]


def read_header(file: Path) -> dict[str, list[int]]:
    """Names and shapes in a safetensors file.

    Raises:
        CheckpointError: If its size is not what its header says.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size:
                raise ValueError("its header does not fit into the file")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        shapes = {name: entry["shape"] for name, entry in header.items()}
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (struct.error, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is not a safetensors file: {error}", fix="download or copy it again") from error
    if size != end:
        last = max(header, key=lambda name: header[name]["data_offsets"][1])
        raise CheckpointError(
            f"{file} is cut short: {size:,} bytes, and its last tensor {last} ends at {end:,}.",
            fix="download or copy it again",
        )
    return shapes
