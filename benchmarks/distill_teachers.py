"""The distillation benchmark's teachers: two Llamas alike but for their tokenizers, trained on the same texts."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from hymba_tune.data.formats import Example, Text
from hymba_tune.distill.pair import Side, TokenizedRow, make_pair, tokenize_examples

NANO = Path(__file__).parent.parent / "hymba_tune" / "assets" / "hymba-nano"
VOCABULARY = 8192
WORD = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How byte-level tokenizers of today part a text before they merge: up to three digits are one word."""
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n"
    "{{ message['content'] | trim }}{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LAYERS = {"num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 6}
FULL = {"hidden_size": 384, "intermediate_size": 1024, **LAYERS}
QUICK = {"hidden_size": 48, "intermediate_size": 64, **LAYERS, "num_hidden_layers": 2}
LONGEST = 512
"""Tokens of a row, at most; longer ones are left out."""
STEP_TOKENS = 2048
WARMUP = 30
"""Steps."""

T = TypeVar("T")
console = Console()


def train_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a chat template of its own, in the manner of Llama 3's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[1], pad_token=special[2]
    )
    fast.chat_template = TEMPLATE
    return fast


def twin_tokenizer() -> PreTrainedTokenizerFast:
    """The student's own."""
    return PreTrainedTokenizerFast.from_pretrained(NANO)


def spelled(example: Example) -> str:
    """An example's text, for a tokenizer to learn from."""
    return example.text if isinstance(example, Text) else "\n".join(m.content for m in example.messages)


def side_of(tokenizer: PreTrainedTokenizerFast) -> Side:
    """A tokenizer as `tokenize_examples` takes it."""
    return make_pair(tokenizer, tokenizer).student


@dataclass(frozen=True)
class Stage:
    """A part of a teacher's training: steps of about `STEP_TOKENS`, the learning rate falling to zero at their end."""

    examples: Sequence[Example]
    steps: int
    lr: float


def train(tokenizer: PreTrainedTokenizerFast, stages: Sequence[Stage], body: dict[str, int], folder: Path) -> None:
    """Train a Llama on all tokens of examples and save it with its tokenizer.

    Args:
        tokenizer: Its own.
        stages: One after the other; examples are read again and again, each time in another order.
        body: Sizes of the model.
        folder: Where it goes.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        **body,
        vocab_size=len(tokenizer),
        max_position_embeddings=2 * LONGEST,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    for stage in stages:
        rows = [
            row.ids for row in tokenize_examples(stage.examples, side_of(tokenizer)) if isinstance(row, TokenizedRow)
        ]
        rows = [row for row in rows if len(row) <= LONGEST]
        console.print(f"{folder.name}: {model.num_parameters():,} parameters, {sum(map(len, rows)):,} tokens a pass")
        _go_through(model, rows, stage)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _go_through(model: PreTrainedModel, rows: Sequence[list[int]], stage: Stage) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=stage.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for step, batch in zip(range(stage.steps), _batches(rows), strict=False):
        rate = stage.lr * min((step + 1) / WARMUP, math.cos(step / stage.steps * math.pi / 2) ** 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = mean_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            console.print(f"step {step:,} of {stage.steps:,}, loss {loss.item():.3f}")


def groups(rows: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """So many at a time."""
    return (rows[begin : begin + size] for begin in range(0, len(rows), size))


def padded(rows: Sequence[list[int]]) -> Tensor:
    """Rows of one length, shorter ones filled up at their ends, which no token before sees."""
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows])


def mean_loss(model: PreTrainedModel, rows: Sequence[list[int]]) -> Tensor:
    """Mean cross-entropy of all tokens."""
    ids = padded(rows)
    filled = torch.arange(ids.shape[1]) >= torch.tensor([[len(row)] for row in rows])
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return cross_entropy(logits.float().flatten(0, 1), ids.masked_fill(filled, -100)[:, 1:].flatten())


def _batches(rows: Sequence[list[int]]) -> Iterator[list[list[int]]]:
    """Rows of about one length together, so that little is filled up."""
    for turn in range(1_000_000):
        drawn = random.Random(turn)
        batches: list[list[list[int]]] = [[]]
        for row in sorted(rows, key=lambda row: len(row) + 20 * drawn.random()):
            if (len(batches[-1]) + 1) * len(row) > STEP_TOKENS:
                batches.append([])
            batches[-1].append(row)
        yield from drawn.sample(batches, len(batches))


@torch.inference_mode()
def answer_bits(model: Any, side: Side, examples: Sequence[Example], *, ends: bool = True) -> tuple[float, int]:
    """What a model needs for the answers, given what comes before.

    Args:
        model: Any causal language model.
        side: Its tokenizer.
        examples: Read each alone.
        ends: Whether an answer's end counts as one of its bytes.

    Returns:
        Bits, and bytes.
    """
    nats, size = 0.0, 0
    rows = [row for row in tokenize_examples(examples, side) if isinstance(row, TokenizedRow)]
    for some in groups(sorted(rows, key=lambda row: len(row.ids)), 16):
        ids = padded([row.ids for row in some])
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        losses = cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        for row, each in zip(some, losses.view(len(some), -1), strict=True):
            for begin, end, content in row.answers:
                nats += float(each[max(begin - 1, 0) : end - 1 - (not ends)].sum())
                size += len(content) + ends
    return nats / math.log(2), size
