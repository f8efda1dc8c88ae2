"""One run of the distillation benchmark: hymba-nano goes on learning, and is measured."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from distill_losses import KEPT, Lesson, Setting, fewer, load, write
from distill_teachers import NANO, answer_bits, groups, side_of
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hymba_tune.data import Conversation, Message, encode_prompt
from hymba_tune.data.formats import Example
from hymba_tune.distill.chunks import Head
from hymba_tune.distill.losses import forward_kl, sorted_uld
from hymba_tune.distill.objective import SpanTerm, TokenTerm, distillation_loss, span_term, sparse_term
from hymba_tune.distill.targets import Targets
from hymba_tune.model import HymbaForCausalLM

STEP_TOKENS = 1024
WARMUP = 0.05
SAMPLED = 48
"""Answers that a student samples."""
Terms = Callable[["Batch"], dict[str, TokenTerm | SpanTerm]]


@dataclass(frozen=True)
class Way:
    """A way of distilling.

    Attributes:
        loss: ``ce``, ``kl`` of whole vocabularies, ``uld``, ``alm``, ``projection`` or ``projection+alm``; the last has
            chunk likelihoods where the projection has no target.
        setting: How the targets are made; None where there is no teacher.
        written: Whether the answers are the teacher's.
        alpha: The teacher's share of the loss.
        k: Pieces of a target.
        tau: Of chunk likelihoods.
    """

    loss: str = "projection"
    setting: Setting | None = None
    written: bool = False
    alpha: float = 0.7
    k: int = KEPT // 2
    tau: float = 100.0


@dataclass(frozen=True)
class Batch:
    """Lessons laid end to end, each token's label moved to where it is predicted."""

    ids: Tensor
    positions: Tensor
    labels: Tensor
    targets: Targets | None
    begins: Tensor
    hidden: Tensor


def lay_out(signals: Sequence[Lesson], k: int) -> Batch:
    """Lay lessons end to end."""
    sizes = torch.tensor([len(lesson.ids) for lesson in signals])
    offsets = (sizes.cumsum(0) - sizes - 1).tolist()  # what is predicted stands one token before itself
    taught = [(lesson, offset) for lesson, offset in zip(signals, offsets, strict=True) if lesson.targets is not None]
    targets = None
    begins, hidden = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 1)
    if taught:
        targets = Targets.joined([fewer(lesson.targets, k) for lesson, _ in taught], [offset for _, offset in taught])
        begins = torch.cat([lesson.begins + offset for lesson, offset in taught])
        hidden = torch.cat([lesson.hidden for lesson, _ in taught]).float()
    return Batch(
        torch.cat([lesson.ids for lesson in signals]),
        torch.cat([torch.arange(len(lesson.ids)) for lesson in signals]),
        torch.cat([lesson.labels for lesson in signals])[1:],
        targets,
        begins,
        hidden,
    )


def batches(signals: Sequence[Lesson], seed: int) -> Iterator[list[Lesson]]:
    """Rows in random order, again and again, about `STEP_TOKENS` at a time."""
    drawn = random.Random(seed)
    batch: list[Lesson] = []
    while True:
        for lesson in drawn.sample(signals, len(signals)):
            batch.append(lesson)
            if sum(len(one.ids) for one in batch) >= STEP_TOKENS:
                yield batch
                batch = []


def train(
    signals: Sequence[Lesson], way: Way, lr: float, seed: int, steps: int, head: Tensor | None
) -> HymbaForCausalLM:
    """Train all of hymba-nano's weights.

    Args:
        signals: Its rows.
        way: How.
        lr: The highest learning rate; it rises for a twentieth of the steps, then falls to zero as a cosine.
        seed: Of the order of the rows.
        steps: Of `STEP_TOKENS`.
        head: The teacher's output layer, which ``uld`` and ``kl`` need.
    """
    torch.manual_seed(seed)
    model = nano()[0].train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    weight = model.get_output_embeddings().weight
    for step, rows in zip(range(steps), batches(signals, seed), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / max(1, WARMUP * steps), (1 + math.cos(math.pi * step / steps)) / 2)
        batch = lay_out(rows, way.k)
        with torch.autocast("cpu", torch.bfloat16):
            output = model.model(input_ids=batch.ids[None], position_ids=batch.positions[None])
        student = Head(output.last_hidden_state[0, :-1], weight)
        losses = distillation_loss(student, batch.labels, alpha=way.alpha, **terms(batch, way, head))
        (losses.total / losses.tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def terms(batch: Batch, way: Way, head: Tensor | None) -> dict[str, TokenTerm | SpanTerm]:
    """The teacher's part of the loss."""
    if batch.targets is None or way.loss == "ce":
        return {}
    if way.loss == "alm":
        return {"spans": span_term(batch.targets, tau=way.tau)}
    if way.loss in ("uld", "kl"):
        return {"tokens": _whole_term(batch, head, sorted_uld if way.loss == "uld" else forward_kl)}
    temperature = way.setting.temperature
    found = {"tokens": sparse_term(batch.targets, temperature=temperature)}
    if way.loss == "projection+alm":
        found["spans"] = span_term(batch.targets, tau=way.tau, only_without_target=True)
    return found


def _whole_term(batch: Batch, head: Tensor, compare: Callable[[Tensor, Tensor], Tensor]) -> TokenTerm:
    """At tokens that begin where one of the teacher's does, between whole vocabularies."""
    teacher = Head(batch.hidden, head)

    def loss(logits: Tensor, part: slice) -> Tensor:
        return compare(logits, teacher.logits(part))

    return TokenTerm(batch.begins, loss, vocabulary=len(head))


def nano() -> tuple[HymbaForCausalLM, PreTrainedTokenizerFast]:
    """The student as it is packaged."""
    model = HymbaForCausalLM.from_pretrained(NANO, dtype=torch.float32)
    return model.eval(), PreTrainedTokenizerFast.from_pretrained(NANO)


def bits_per_byte(
    model: PreTrainedModel, held_out: dict[str, list[Example]], tokenizer: PreTrainedTokenizerFast
) -> dict[str, float]:
    """Of each kind of held-out answers, and of all."""
    side = side_of(tokenizer)
    found = {kind: answer_bits(model, side, examples) for kind, examples in held_out.items()}
    bits, sizes = map(sum, zip(*found.values(), strict=True))
    return {"all": bits / sizes} | {kind: bits / size for kind, (bits, size) in found.items()}


@torch.inference_mode()
def writing(
    model: HymbaForCausalLM, held_out: dict[str, list[Example]], teacher: Path, tokens: int
) -> dict[str, float]:
    """What the student writes itself.

    Returns:
        ``exact``: share of digit tasks answered exactly, by the likeliest tokens. ``teacher``: bits a byte the teacher
        needs for answers that the student samples to GSM8K's questions, or to the digit tasks where there are none.
    """
    asked = held_out["digits"]
    answers = _answers(model, asked, 24, sample=False)
    right = sum(answer.strip() == example.messages[-1].content for answer, example in zip(answers, asked, strict=True))
    asked = held_out.get("gsm8k", asked)[:SAMPLED]
    answers = _answers(model, asked, tokens, sample=True)
    written = [
        Conversation((example.messages[0], Message("assistant", answer.strip())))
        for answer, example in zip(answers, asked, strict=True)
        if answer.strip()
    ]
    judge, tokenizer = load(teacher)
    bits, size = answer_bits(judge, side_of(tokenizer), written, ends=False)
    return {"exact": right / len(held_out["digits"]), "teacher": bits / size}


def _answers(model: HymbaForCausalLM, examples: Sequence[Example], tokens: int, *, sample: bool) -> list[str]:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(NANO)
    torch.manual_seed(0)
    answers = []
    for some in groups(examples, 100):
        prompts = [encode_prompt(replace(example, messages=example.messages[:1]), tokenizer) for example in some]
        answers += write(model, tokenizer, prompts, tokens, sample=sample)
    return answers
