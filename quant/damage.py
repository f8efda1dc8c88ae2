"""What quantizing costs: errors of weights, and what they do to a model's predictions."""

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
"""Tokens of texts that are read at a time."""
CHUNK = 512
"""Tokens whose logits are compared at a time."""


@dataclass(frozen=True)
class ReferenceStates:
    """What a model makes of texts, kept so that others can be compared with it when it is gone.

    Of each predicted token its state is kept, from which the head makes the logits: d numbers, not one for each token
    of the vocabulary. The head is never quantized, so that both models have the same one.

    Attributes:
        rows: The texts, a list a batch.
        states: ``(n, d)`` a batch.
    """

    rows: Sequence[Sequence[Encoded]]
    states: Sequence[Tensor]


@dataclass(frozen=True)
class QuantizationDrift:
    """How a model predicts beside the one that it was made of; means over all predicted tokens.

    Attributes:
        kl: KL(model before || model after), nats a token.
        loss_before: Cross-entropy of the model before, nats a token.
        loss_after: Of the one after.
        same: Share of the tokens where both find the same one likeliest.
    """

    kl: float
    loss_before: float
    loss_after: float
    same: float

    @property
    def perplexity_before(self) -> float:
        """Of a token, before."""
        return _perplexity(self.loss_before)

    @property
    def perplexity_after(self) -> float:
        """Of a token, after."""
        return _perplexity(self.loss_after)

    @property
    def loss_rise(self) -> float:
        """By how much the cross-entropy is larger."""
        return self.loss_after - self.loss_before

    @property
    def rise(self) -> float:
        """By how much the perplexity is larger, as a share of what it was."""
        return math.expm1(self.loss_rise)

    @property
    def perplexities(self) -> tuple[str, str]:
        """Before and after, with the digits that matter."""
        digits = 1 if self.perplexity_before >= 100 else 2 if self.perplexity_before >= 10 else 3
        return f"{self.perplexity_before:,.{digits}f}", f"{self.perplexity_after:,.{digits}f}"

    @property
    def risen(self) -> str:
        """The same in words: ``+0.42 %``."""
        return f"{100 * self.rise:+.2f} %".replace("-", "−")


@dataclass(frozen=True)
class KindError:
    """What quantizing did to the modules of one kind.

    Attributes:
        modules: How many there are.
        weights: Of all of them.
        bytes_before: That they took.
        bytes_after: That they take, scales included.
        error: ||W' - W|| / ||W|| (Frobenius) over all of them.
    """

    modules: int
    weights: int
    bytes_before: int
    bytes_after: int
    error: float


def refer(model: PreTrainedModel, rows: Sequence[Encoded], progress: Callable[[int], None]) -> ReferenceStates:
    """Read texts with a model, to compare others with it.

    Args:
        model: In evaluation mode.
        rows: With labels.
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
    """Let a model predict what another one did.

    Args:
        reference: The other one's.
        model: In evaluation mode, with the other's head.
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
    """What quantizing did to weights, by kind of module; kinds that were left as they are do not stand there.

    Args:
        model: As it was.
        quantized: What was made of it.
    """
    before = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    found: dict[str, list[tuple[float, float, int, int, int]]] = {}
    for name, module in quantized.named_modules():
        if name in before and type(module) is not nn.Linear:
            weight = before[name].weight
            change = dequantize_module_weight(module).float() - weight.float()
            squares = (change.double().square().sum().item(), weight.double().square().sum().item())
            sizes = (weight.numel(), weight.nbytes, _stored(module))
            found.setdefault(kind_of(name), []).append((*squares, *sizes))
    return {kind: _summed(each) for kind, each in found.items()}


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
    """Bytes of what a quantized layer stores of its weight."""
    state: dict[str, Tensor] = {}
    module._save_to_state_dict(state, "", False)
    return sum(held.nbytes for name, held in state.items() if name != "bias")


def _summed(each: Sequence[tuple[float, float, int, int, int]]) -> KindError:
    changed, whole, weights, before, after = map(sum, zip(*each, strict=True))
    return KindError(len(each), int(weights), int(before), int(after), math.sqrt(changed / whole) if whole else 0.0)


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
