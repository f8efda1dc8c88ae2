"""The damage of quantization: errors of the weights, and the drift of a model's predictions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers import PreTrainedModel

from hymba_tune.adapters.presets import kind_of
from hymba_tune.data import Encoded
from hymba_tune.evaluate.scoring import predicting_states

BATCH = 4096
"""Tokens in a batch of texts."""
CHUNK = 512
"""Tokens whose logits are compared at a time."""


@dataclass(frozen=True)
class ReferenceStates:
    """A model's hidden states for texts, with which other models are compared after it has been freed.

    The states take d numbers for each predicted token, where logits would take one for each token of the vocabulary.
    The output layer is never quantized, so both models share it.

    Attributes:
        rows: The texts, in batches.
        states: The states of each batch, ``(n, d)``.
    """

    rows: Sequence[Sequence[Encoded]]
    states: Sequence[Tensor]


@dataclass(frozen=True)
class QuantizationDrift:
    """The predictions of a model compared with those of its original; means over all predicted tokens.

    Attributes:
        kl: KL(original || model), nats per token.
        loss_before: The cross-entropy of the original, nats per token.
        loss_after: The cross-entropy of the model, nats per token.
        same: The share of tokens where both have the same most likely token.
    """

    kl: float
    loss_before: float
    loss_after: float
    same: float

    @property
    def perplexity_before(self) -> float:
        """The perplexity of the original."""
        return _perplexity(self.loss_before)

    @property
    def perplexity_after(self) -> float:
        """The perplexity of the model."""
        return _perplexity(self.loss_after)

    @property
    def loss_rise(self) -> float:
        """The rise of the cross-entropy, nats per token."""
        return self.loss_after - self.loss_before

    @property
    def rise(self) -> float:
        """The relative rise of the perplexity."""
        return math.expm1(self.loss_rise)

    @property
    def perplexities(self) -> tuple[str, str]:
        """Both perplexities, formatted with the significant digits."""
        digits = 1 if self.perplexity_before >= 100 else 2 if self.perplexity_before >= 10 else 3
        return f"{self.perplexity_before:,.{digits}f}", f"{self.perplexity_after:,.{digits}f}"

    @property
    def risen(self) -> str:
        """The relative rise of the perplexity, formatted: ``+0.42 %``."""
        return f"{100 * self.rise:+.2f} %".replace("-", "−")


@dataclass(frozen=True)
class KindError:
    """The effect of quantization on the modules of one kind.

    Attributes:
        modules: The number of modules.
        weights: The number of weights in all of them.
        bytes_before: The bytes before quantization.
        bytes_after: The bytes after quantization, including scales.
        error: ||W' - W|| / ||W|| (Frobenius) over all of them.
    """

    modules: int
    weights: int
    bytes_before: int
    bytes_after: int
    error: float


def refer(model: PreTrainedModel, rows: Sequence[Encoded], progress: Callable[[int], None]) -> ReferenceStates:
    """Compute a model's states for texts, to compare other models with it.

    Args:
        model: The model, in evaluation mode.
        rows: The texts, with labels.
        progress: Called with the number of rows read.
    """
    batches: list[list[Encoded]] = []
    room = 0
    for row in rows:
        if not batches or len(row.input_ids) > room:
            batches.append([])
            room = BATCH
        batches[-1].append(row)
        room -= len(row.input_ids)
    return ReferenceStates(batches, [states for states, _ in _read(model, batches, progress)])


@torch.inference_mode()
def compare(reference: ReferenceStates, model: PreTrainedModel, progress: Callable[[int], None]) -> QuantizationDrift:
    """Compare a model's predictions with those of a reference.

    Args:
        reference: The states of the reference.
        model: The model, in evaluation mode, with the output layer of the reference.
        progress: Called with the number of rows read.
    """
    sums, tokens = torch.zeros(4, dtype=torch.float64), 0
    head = model.lm_head.weight
    read = _read(model, reference.rows, progress)
    for states_before, (states_after, targets) in zip(reference.states, read, strict=True):
        for begin in range(0, len(targets), CHUNK):
            part = slice(begin, begin + CHUNK)
            before, after = (_log_probs(states[part], head) for states in (states_before, states_after))
            sums[0] += (before.exp() * (before - after)).sum().item()
            sums[1] -= before.gather(1, targets[part, None]).sum().item()
            sums[2] -= after.gather(1, targets[part, None]).sum().item()
            sums[3] += (before.argmax(1) == after.argmax(1)).sum().item()
        tokens += len(targets)
    return QuantizationDrift(*(sums / tokens).tolist())


@torch.inference_mode()
def weight_errors(model: PreTrainedModel, quantized: PreTrainedModel) -> dict[str, KindError]:
    """Measure the errors of the weights by kind of module, without the kinds that are not quantized.

    Args:
        model: The original model.
        quantized: The quantized model.
    """
    before = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    by_kind: dict[str, list[tuple[float, float, int, int, int]]] = {}
    for name, module in quantized.named_modules():
        if name in before and type(module) is not nn.Linear:
            weight = before[name].weight
            change = dequantize_module_weight(module).float() - weight.float()
            squares = (change.double().square().sum().item(), weight.double().square().sum().item())
            sizes = (weight.numel(), weight.nbytes, _stored(module))
            by_kind.setdefault(kind_of(name), []).append((*squares, *sizes))
    return {kind: _summed(each) for kind, each in by_kind.items()}


def _read(
    model: PreTrainedModel, batches: Sequence[Sequence[Encoded]], progress: Callable[[int], None]
) -> Iterator[tuple[Tensor, Tensor]]:
    done = 0
    for batch in batches:
        yield predicting_states(model, batch)
        done += len(batch)
        progress(done)


def _log_probs(states: Tensor, head: Tensor) -> Tensor:
    return nn.functional.linear(states, head.to(states.dtype)).log_softmax(-1, dtype=torch.float32)


def _stored(module: nn.Module) -> int:
    """Return the bytes that a quantized layer stores for its weight."""
    state: dict[str, Tensor] = {}
    module._save_to_state_dict(state, "", False)
    return sum(held.nbytes for name, held in state.items() if name != "bias")


def _summed(each: Sequence[tuple[float, float, int, int, int]]) -> KindError:
    changed, whole, weights, before, after = map(sum, zip(*each, strict=True))
    return KindError(len(each), int(weights), int(before), int(after), math.sqrt(changed / whole) if whole else 0.0)


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
