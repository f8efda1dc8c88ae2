"""A LoRA or QLoRA step at the released size: tokens per second, memory, and the time of each kernel."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from itertools import product

import torch
from gpu_measure import Bench, Failure, Measured, Row, free
from gpu_models import hymba, random_ids
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

COLUMNS = ("weights", "tokens", "checkpointing", "ms", "min", "max", "kernels ms", "tokens/s", "% of matmul", "peak GB")
KERNEL_COLUMNS = ("kernel", "launches", "ms", "%")
TARGETS = ["in_proj", "out_proj", "x_proj.0", "dt_proj.0", "gate_proj", "up_proj", "down_proj"]
QUANTIZED = ("in_proj", "out_proj", "gate_proj", "up_proj", "down_proj")
"""The SSM's own projections are not quantized: they are too narrow for 4-bit blocks, and small."""
RANK = 16
LISTED = 20
"""Number of kernels shown, the slowest first."""


class Step:
    """A training step on one text, as in a training run: bfloat16 autocast, float32 adapter, AdamW.

    Args:
        model: A model with an adapter.
        tokens: Length of the text.
    """

    def __init__(self, model: PeftModel, tokens: int) -> None:
        self.model = model
        self.ids = random_ids(model.get_base_model(), 1, tokens)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=self.ids.is_cuda)
        self.loss: Tensor | None = None

    def __call__(self) -> None:
        """Forward, backward, update."""
        with torch.autocast(self.ids.device.type, torch.bfloat16):
            loss = self.model(input_ids=self.ids, labels=self.ids, use_cache=False, skip_logits=True).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.loss = loss.detach()


def step(bench: Bench) -> None:
    """Time a step with bfloat16 and with 4-bit weights, with and without activation checkpointing."""
    limits = bench.limits
    notes = [
        f"random weights of the released shape, LoRA of rank {RANK} on {', '.join(TARGETS)}; AdamW included",
        "% of matmul: 4 FLOP per token and weight of the linear layers, including the head, half in the backward, "
        "which computes no gradients of frozen weights; attention, scan and recomputation are not counted; relative to "
        f"the {limits.matmul / 1e12:.0f} TFLOP/s of a large bf16 product",
        "kernels ms: time in kernels, without the gaps between launches; peak GB: all allocated memory",
    ]
    spent: list[dict[str, tuple[float, int]]] = []
    with bench.table("step", COLUMNS, notes) as rows:
        for weights in ("bf16", "NF4"):
            if weights == "NF4" and find_spec("bitsandbytes") is None:
                notes.append("NF4 is not measured: bitsandbytes is not installed")
                continue
            model = bench.attempt(f"{weights} weights", adapted, bench, weights)
            if isinstance(model, Failure):
                notes.append(f"{weights} failed: {model}")
                continue
            for tokens, checkpointing in product((48,) if bench.quick else (2048, 8192), (False, True)):
                case: Row = {"weights": weights, "tokens": tokens, "checkpointing": "yes" if checkpointing else "no"}
                checkpoint(model, checkpointing)
                what = ", ".join(f"{key} {value}" for key, value in case.items())
                measured = _measured(bench, Step(model, tokens), what)
                if isinstance(measured, Failure):
                    notes.append(f"{what} failed: {measured}")
                    continue
                speed = tokens / measured.timing.median
                share = 4 * matmul_weights(model) * speed / limits.matmul
                peak = None if measured.peak is None else measured.peak / 1e9
                rows.append(
                    {**case, **measured.cells(), "tokens/s": speed, "% of matmul": 100 * share, "peak GB": peak}
                )
                if weights == "bf16" and not checkpointing:
                    spent.append(measured.kernels)
            del model
            free()
    list_kernels(bench, spent[-1] if spent else {})


def _measured(bench: Bench, work: Step, what: str) -> Measured | Failure:
    measured = bench.measure(what, {"step": work})["step"]
    if work.loss is not None and not work.loss.isfinite():
        bench.failures.append(f"{what}: the loss is {work.loss.item()}")
    return measured


def list_kernels(bench: Bench, spent: dict[str, tuple[float, int]]) -> None:
    """Report the time of each kernel in the longest bfloat16 step without checkpointing."""
    notes = ["for the longest step with bfloat16 weights and without checkpointing"]
    total = sum(seconds for seconds, _ in spent.values())
    if not spent:
        notes.append("nothing to show: there is no profiler for kernels here")
    with bench.table("step_kernels", KERNEL_COLUMNS, notes) as rows:
        for name in sorted(spent, key=lambda name: -spent[name][0])[:LISTED]:
            seconds, launches = spent[name]
            short = name[:80].translate(str.maketrans("[]", "()"))  # a table interprets brackets as markup
            rows.append({"kernel": short, "launches": launches, "ms": seconds * 1e3, "%": 100 * seconds / total})


def adapted(bench: Bench, weights: str) -> PeftModel:
    """Hymba with frozen weights of this kind and a new adapter, in training mode."""
    base = hymba(bench.device, quick=bench.quick)
    if weights == "NF4":
        quantize(base)
    with warnings.catch_warnings():
        # PEFT uses a name that is deprecated in transformers.
        warnings.filterwarnings("ignore", category=FutureWarning)
        return get_peft_model(base, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS)).train()


def quantize(model: PreTrainedModel) -> None:
    """Quantize the weights of the large linear layers to 4 bits, in place."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if name in QUANTIZED:
                quantized = Linear4bit(
                    layer.in_features,
                    layer.out_features,
                    bias=layer.bias is not None,
                    device="meta",
                    compute_dtype=torch.bfloat16,
                    quant_type="nf4",
                )
                quantized.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4").to(model.device)
                quantized.bias = layer.bias
                setattr(parent, name, quantized)
    model.is_loaded_in_4bit = True  # PEFT checks this before it uses its own 4-bit layer


def checkpoint(model: PeftModel, on: bool) -> None:
    """Turn activation checkpointing on or off."""
    base = model.get_base_model()
    with warnings.catch_warnings():
        # Names that all supported versions of transformers have; they are deprecated in newer ones.
        warnings.filterwarnings("ignore", category=FutureWarning)
        if on:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            base.gradient_checkpointing_disable()


def matmul_weights(model: nn.Module) -> int:
    """Number of weights of all linear layers except the adapter's."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    return sum(layer.in_features * layer.out_features for name, layer in layers.items() if "lora_" not in name)
