"""The distillation benchmark's teachers: two Llamas that differ only in their tokenizers, trained on the same texts."""

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
"""The pre-tokenization pattern of current byte-level tokenizers: up to three digits are one word."""
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n"
    "{{ message['content'] | trim }}{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LAYERS = {"num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 6}
FULL = {"hidden_size": 384, "intermediate_size": 1024, **LAYERS}
QUICK = {"hidden_size": 48, "intermediate_size": 64, **LAYERS, "num_hidden_layers": 2}
LONGEST = 512
"""Maximum length of a row in tokens; longer rows are skipped."""
STEP_TOKENS = 2048
WARMUP = 30
"""Number of warm-up steps."""

T = TypeVar("T")
console = Console()


def train_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with its own chat template, similar to Llama 3's."""
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
    """The student's tokenizer."""
    return PreTrainedTokenizerFast.from_pretrained(NANO)


def plain_text(example: Example) -> str:
    """An example's text, for training a tokenizer."""
    return example.text if isinstance(example, Text) else "\n".join(m.content for m in example.messages)


def side_of(tokenizer: PreTrainedTokenizerFast) -> Side:
    """A tokenizer in the form that `tokenize_examples` expects."""
    return make_pair(tokenizer, tokenizer).student


@dataclass(frozen=True)
class Stage:
    """A stage of a teacher's training: steps of about `STEP_TOKENS`, with a learning rate that decays to zero."""

    examples: Sequence[Example]
    steps: int
    lr: float


def train(tokenizer: PreTrainedTokenizerFast, stages: Sequence[Stage], body: dict[str, int], folder: Path) -> None:
    """Train a Llama on all tokens of examples, and save it with its tokenizer.

    Args:
        tokenizer: The teacher's tokenizer.
        stages: The stages in order; examples repeat, in another order in every epoch.
        body: Sizes of the model.
        folder: Where to save the model.
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
        console.print(f"{folder.name}: {model.num_parameters():,} parameters, {sum(map(len, rows)):,} tokens per epoch")
        _train_stage(model, rows, stage)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _train_stage(model: PreTrainedModel, rows: Sequence[list[int]], stage: Stage) -> None:
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
    """Groups of ``size`` rows."""
    return (rows[begin : begin + size] for begin in range(0, len(rows), size))


def padded(rows: Sequence[list[int]]) -> Tensor:
    """Rows padded on the right to one length; with causal attention no token sees the padding."""
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows])


def mean_loss(model: PreTrainedModel, rows: Sequence[list[int]]) -> Tensor:
    """Mean cross-entropy of all tokens."""
    ids = padded(rows)
    padding = torch.arange(ids.shape[1]) >= torch.tensor([[len(row)] for row in rows])
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return cross_entropy(logits.float().flatten(0, 1), ids.masked_fill(padding, -100)[:, 1:].flatten())


def _batches(rows: Sequence[list[int]]) -> Iterator[list[list[int]]]:
    """Batches of rows with similar lengths, so that there is little padding."""
    for epoch in range(1_000_000):
        rng = random.Random(epoch)
        batches: list[list[list[int]]] = [[]]
        for row in sorted(rows, key=lambda row: len(row) + 20 * rng.random()):
            if (len(batches[-1]) + 1) * len(row) > STEP_TOKENS:
                batches.append([])
            batches[-1].append(row)
        yield from rng.sample(batches, len(batches))


@torch.inference_mode()
def answer_bits(model: Any, side: Side, examples: Sequence[Example], *, ends: bool = True) -> tuple[float, int]:
    """The information content of the answers, given their context.

    Args:
        model: Any causal language model.
        side: The model's tokenizer.
        examples: The examples; each is a sequence of its own.
        ends: Whether an answer's end token counts, as one byte.

    Returns:
        The number of bits, and of bytes.
    """
    nats, size = 0.0, 0
    rows = [row for row in tokenize_examples(examples, side) if isinstance(row, TokenizedRow)]
    for group in groups(sorted(rows, key=lambda row: len(row.ids)), 16):
        ids = padded([row.ids for row in group])
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        losses = cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        for row, row_losses in zip(group, losses.view(len(group), -1), strict=True):
            for begin, end, content in row.answers:
                nats += float(row_losses[max(begin - 1, 0) : end - 1 - (not ends)].sum())
                size += len(content) + ends
    return nats / math.log(2), size
