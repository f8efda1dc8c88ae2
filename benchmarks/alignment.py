"""Two tokenizers on one text: aligning it, the pair's tables, and projecting the teacher's probabilities.

A SentencePiece-like student of 32,000 tokens, trained here on Python's own library, and a byte-level teacher of
128,000, which takes PyTorch's source as well: the library alone has too few words. "tokenizing" is both tokenizers' own
code, "from text" renders, tokenizes and aligns, "given tokens" aligns what is tokenized already; all on one core.
"""

from __future__ import annotations

import os
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hymba_tune.assets.vocabulary import train_tokenizer
from hymba_tune.data import Conversation, Message
from hymba_tune.distill.alignment import Alignment, align, align_rows
from hymba_tune.distill.pair import TokenizerPair, make_pair, tokenize_examples
from hymba_tune.distill.projection import Projection, find_places
from hymba_tune.distill.tables import build_tables, count_first_tokens, open_tables

SIZES = (32_000, 128_000)
QUICK = (600, 700)
TRAINED_ON = (12_000_000, 77_000_000)
"""Characters of source, for each side."""
ANSWER = 600
"""Characters of an answer."""
BATCH = 200
"""Answers aligned at once."""


def main(arguments: list[str] | None = None) -> None:
    """Measure and report."""
    given = harness.options(__doc__, arguments, repeats=5)
    sizes = QUICK if given.quick else SIZES
    with tempfile.TemporaryDirectory() as folder:
        # Trained in a process of its own: what training leaves behind is not the tables'.
        harness.in_child(train, sizes, (300_000, 300_000) if given.quick else TRAINED_ON, folder)
        pair = load(folder)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        rows = report_alignment(pair, given)
        report_tables(folder, given)
        report_projection(pair, rows, given)


def library(size: int) -> Iterator[str]:
    """Python's library and then PyTorch's, so many characters of them, in a fixed order."""
    for folder in (Path(sysconfig.get_path("stdlib")), Path(torch.__file__).parent):
        for path in sorted(folder.rglob("*.py")):
            if "site-packages" not in path.relative_to(folder).parts:
                text = path.read_text(encoding="utf-8", errors="ignore")
                size -= len(text)
                yield text
                if size < 0:
                    return


def train(sizes: tuple[int, int], characters: tuple[int, int], folder: str) -> None:
    """Train both tokenizers and save them."""
    student = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(library(characters[0]), sizes[0]),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    student.save_pretrained(f"{folder}/student")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=sizes[1], initial_alphabet=alphabet, special_tokens=["<end>"])
    tokenizer.train_from_iterator(library(characters[1]), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(f"{folder}/teacher")


def load(folder: str) -> TokenizerPair:
    """The trained pair."""
    student, teacher = (PreTrainedTokenizerFast.from_pretrained(f"{folder}/{side}") for side in ("student", "teacher"))
    return make_pair(student, teacher)


def report_alignment(pair: TokenizerPair, given: harness.Options) -> list[Alignment]:
    """Speed in text, and the aligned rows."""
    text = "".join(library(1_000_000))
    answers = [text[begin : begin + ANSWER] for begin in range(0, len(text), ANSWER)]
    examples = [Conversation((Message("user", "Go on."), Message("assistant", answer))) for answer in answers]
    examples = examples[:BATCH] if given.quick else examples
    batches = [examples[begin : begin + BATCH] for begin in range(0, len(examples), BATCH)]
    tokens = [(tokenize_examples(batch, pair.student), tokenize_examples(batch, pair.teacher)) for batch in batches]
    texts = [[m.messages[1].content for m in batch] for batch in batches]

    def tokenized() -> None:
        for batch in texts:
            for side in (pair.student, pair.teacher):
                side.tokenizer.backend_tokenizer.encode_batch(batch, add_special_tokens=False)

    ways: dict[str, Callable[[], Any]] = {
        "tokenizing": tokenized,
        "from text": lambda: [row for batch in batches for row in align(batch, pair)],
        "given tokens": lambda: [row for both in tokens for row in align_rows(*both, pair)],
    }
    timings = harness.interleave(ways, given.repeats)
    size = sum(len(text.encode()) for batch in texts for text in batch) / 1e6
    aligned = [row for row in ways["given tokens"]() if isinstance(row, Alignment)]
    rows = [
        {
            "what": name,
            "MB/s": size / timing.median,
            "x tokenizing": timing.over(timings["tokenizing"]),
            **timing.cells(),
        }
        for name, timing in timings.items()
    ]
    notes = [
        f"{len(examples):,} answers of {ANSWER} characters, {size:.2f} MB, {BATCH} at a time; {len(aligned):,} aligned."
    ]
    harness.report("alignment", list(rows[0]), rows, notes, given)
    return aligned


def report_tables(folder: str, given: harness.Options) -> None:
    """Time, memory and disk of the tables."""
    facts = harness.in_child(measure_tables, folder)
    harness.report("projection_tables", list(facts), [facts], ["Peak memory beyond both tokenizers'."], given)


def measure_tables(folder: str) -> dict[str, harness.Cell]:
    """In a process of its own."""
    pair, cpu = load(folder), torch.device("cpu")
    sizes = len(pair.student.spelling), len(pair.teacher.spelling)
    start = time.perf_counter()
    peak = harness.peak_memory(lambda: build_tables(pair), cpu)
    built = time.perf_counter() - start
    open_tables(pair, Path(folder) / "tables")
    start = time.perf_counter()
    open_tables(pair, Path(folder) / "tables")
    opened = time.perf_counter() - start
    (path,) = (Path(folder) / "tables").iterdir()
    return {
        "student tokens": sizes[0],
        "teacher tokens": sizes[1],
        "build s": built,
        "peak MB": harness.megabytes(peak),
        "disk MB": path.stat().st_size / 1e6,
        "open s": opened,
    }


def report_projection(pair: TokenizerPair, rows: list[Alignment], given: harness.Options) -> None:
    """Time a token beside the teacher's softmax."""
    tables = build_tables(pair)
    projection = Projection(
        tables, count_first_tokens(rows), vocabulary=len(pair.student.spelling), device=given.device
    )
    row = max(rows, key=lambda one: len(one.student))
    places = find_places(row, tables).to(given.device)
    logits = torch.randn(len(row.teacher_ids), len(pair.teacher.spelling), device=given.device)
    probs = logits.softmax(-1)
    ways: dict[str, Any] = {"softmax": lambda: logits.softmax(-1), "projection": lambda: projection(probs, places)}
    timings = harness.interleave(ways, given.repeats)
    count = {"softmax": len(logits), "projection": len(places)}
    cells = [
        {
            "what": name,
            "us a token": timing.median * 1e6 / count[name],
            "x softmax": timing.over(timings["softmax"]) * count["softmax"] / count[name],
            **timing.cells(),
        }
        for name, timing in timings.items()
    ]
    notes = [f"A row of {len(places)} of the student's tokens and {len(logits)} of the teacher's, float32."]
    harness.report("projection", list(cells[0]), cells, notes, given)


if __name__ == "__main__":
    main()
