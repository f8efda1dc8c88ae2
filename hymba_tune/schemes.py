"""Quantization by bitsandbytes: which modules stay unquantized and why, and how checkpoints store the others."""

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
UNQUANTIZED = {
    "lm_head": "shares its weight with the embeddings",
    "embed_tokens": "is a lookup table, and shares its weight with the output layer",
    "memory_tokens": "is small, and every text attends to it",
    "x_proj.0": "computes the time steps, B and C: the recurrence carries their errors from token to token",
    "dt_proj.0": "computes the time steps, which are exponentiated; its result is float32",
    "conv1d": "has four weights per channel: nothing to save",
    "A_log.0": "is the exponent of every state's decay",
    "D.0": "has one weight per channel: nothing to save",
    "norm": "has one weight per channel: nothing to save",
    "norm1": "has one weight per channel: nothing to save",
    "norm2": "has one weight per channel: nothing to save",
}
"""Modules that no scheme quantizes, by the ends of their names, and why. transformers adds modules of its own."""
ROWS, COLUMNS = 32, 64
"""Multiples that the shape of a 4-bit weight must have: bitsandbytes' CPU kernels support no others."""
BLOCK, NESTED_BLOCK = 64, 256
"""The number of 4-bit weights that share a scale, and of 8-bit scales that share a second one."""
BYTES = {"SCB": 4, "weight.quant_map": 4, "weight.nested_absmax": 4, "weight.nested_quant_map": 4}
"""Bytes per element of the tensors that are stored with a quantized weight, unless it is 1."""


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
        scheme: The scheme. NF4 and FP4 quantize their scales to 8 bits as well (double quantization).
        dtype: The dtype of the computation.
        skip: Further modules to leave unquantized, by the ends of their names: ``down_proj``,
            ``layers.3.mamba.in_proj``.

    Raises:
        ConfigError: If no name ends in an element of ``skip``, or if nothing is left to quantize.
    """
    model = _without_weights(model_config)
    linear = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    if unknown := [end for end in skip if not any(f".{name}".endswith(f".{end}") for name in linear)]:
        raise ConfigError(
            f"--skip {unknown[0]}: the model has no linear layer of this name.",
            expected=", ".join(sorted({name.rsplit(".", 1)[1] for name in linear if name not in UNQUANTIZED} - {"0"})),
        )
    unquantized = [*sorted(get_keys_to_not_convert(model)), *UNQUANTIZED, *skip]
    if BITS[scheme] == 4:
        unquantized += [
            name for name, module in linear.items() if module.out_features % ROWS or module.in_features % COLUMNS
        ]
    config = bitsandbytes(scheme, dtype, list(dict.fromkeys(unquantized)))
    if not quantized(model, config):
        raise ConfigError(
            f"{scheme.value}: no layer of this model can be quantized in this scheme.",
            expected=f"linear layers whose rows are a multiple of {ROWS} and whose columns are a multiple of {COLUMNS}",
        )
    return config


def reasons(model_config: Any, config: BitsAndBytesConfig, skip: Sequence[str] = ()) -> dict[str, str]:
    """Return why modules stay unquantized, by the ends of their names.

    Args:
        model_config: The configuration of the model.
        config: The configuration that `quantization` returned for it.
        skip: The argument ``skip`` of `quantization`.
    """
    model = _without_weights(model_config)
    names = [name.removesuffix(".weight") for name, _ in model.named_parameters(remove_duplicate=False)]
    by_end = {end: why for end, why in UNQUANTIZED.items() if any(name.endswith(end) for name in names)}
    quantized_layers = quantized(model, config)
    for name, module in model.named_modules():
        if type(module) is nn.Linear and name not in quantized_layers and not name.endswith((*by_end, *skip)):
            shape = f"{module.out_features} × {module.in_features}"
            by_end[name.rpartition(".")[2]] = f"is {shape}, not a multiple of {ROWS} rows and {COLUMNS} columns"
    return by_end | dict.fromkeys(skip, "excluded by --skip")


def bitsandbytes(scheme: Scheme, dtype: torch.dtype, unquantized: Sequence[str] | None = None) -> BitsAndBytesConfig:
    """Return bitsandbytes' configuration of a scheme, for any model.

    Args:
        scheme: The scheme, as for `quantization`.
        dtype: The dtype of the computation.
        unquantized: The names of the modules to leave unquantized; transformers' choice if None.
    """
    return BitsAndBytesConfig(
        load_in_8bit=scheme == "int8",
        load_in_4bit=scheme != "int8",
        bnb_4bit_quant_type="nf4" if scheme == "int8" else str(scheme),
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=unquantized,
    )


def stored_quantization(model_config: Any) -> BitsAndBytesConfig | None:
    """Return the quantization that a checkpoint's configuration states; None if the checkpoint is not quantized.

    Raises:
        CheckpointError: If it is quantized, but not by bitsandbytes.
    """
    stored = getattr(model_config, "quantization_config", None)
    if stored is None or isinstance(stored, BitsAndBytesConfig):
        return stored
    if stored.get("quant_method") != "bitsandbytes":
        raise CheckpointError(
            f"The model is quantized by {stored.get('quant_method')}.",
            expected="bitsandbytes (nf4, fp4 or int8), or weights that are not quantized",
        )
    return BitsAndBytesConfig.from_dict(stored)


def scheme_of(config: BitsAndBytesConfig) -> Scheme:
    """Return the scheme of bitsandbytes' configuration."""
    from hymba_tune.config import Scheme

    return Scheme.int8 if config.load_in_8bit else Scheme(config.bnb_4bit_quant_type)


def quantized(model: nn.Module, config: BitsAndBytesConfig) -> dict[str, nn.Linear]:
    """Return the layers of an unquantized model that a configuration quantizes, by their names."""
    unquantized = config.llm_int8_skip_modules or get_keys_to_not_convert(model)
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and should_convert_module(name, unquantized)
    }


def stored_shapes(name: str, layer: nn.Linear, config: BitsAndBytesConfig) -> dict[str, list[int]]:
    """Return the shapes of the tensors in which a checkpoint stores a quantized layer, by their names.

    Args:
        name: The name of the layer.
        layer: The layer before quantization.
        config: The quantization, from `quantization` or `stored_quantization`.
    """
    rows = layer.out_features
    if config.load_in_8bit:
        return {f"{name}.weight": [rows, layer.in_features], f"{name}.SCB": [rows], f"{name}.weight_format": []}
    weights = layer.weight.numel()
    blocks = math.ceil(weights / BLOCK)
    shapes = {"weight": [math.ceil(weights / 2), 1], "weight.absmax": [blocks], "weight.quant_map": [16]}
    if config.bnb_4bit_use_double_quant:
        shapes |= {"weight.nested_absmax": [math.ceil(blocks / NESTED_BLOCK)], "weight.nested_quant_map": [256]}
    return {f"{name}.{part}": shape for part, shape in shapes.items()}


def stored_dtypes(part: str, config: BitsAndBytesConfig) -> list[str]:
    """Return the dtypes that a tensor of a quantized layer may have, as safetensors files name them.

    Args:
        part: The name of the tensor, from `stored_shapes`.
        config: The quantization, as for `stored_shapes`.
    """
    kind = part.rpartition(".")[2]
    if kind == "weight":
        return ["I8"] if config.load_in_8bit else ["U8"]
    if kind == "weight_format":
        return ["U8"]
    return ["U8"] if kind == "absmax" and config.bnb_4bit_use_double_quant else ["F32"]


def stored_state(name: str, config: BitsAndBytesConfig) -> str | None:
    """Return the name of the tensor that describes a 4-bit layer, whose size varies; None for 8 bits."""
    return None if config.load_in_8bit else f"{name}.weight.quant_state.bitsandbytes__{config.bnb_4bit_quant_type}"


def stored_bytes(model_config: Any, config: BitsAndBytesConfig) -> dict[str, int]:
    """Return the bytes of the weights of a model's quantized layers, by the layers' names.

    Args:
        model_config: The configuration of the model.
        config: The quantization, from `quantization` or `stored_quantization`.
    """
    return {
        name: sum(BYTES.get(part.removeprefix(f"{name}."), 1) * math.prod(shape) for part, shape in parts.items())
        for name, layer in quantized(_without_weights(model_config), config).items()
        for parts in [stored_shapes(name, layer, config)]
    }


def _without_weights(model_config: Any) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model_config)


def fix_loaded_quantization(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Correct how a quantized model that was just loaded computes and is saved. Other models are not changed.

    Args:
        model: The model, changed in place.
        dtype: The dtype of the computation, whichever was used when the model was quantized.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On such a CPU, bitsandbytes repacks the weights at the first evaluation, but its backward expects the
            # original layout: gradients would be wrong without an error.
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype = dtype
    if getattr(model, "is_quantized", False):
        # transformers assembles a quantized weight from its stored tensors by conversions that it cannot reverse, so
        # that saving fails. Without them it saves the tensors as they were stored.
        conversions: list[Any] = model._weight_conversions or []
        model._weight_conversions = [step for step in conversions if not isinstance(step, WeightConverter)]
