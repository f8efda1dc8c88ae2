"""Weights in fewer bits, by bitsandbytes: what is left as it is and why, and what checkpoints hold of the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from hymba_tune.errors import CheckpointError, ConfigError

if TYPE_CHECKING:  # a model loads where the libraries of settings are not installed
    from hymba_tune.config import Scheme

BITS = {"nf4": 4, "fp4": 4, "int8": 8}
KEPT = {
    "lm_head": "shares its weight with the embeddings",
    "embed_tokens": "is looked up, not multiplied with, and is the head's weight too",
    "memory_tokens": "every text reads it, and it is small",
    "x_proj.0": "makes the time steps, B and C: the recurrence carries their errors on from token to token",
    "dt_proj.0": "makes the time steps, of which exponentials are taken; computed in float32",
    "conv1d": "has four weights a channel: nothing to save",
    "A_log.0": "is the exponent of every state's decay",
    "D.0": "has one weight a channel: nothing to save",
    "norm": "has one weight a channel: nothing to save",
    "norm1": "has one weight a channel: nothing to save",
    "norm2": "has one weight a channel: nothing to save",
}
"""What keeps its number format under every scheme, by the end of its name, and why. Beside it stands what transformers
protects itself."""
ROWS, COLUMNS = 32, 64
"""What the shape of a weight of 4 bits must be a multiple of: bitsandbytes' kernels for CPUs know no others."""
BLOCK, NESTED_BLOCK = 64, 256
"""Weights of 4 bits that share a scale, and scales of 8 bits that share one."""
BYTES = {"SCB": 4, "weight.quant_map": 4, "weight.nested_absmax": 4, "weight.nested_quant_map": 4}
"""Bytes of an element of what is stored beside a weight, where it is not one."""


@dataclass(frozen=True)
class WeightQuantization:
    """The quantization of a model's weights.

    Attributes:
        config: The configuration for bitsandbytes.
        dtype: The dtype of the computation.
        stored: Whether the checkpoint holds the weights in this form. Otherwise they are quantized while they are
            loaded.
    """

    config: BitsAndBytesConfig
    dtype: torch.dtype
    stored: bool

    @property
    def scheme(self) -> Scheme:
        """The name of the scheme."""
        return scheme_of(self.config)

    @property
    def while_loading(self) -> BitsAndBytesConfig | None:
        """The quantization to apply while the weights are loaded; None if they are stored in it already."""
        return None if self.stored else self.config


def decide_quantization(
    model_config: Any, scheme: Scheme | None, dtype: torch.dtype, *, flag: str | None = None, name: str = ""
) -> WeightQuantization | None:
    """Decide how a model's weights are quantized: as they are stored, otherwise in the wanted scheme.

    Args:
        model_config: The configuration of the model.
        scheme: The wanted scheme, if any.
        dtype: The dtype of the computation.
        flag: The flag that asks for the scheme. With it, weights that are stored in another scheme are refused; without
            it, the stored quantization takes precedence silently.
        name: The name of the model in that message.

    Returns:
        None if the weights are not quantized.

    Raises:
        CheckpointError: If the weights are quantized, but not by bitsandbytes.
        ConfigError: If the stored quantization contradicts the flag, or no layer can be quantized in the scheme.
    """
    stored = stored_quantization(model_config)
    if stored is not None:
        if flag and scheme not in (None, scheme_of(stored)):
            raise ConfigError(
                f"{flag} {scheme}: {name} is quantized already, to {scheme_of(stored)}.", fix="leave it out"
            )
        return WeightQuantization(stored, dtype, stored=True)
    if scheme is None:
        return None
    if model_config.model_type != "hymba":
        return WeightQuantization(bitsandbytes(scheme, dtype), dtype, stored=False)
    return WeightQuantization(quantization(model_config, scheme, dtype), dtype, stored=False)


def quantization(model_config: Any, scheme: Scheme, dtype: torch.dtype, skip: Sequence[str] = ()) -> BitsAndBytesConfig:
    """Return the configuration with which transformers quantizes a model while loading it.

    Args:
        model_config: The configuration of the model.
        scheme: NF4 and FP4 store their scales in 8 bits as well (double quantization).
        dtype: What is computed in.
        skip: More modules to leave as they are, by the ends of their names: ``down_proj``, ``layers.3.mamba.in_proj``.

    Raises:
        ConfigError: If one of these ends no name, or if nothing is left to quantize.
    """
    model = _without_weights(model_config)
    linear = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    if wrong := [end for end in skip if not any(f".{name}".endswith(f".{end}") for name in linear)]:
        raise ConfigError(
            f"--skip {wrong[0]}: no linear layer of the model is called so.",
            expected=", ".join(sorted({name.rsplit(".", 1)[1] for name in linear if name not in KEPT} - {"0"})),
        )
    kept = [*get_keys_to_not_convert(model), *KEPT, *skip]
    if BITS[scheme] == 4:
        kept += [name for name, module in linear.items() if module.out_features % ROWS or module.in_features % COLUMNS]
    names = list(dict.fromkeys(kept))
    config = bitsandbytes(scheme, dtype, names)
    if not quantized(model, config):
        raise ConfigError(
            f"{scheme.value}: nothing in this model can be stored so.",
            expected=f"linear layers of a multiple of {ROWS} rows and {COLUMNS} columns",
        )
    return config


def reasons(model_config: Any, config: BitsAndBytesConfig, skip: Sequence[str] = ()) -> dict[str, str]:
    """Why modules keep their number format, by the ends of their names.

    Args:
        model_config: The configuration of the model.
        config: What `quantization` made of it.
        skip: As given there.
    """
    model = _without_weights(model_config)
    names = [name.removesuffix(".weight") for name, _ in model.named_parameters(remove_duplicate=False)]
    said = {end: why for end, why in KEPT.items() if any(name.endswith(end) for name in names)}
    done = quantized(model, config)
    for name, module in model.named_modules():
        if type(module) is nn.Linear and name not in done and not name.endswith((*said, *skip)):
            shape = f"{module.out_features} × {module.in_features}"
            said[name.rpartition(".")[2]] = f"is {shape}: no multiple of {ROWS} rows and {COLUMNS} columns"
    return said | dict.fromkeys(skip, "was to be left (--skip)")


def bitsandbytes(scheme: Scheme, dtype: torch.dtype, kept: Sequence[str] | None = None) -> BitsAndBytesConfig:
    """A scheme in bitsandbytes' words, for any model.

    Args:
        scheme: As for `quantization`.
        dtype: What is computed in.
        kept: Names of modules that are left as they are; what transformers protects itself when None.
    """
    return BitsAndBytesConfig(
        load_in_8bit=scheme == "int8",
        load_in_4bit=scheme != "int8",
        bnb_4bit_quant_type="nf4" if scheme == "int8" else str(scheme),
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=kept,
    )


def stored_quantization(model_config: Any) -> BitsAndBytesConfig | None:
    """What a checkpoint's configuration says of how it is quantized; None if it is not.

    Raises:
        CheckpointError: If it is, but not by bitsandbytes.
    """
    said = getattr(model_config, "quantization_config", None)
    if said is None:
        return None
    if isinstance(said, BitsAndBytesConfig):
        return said
    if said.get("quant_method") != "bitsandbytes":
        raise CheckpointError(
            f"The model is quantized by {said.get('quant_method')}.",
            expected="bitsandbytes (nf4, fp4 or int8), or weights that are not quantized",
        )
    return BitsAndBytesConfig.from_dict(said)


def scheme_of(config: BitsAndBytesConfig) -> Scheme:
    """The scheme that a configuration of bitsandbytes asks for."""
    from hymba_tune.config import Scheme

    return Scheme.int8 if config.load_in_8bit else Scheme(config.bnb_4bit_quant_type)


def quantized(model: nn.Module, config: BitsAndBytesConfig) -> dict[str, nn.Linear]:
    """The layers of an unquantized model that a configuration has quantized, by their names."""
    kept = config.llm_int8_skip_modules or get_keys_to_not_convert(model)
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and should_convert_module(name, kept)
    }


def stored_shapes(name: str, layer: nn.Linear, config: BitsAndBytesConfig) -> dict[str, list[int]]:
    """The tensors of a checkpoint that hold the weight of a quantized layer, and their shapes.

    Args:
        name: The name of the layer.
        layer: As it is without quantization.
        config: Of `quantization` or `stored_quantization`.
    """
    rows, weights = layer.out_features, layer.weight.numel()
    if config.load_in_8bit:
        return {f"{name}.weight": [rows, layer.in_features], f"{name}.SCB": [rows], f"{name}.weight_format": []}
    blocks = math.ceil(weights / BLOCK)
    shapes = {"weight": [math.ceil(weights / 2), 1], "weight.absmax": [blocks], "weight.quant_map": [16]}
    if config.bnb_4bit_use_double_quant:
        shapes |= {"weight.nested_absmax": [math.ceil(blocks / NESTED_BLOCK)], "weight.nested_quant_map": [256]}
    return {f"{name}.{part}": shape for part, shape in shapes.items()}


def stored_state(name: str, config: BitsAndBytesConfig) -> str | None:
    """The tensor in which a layer of 4 bits describes itself, in as many bytes as that takes."""
    return None if config.load_in_8bit else f"{name}.weight.quant_state.bitsandbytes__{config.bnb_4bit_quant_type}"


def stored_bytes(model_config: Any, config: BitsAndBytesConfig) -> dict[str, int]:
    """Bytes that the weights of a model's quantized layers take, by the layers' names.

    Args:
        model_config: The configuration of the model.
        config: Of `quantization` or `stored_quantization`.
    """
    return {
        name: sum(BYTES.get(part.removeprefix(f"{name}."), 1) * math.prod(shape) for part, shape in parts.items())
        for name, layer in quantized(_without_weights(model_config), config).items()
        for parts in [stored_shapes(name, layer, config)]
    }


def _without_weights(model_config: Any) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model_config)


def settle(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Make a model that was just loaded compute and be written as it should; one that is not quantized stays as it is.

    Args:
        model: Changed in place.
        dtype: What it computes in, whatever the one that quantized it computed in.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Such a CPU packs the weights anew at the first evaluation, and the backward later reads them as they were:
            # gradients are then wrong without an error.
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype = dtype
    if getattr(model, "is_quantized", False):
        # What transformers put a stored weight together with has no way back, and a model that was read could not be
        # written. Written as they are, its parts are those that were read.
        made: list[Any] = model._weight_conversions or []
        model._weight_conversions = [one for one in made if not isinstance(one, WeightConverter)]
