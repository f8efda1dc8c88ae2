"""Loading of models and tokenizers; weights are checked against the configuration before they are loaded."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hymba_tune.distributed.environment import local_rank
from hymba_tune.errors import CheckpointError, ConfigError
from hymba_tune.model import use_kernels  # this import registers Hymba with the Auto classes
from hymba_tune.model.backends import AUTO, OPERATIONS, Choice, Task, survey
from hymba_tune.registry import ModelSource, fetch_weights
from hymba_tune.schemes import (
    fix_loaded_quantization,
    quantized,
    stored_dtypes,
    stored_quantization,
    stored_shapes,
    stored_state,
)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Suffixes of files that are never opened, because reading them can run code."""
META_TOKENS = "model.memory_tokens"
FLOATS = ("F64", "F32", "F16", "BF16")
"""The dtypes of weights that are not quantized, as safetensors files name them."""
MAX_HEADER = 100_000_000
"""The most bytes that the safetensors library accepts as a header."""


class StoredTensor(NamedTuple):
    """A tensor in a safetensors file, according to the header.

    Attributes:
        shape: Its shape.
        dtype: The name of its dtype in the header: ``F32``, ``BF16``, ``I8``.
    """

    shape: list[int]
    dtype: str


def choose_device(name: str) -> torch.device:
    """Return the device of this name; "auto" is the first CUDA device, or the CPU if there is none.

    Each process of several on a machine has a CUDA device of its own.

    A CUDA device becomes the current device of the process, because some kernels always start on the current one.

    Raises:
        ConfigError: If the device does not exist.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name}: no such device.", expected="auto, cpu, cuda or cuda:1") from error
    if device.type != "cuda":
        return device
    device = torch.device("cuda", local_rank() if device.index is None else device.index)
    if device.index >= torch.cuda.device_count():
        raise ConfigError(
            f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices.", fix="--device cpu"
        )
    torch.cuda.set_device(device)
    return device


def check_cuda_graphs(device: torch.device) -> None:
    """Check that a device replays CUDA graphs.

    Raises:
        ConfigError: If it does not.
    """
    if device.type != "cuda":
        raise ConfigError(
            f"--cuda-graphs replays steps on a GPU, and the model is on {device.type}.",
            expected="a CUDA device",
            fix="leave out --cuda-graphs",
        )


def describe_choice(device: torch.device) -> str | None:
    """Return a sentence on which GPU is used; None unless there are several."""
    count = torch.cuda.device_count()
    if device.type != "cuda" or count < 2:
        return None
    return f"{count} GPUs are visible and one is used, {device}; --device chooses another"


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of this name; "auto" is bfloat16 if the device supports it in hardware, otherwise float32.

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
    # A CPU without these instructions emulates bfloat16, which is several times slower than float32.
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def choose_kernels(
    chosen: Mapping[str, str], config: Any, device: torch.device, dtype: torch.dtype
) -> dict[str, Choice]:
    """Choose the kernels of this process, and return those that training will use.

    Args:
        chosen: The wanted backends by operation, such as ``{"scan": "torch"}``. Other operations use the fastest
            backend that supports them.
        config: The model's configuration.
        device: The device of the computation.
        dtype: The dtype of the computation.

    Returns:
        The choice for each operation, with the reasons against the other backends.

    Raises:
        ConfigError: If a backend does not exist or does not support the task; the message lists those that do.
    """
    heads = config.num_attention_heads, config.num_key_value_heads
    widths = config.head_dim, config.value_dim
    task = Task(device.type, dtype, heads=heads, widths=widths, taps=config.mamba_d_conv)
    try:
        use_kernels(**{name: chosen.get(name, AUTO) for name in (*OPERATIONS, *chosen)})
        return survey(task)
    except ValueError as error:
        raise ConfigError(f"--kernels: {error}.", fix="hymba-tune doctor lists the available backends") from error


def check_length(tokens: int, config: Any, *, strict: bool) -> str | None:
    """Compare the length of a text with the context of the model.

    Args:
        tokens: The tokens of the longest text, without the meta tokens.
        config: The model's configuration.
        strict: Whether a longer text is an error.

    Returns:
        A warning, or None if the text is not longer.

    Raises:
        ConfigError: If the text is longer and ``strict`` is set.
    """
    if tokens <= config.max_position_embeddings:
        return None
    warning = f"{tokens:,} tokens exceed the model's context of {config.max_position_embeddings:,}"
    if strict:
        raise ConfigError(
            f"--strict-length: {warning} (max_position_embeddings).", fix="use shorter texts, or leave it out"
        )
    return f"{warning}; expect worse answers"


def load_config(source: ModelSource) -> Any:
    """Read the configuration of a model.

    Raises:
        CheckpointError: If it is missing, unreadable or invalid, belongs to another kind of model than Hymba, or states
            a quantization by another library than bitsandbytes.
    """
    try:
        config = AutoConfig.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        raise CheckpointError(f"{source.folder}/config.json cannot be used: {error}") from error
    if config.model_type != "hymba":
        raise CheckpointError(f"{source.name} is a {config.model_type} model.", expected="a Hymba model")
    if any("Classification" in str(name) for name in config.architectures or []):
        raise CheckpointError(
            f"{source.name} is a model that scores texts and writes none, such as a reward model.",
            expected="a model that writes",
            fix="transformers loads it: see docs/preferences.md",
        )
    stored_quantization(config)  # raises if another library quantized the model
    return config


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer in a model's folder, with the ids of its tokenizer.json.

    Raises:
        CheckpointError: If the folder has no tokenizer, or it cannot be read.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(f"No tokenizer can be read from {folder}: {error}", expected="tokenizer.json") from error


def load_weights(
    source: ModelSource, *, dtype: torch.dtype, device: torch.device, quantization: BitsAndBytesConfig | None = None
) -> PreTrainedModel:
    """Load a model. The names and shapes of its weights are checked before they are read.

    The weights of a Hub model are downloaded first.

    Args:
        source: The model, which has no adapter.
        dtype: The dtype of the computation, and of the weights in memory unless they are quantized.
        device: The device of the model.
        quantization: The quantization to apply to the weights; None if they are loaded as they are stored.

    Raises:
        CheckpointError: If a file or tensor is missing, unexpected or truncated, or has the wrong shape.
        HubError: If the weights cannot be downloaded.
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
    fix_loaded_quantization(model, dtype)
    return model


def check_weights(folder: Path, config: Any) -> None:
    """Compare the safetensors files in a folder with the model that the configuration describes.

    Reads headers only.

    Raises:
        CheckpointError: If a file or tensor is missing, unexpected or truncated, or has the wrong shape or dtype.
    """
    files: dict[str, Path] = {}
    present: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        for name, tensor in read_header(file).items():
            if name in present:
                raise CheckpointError(
                    f"{file}: tensor {name} is in {files[name].name} as well.",
                    expected="each tensor in one file",
                    fix="download or copy the model again",
                )
            files[name], present[name] = file, tensor

    expected = _expected(config, present)
    if config.tie_word_embeddings:
        # The head is tied to the embedding, but some tools save it as well.
        head = expected.pop("lm_head.weight")
        if "lm_head.weight" in present and present["lm_head.weight"].shape == head.shape:
            del present["lm_head.weight"]
    for name, wanted in expected.items():
        if name not in present:
            raise CheckpointError(f"{folder}: tensor {name} is missing.", expected=f"a tensor of shape {wanted.shape}")
        if present[name].shape != wanted.shape:
            raise CheckpointError(
                f"{files[name]}: tensor {name} has shape {present[name].shape}.",
                expected=f"the shape {wanted.shape}, from config.json",
            )
        check_dtype(files[name], name, present[name], wanted.dtypes)
    if extra := [name for name in present if name not in expected]:
        raise CheckpointError(
            f"{files[extra[0]]}: tensor {extra[0]} is not part of the model"
            + (f", nor are {len(extra) - 1} others." if len(extra) > 1 else "."),
            expected="only the tensors that config.json describes",
        )


def check_dtype(file: Path, name: str, tensor: StoredTensor, dtypes: Sequence[str] = FLOATS) -> None:
    """Check that a tensor has one of several dtypes; integers would be read as weights that mean nothing.

    Raises:
        CheckpointError: If it has another one.
    """
    if tensor.dtype not in dtypes:
        raise CheckpointError(
            f"{file}: tensor {name} has the dtype {tensor.dtype}.",
            expected=" or ".join(dtypes),
            fix="get the weights in one of these dtypes; only those that bitsandbytes has quantized may be integers",
        )


class _Expected(NamedTuple):
    """The shape of a tensor, and the dtypes that it may have."""

    shape: list[int]
    dtypes: Sequence[str]


def _expected(config: Any, present: Mapping[str, StoredTensor]) -> dict[str, _Expected]:
    """Return what the tensors of a checkpoint must be, by their names."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = {
        name.replace(f"{META_TOKENS}.weight", META_TOKENS): _Expected(list(t.shape), FLOATS)
        for name, t in model.state_dict().items()
    }
    if (quantization := stored_quantization(config)) is not None:
        for name, layer in quantized(model, quantization).items():
            for part, shape in stored_shapes(name, layer, quantization).items():
                expected[part] = _Expected(shape, stored_dtypes(part, quantization))
            state = stored_state(name, quantization)
            if state is not None and state in present:  # its length depends on the description that it holds
                expected[state] = _Expected(present[state].shape, ["U8"])
    return expected


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model.

    Raises:
        CheckpointError: If there are none, or if a file that the index lists is missing.
    """
    if (folder / INDEX).is_file():
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            names = sorted(set(index["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{folder / INDEX} is not a valid index of shards: {error!r}", fix="download or copy it again"
            ) from error
    elif (folder / SINGLE).is_file():
        names = [SINGLE]
    else:
        pickles = [file.name for file in folder.iterdir() if file.suffix in PICKLES]
        raise CheckpointError(
            f"{folder}: no weights" + (f" except pickled ones, {pickles[0]}, which can run code." if pickles else "."),
            expected=f"{SINGLE}, or shards with {INDEX}",
            fix="ask the model's author for weights in the safetensors format" if pickles else "",
        )
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{folder / INDEX} points outside its folder: {name}", expected="plain file names")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: the shard {name} is missing.", fix="download or copy the model again")
    return [folder / name for name in names]


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Read the header of a safetensors file, which must describe every byte of the file exactly once.

    Raises:
        CheckpointError: If the header cannot be read, contradicts itself, or contradicts the size of the file.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size - 8:
                raise ValueError("the header is longer than the file")
            if length > MAX_HEADER:
                raise ValueError(f"the header has {length:,} bytes, more than {MAX_HEADER:,}")
            header = json.loads(stream.read(length).decode("utf-8"), object_pairs_hook=_without_duplicates)
        header.pop("__metadata__", None)
        tensors = {name: StoredTensor(entry["shape"], entry["dtype"]) for name, entry in header.items()}
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if size == end:
            with safe_open(file, framework="pt"):  # checks offsets, shapes and dtypes against each other
                return tensors
    except (struct.error, ValueError, LookupError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"{file} is not a safetensors file: {error}", fix="download or copy it again") from error
    last = max(header, key=lambda name: header[name]["data_offsets"][1], default="none")
    raise CheckpointError(
        f"{file} is truncated: it has {size:,} bytes, and its last tensor {last} ends at {end:,}."
        if size < end
        else f"{file} has {size:,} bytes, {size - end:,} more than its header describes.",
        fix="download or copy it again",
    )


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"the header has {max(names, key=names.count)!r} twice")
    return dict(pairs)
