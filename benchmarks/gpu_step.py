"""A LoRA or QLoRA step at the released size: tokens per second, memory, and the time of each kernel."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from gpu_journal import Row, Table
from gpu_measure import TIMES, TIMES_NOTES, Bench, Failure, Measured
from gpu_models import hymba, random_ids
from gpu_profile import host_waits
from harness import Cell
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

COLUMNS = (
    *("weights", "tokens", "checkpointing", "optimizer", *TIMES, "launches", "host waits"),
    *("tokens/s", "% of matmul", "peak GB", "planned GB", "planned ms"),
)
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
        optimizer: A key of `OPTIMIZERS`.
    """

    def __init__(self, model: PeftModel, tokens: int, optimizer: str = "adamw") -> None:
        self.model = model
        self.ids = random_ids(model.get_base_model(), 1, tokens)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = OPTIMIZERS[optimizer](trainable)
        self.loss: Tensor | None = None

    def __call__(self) -> None:
        """Forward, backward, update."""
        with torch.autocast(self.ids.device.type, torch.bfloat16):
            loss = self.model(input_ids=self.ids, labels=self.ids, use_cache=False, skip_logits=True).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.loss = loss.detach()


def _adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4, fused=parameters[0].is_cuda)


def _bitsandbytes(name: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    from bitsandbytes import optim

    optimizer: torch.optim.Optimizer = getattr(optim, name)(parameters, lr=1e-4)
    return optimizer


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw8bit": partial(_bitsandbytes, "AdamW8bit"),
    "paged-adamw8bit": partial(_bitsandbytes, "PagedAdamW8bit"),
}
"""Optimizers by their names in the settings of `hymba-tune`."""


def step(bench: Bench) -> None:
    """Time a step with bfloat16 weights on a text of 2,048 tokens, and list its kernels."""
    with bench.table("step", COLUMNS, _notes(bench)) as table:
        spent = measure_steps(bench, table, "bf16", 2048, checkpointing=False, optimizers=["adamw"])
    list_kernels(bench, spent)


def nf4_step(bench: Bench) -> None:
    """Time a step with 4-bit weights on a text of 2,048 tokens, by optimizer."""
    with bench.table("step", COLUMNS, _notes(bench)) as table:
        if find_spec("bitsandbytes") is None:
            table.note("NF4 is not measured: bitsandbytes is not installed")
            return
        optimizers = [name for name in OPTIMIZERS if bench.device.type == "cuda" or "8bit" not in name]
        if len(optimizers) < len(OPTIMIZERS):
            table.note("8-bit optimizers are not measured: they need a GPU")
        measure_steps(bench, table, "NF4", 2048, checkpointing=False, optimizers=optimizers)


def long_step(bench: Bench) -> None:
    """Time a step with checkpointing on a text of 8,192 tokens."""
    with bench.table("step", COLUMNS, _notes(bench)) as table:
        measure_steps(bench, table, "bf16", 8192, checkpointing=True, optimizers=["adamw"])


def _notes(bench: Bench) -> list[str]:
    return [
        f"random weights of the released shape, LoRA of rank {RANK} on {', '.join(TARGETS)}; the optimizer included",
        *TIMES_NOTES,
        "% of matmul: 4 FLOP per token and weight of the linear layers, including the head, half in the backward, "
        "which computes no gradients of frozen weights; attention, scan and recomputation are not counted; relative to "
        f"the {bench.limits.matmul / 1e12:.0f} TFLOP/s of a large bf16 product",
        "peak GB: all allocated memory; planned: by the functions of hymba-tune plan, with this card's measured limits "
        "in place of a maker's figures, and without the reserve for CUDA itself",
    ]


def measure_steps(
    bench: Bench, table: Table, weights: str, tokens: int, *, checkpointing: bool, optimizers: list[str]
) -> dict[str, tuple[float, int]]:
    """Add a row for each optimizer; returns the kernels of the last step."""
    tokens = 48 if bench.quick else tokens
    model = bench.attempt(f"{weights} weights", adapted, bench, weights)
    if isinstance(model, Failure):
        table.note(f"{weights} failed: {model}")
        return {}
    checkpoint(model, checkpointing)
    spent: dict[str, tuple[float, int]] = {}
    for optimizer in optimizers:
        words = {"weights": weights, "tokens": tokens, "checkpointing": "yes" if checkpointing else "no"}
        case: Row = {**words, "optimizer": optimizer}
        what = ", ".join(f"{key} {value}" for key, value in case.items())
        work = bench.attempt(what, Step, model, tokens, optimizer)
        measured = work if isinstance(work, Failure) else _measured(bench, work, what)
        if isinstance(work, Failure) or isinstance(measured, Failure):
            table.note(f"{what} failed: {measured}")
            continue
        speed = tokens / measured.timing.median
        table.add(
            {
                **case,
                **measured.cells(),
                "host waits": host_waits(work, bench.device),
                "tokens/s": speed,
                "% of matmul": 100 * 4 * matmul_weights(model) * speed / bench.limits.matmul,
                "peak GB": None if measured.peak is None else measured.peak / 1e9,
                **planned(bench, table, model, tokens, weights, optimizer, checkpointing=checkpointing),
            }
        )
        spent = measured.kernels
    return spent


def planned(
    bench: Bench, table: Table, model: PeftModel, tokens: int, weights: str, optimizer: str, *, checkpointing: bool
) -> dict[str, Cell]:
    """What `hymba-tune plan` says of a step; empty where packages that it needs are not installed."""
    try:
        from hymba_tune.footprint import Batch, StepMemory
        from hymba_tune.footprint.cards import LAUNCH
        from hymba_tune.footprint.work import Speeds, step_work
    except ImportError as error:
        table.note(f"no plan: {error}")
        return {}
    # Layers that are counted are not quantized, as before a run.
    model = adapted(bench, "bf16") if weights == "NF4" else model
    quantized = _nf4_bytes(model) if weights == "NF4" else {}
    checkpoint(model, False)  # what is counted is one layer at a time
    common = {"checkpointing": checkpointing, "optimizer": optimizer, "quantized": quantized}
    batch = Batch.full(1, tokens)
    memory = StepMemory(model, dtype=torch.bfloat16, own_kernels=False).of(batch, accumulates=False, **common)
    work = step_work(model, batch, dtype=torch.bfloat16, own_kernels=False, **common)
    checkpoint(model, checkpointing)
    seconds = work.seconds(Speeds(bench.limits.matmul, bench.limits.bandwidth, LAUNCH))
    return {"planned GB": memory.total / 1e9, "planned ms": 1e3 * seconds}


def _nf4_bytes(model: PeftModel) -> dict[str, int]:
    """The bytes of each weight that `quantize` quantizes: half a byte each, and a float32 for every 64."""
    return {
        name.removesuffix(".base_layer"): layer.weight.numel() // 2 + 4 * layer.weight.numel() // 64
        for name, layer in model.get_base_model().named_modules()
        if isinstance(layer, nn.Linear) and name.removesuffix(".base_layer").rpartition(".")[2] in QUANTIZED
    }


def _measured(bench: Bench, work: Step, what: str) -> Measured | Failure:
    measured = bench.measure(what, {"step": work})["step"]
    if work.loss is not None and not work.loss.isfinite():
        bench.fail(f"{what}: the loss is {work.loss.item()}")
    return measured


def list_kernels(bench: Bench, spent: dict[str, tuple[float, int]]) -> None:
    """Report the time of each kernel in a step with bfloat16 weights and without checkpointing."""
    total = sum(seconds for seconds, _ in spent.values())
    with bench.table("step_kernels", KERNEL_COLUMNS) as table:
        if not spent:
            table.note("nothing to show: there is no profiler for kernels here")
        for name in sorted(spent, key=lambda name: -spent[name][0])[:LISTED]:
            seconds, launches = spent[name]
            short = name[:80].translate(str.maketrans("[]", "()"))  # a table interprets brackets as markup
            table.add({"kernel": short, "launches": launches, "ms": seconds * 1e3, "%": 100 * seconds / total})


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
