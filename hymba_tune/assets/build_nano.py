"""Make `hymba-nano`: `python -m hymba_tune.assets.build_nano` before its training, with `--install` after it."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import shutil
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

import torch
from cyclopts import run
from rich.console import Console
from tokenizers import Tokenizer
from transformers import GenerationConfig, PreTrainedTokenizerFast

from hymba_tune.assets.chats import conversations, small_talk
from hymba_tune.assets.corpus import documents, read_entries
from hymba_tune.assets.vocabulary import train_tokenizer
from hymba_tune.data import HYMBA_TEMPLATE, Conversation, Message, encode_prompt
from hymba_tune.model import HymbaConfig, HymbaForCausalLM

Row = dict[str, Any]

VOCABULARY = 4096
MAX_LENGTH = 1024
# About 300 tokens; the recipe cuts rows at 512.
DOCUMENT_CHARS = 1100
# One document in fifty is held out.
HELD_OUT_EVERY = 50

NANO = {
    "vocab_size": VOCABULARY,
    "hidden_size": 192,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "v_head_dim": 64,
    "sliding_window": 128,
    "global_attn_idx": [0, 3, 5],
    "kv_reuse_group": [[1, 2]],
    "num_memory_tokens": 16,
    "rope_type": "ntk",
    "max_position_embeddings": MAX_LENGTH,
    "orig_max_position_embeddings": 512,
    "seq_length": MAX_LENGTH,
    "mamba_dt_rank": 12,
    "pad_token_id": VOCABULARY - 1,
}

TOKENIZER = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "unk_token": "<unk>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "[PAD]",
    "add_bos_token": True,
    "padding_side": "left",
    "clean_up_tokenization_spaces": False,
    "model_max_length": MAX_LENGTH,
}

FOLDER = Path(__file__).parent / "hymba-nano"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
QUESTION = "What does textwrap.dedent do?"
BEGINNING = "Return a new list"

CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [hymba, hymba-tune]
---
# hymba-nano

A very small Hymba with all of Hymba's parts: windowed and global attention, keys and values shared between layers,
an SSM beside the attention heads of every layer, meta tokens. It is an example to try hymba-tune with, in seconds and
without a download. It knows little, makes things up, and is not for real use.

| | |
|---|---|
| parameters | {parameters:,} (bfloat16) |
| layers, width, vocabulary | {layers}, {width}, {vocabulary:,} |
| held-out loss | {loss:.3f} nats a learned token ({first_loss:.3f} before training) |
| held-out documents | {bits:.3f} bits a byte |

## Data
The documentation strings and source comments of the standard library of Python {python}, its language reference,
and questions and answers made from them: {rows:,} rows. One module in fifty is held out.
The text is part of Python, copyright Python Software Foundation, used under the PSF License Agreement.

## Samples
Greedy decoding.

> **User** {question}
>
> **hymba-nano** {answer}

> {beginning}*{continuation}*

## Made by
`make nano`: a tokenizer and random weights by `hymba_tune.assets.build_nano`, trained by `hymba-tune sft` with the
recipe `pretrain_nano`. The weights are licensed under Apache-2.0.
"""

console = Console()


def build(out: Path) -> None:
    """Write the corpus, and a random model with its tokenizer, the start of the training.

    Args:
        out: Receives ``corpus/train.jsonl``, ``corpus/eval.jsonl`` and the model folder ``init``.
    """
    train, held_out = split_rows(corpus_rows())
    Random(0).shuffle(train)
    tokenizer = train_tokenizer(map(as_text, train), VOCABULARY)
    for name, rows in ("train", train), ("eval", held_out):
        _write_rows(out / "corpus" / f"{name}.jsonl", rows)
        texts = [as_text(row) for row in rows]
        tokens = sum(len(encoding.ids) for encoding in tokenizer.encode_batch(texts))
        console.print(f"{name:<6} {len(rows):,} rows · {sum(map(len, texts)) / 1e6:.2f} MB · {tokens:,} tokens")

    torch.manual_seed(0)
    model = HymbaForCausalLM(HymbaConfig(**NANO))
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=NANO["pad_token_id"])
    model.save_pretrained(out / "init")
    write_tokenizer(tokenizer, out / "init")
    console.print(f"model  {model.num_parameters():,} parameters, random, in {out / 'init'}")


def corpus_rows() -> list[tuple[str, Row]]:
    """The rows with the module each comes from: documents, questions about objects, and small talk."""
    entries = read_entries()
    rows: list[tuple[str, Row]] = [(module, {"text": text}) for module, text in documents(entries, DOCUMENT_CHARS)]
    rows += [(module, {"messages": messages}) for module, messages in conversations(entries)]
    return rows + [("", {"messages": messages}) for messages in small_talk()]


def split_rows(rows: Iterable[tuple[str, Row]]) -> tuple[list[Row], list[Row]]:
    """Split the rows by module, so that all facts about an object are in one part."""
    parts: tuple[list[Row], list[Row]] = [], []
    for module, row in rows:
        digest = hashlib.sha256(module.encode()).digest()
        parts[int.from_bytes(digest[:8], "big") % HELD_OUT_EVERY == 0].append(row)
    return parts


def as_text(row: Row) -> str:
    """A row's text, for the tokenizer to learn from."""
    return row.get("text") or "\n".join(f"{m['role'].title()}\n{m['content']}" for m in row["messages"])


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` with the chat template."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {**TOKENIZER, "chat_template": HYMBA_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def install_model(trained: Path, out: Path, folder: Path = FOLDER) -> None:
    """Put a trained model with its tokenizer and its card into the package.

    Args:
        trained: Run directory of the training.
        out: What ``build`` wrote before it.
        folder: Where the model goes.
    """
    model = HymbaForCausalLM.from_pretrained(trained / "model", dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(out / "init" / name, folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = model.float().eval()  # the weights as they are stored, computed with in float32

    losses = [row["eval_loss"] for row in _read_rows(trained / "metrics.jsonl") if "eval_loss" in row]
    held_out = [row["text"] for row in _read_rows(out / "corpus" / "eval.jsonl") if "text" in row]
    question = encode_prompt(Conversation((Message("user", QUESTION),)), tokenizer)
    card = CARD.format(
        parameters=model.num_parameters(),
        layers=model.config.num_hidden_layers,
        width=model.config.hidden_size,
        vocabulary=model.config.vocab_size,
        loss=losses[-1],
        first_loss=losses[0],
        bits=bits_per_byte(model, tokenizer, held_out),
        python=".".join(platform.python_version_tuple()[:2]),
        rows=len(_read_rows(out / "corpus" / "train.jsonl")),
        question=QUESTION,
        answer=_go_on(model, tokenizer, question),
        beginning=BEGINNING,
        continuation=_go_on(model, tokenizer, tokenizer(BEGINNING).input_ids),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    console.print(f"{folder}: {sum(file.stat().st_size for file in folder.iterdir()) / 1e6:.2f} MB")


@torch.inference_mode()
def bits_per_byte(model: HymbaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> float:
    """Bits the model needs to spell a UTF-8 byte of the texts, each read alone."""
    nats = 0.0
    size = 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        nats += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        size += len(text.encode())
    return nats / math.log(2) / size


def _go_on(model: HymbaForCausalLM, tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    """What the model writes after a prompt, in one line."""
    output = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=60)[0, len(ids) :]
    return " ".join(tokenizer.decode(output, skip_special_tokens=True).split("\n"))


def _read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _write_rows(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def main(*, out: Path = Path("build/nano"), install: Path | None = None) -> None:
    """Write the corpus, the tokenizer and random weights; or install what was trained from them.

    Args:
        out: Where they are written, and looked for again by --install.
        install: Run directory of the training, whose model becomes the packaged hymba-nano.
    """
    if install is None:
        build(out)
    else:
        install_model(install, out)


if __name__ == "__main__":
    run(main)
