"""Two tokenizers on one text: alignment, the pair's tables, and projection of the teacher's probabilities.

The student's tokenizer is SentencePiece-like with 32,000 tokens, trained here on Python's standard library. The
teacher's is byte-level with 128,000 tokens and also trained on PyTorch's source, because the library alone has too few
words. "tokenizing" is the tokenizers' own code; "from text" renders, tokenizes and aligns; "given tokens" aligns rows
that are tokenized already. All of it runs on one core.
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
"""Characters of source code that each tokenizer is trained on: the student's and the teacher's."""
ANSWER = 600
"""Length of an answer in characters."""
BATCH = 200
"""Number of answers aligned in one call."""


def main(arguments: list[str] | None = None) -> None:
    """Measure and report."""
    options = harness.options(__doc__, arguments, repeats=5)
    sizes = QUICK if options.quick else SIZES
    with tempfile.TemporaryDirectory() as folder:
        # Trained in a separate process, so that memory left over from training is not counted for the tables.
        harness.in_child(train, sizes, (300_000, 300_000) if options.quick else TRAINED_ON, folder)
        pair = load(folder)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        rows = report_alignment(pair, options)
        report_tables(folder, options)
        report_projection(pair, rows, options)


def library(size: int) -> Iterator[str]:
    """The first ``size`` characters of Python's library and then PyTorch's, in a fixed order."""
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
    """Load the trained pair."""
    student, teacher = (PreTrainedTokenizerFast.from_pretrained(f"{folder}/{side}") for side in ("student", "teacher"))
    return make_pair(student, teacher)


def report_alignment(pair: TokenizerPair, options: harness.Options) -> list[Alignment]:
    """Report the speed per byte of text, and return the aligned rows."""
    text = "".join(library(1_000_000))
    answers = [text[begin : begin + ANSWER] for begin in range(0, len(text), ANSWER)]
    examples = [Conversation((Message("user", "Go on."), Message("assistant", answer))) for answer in answers]
    examples = examples[:BATCH] if options.quick else examples
    batches = [examples[begin : begin + BATCH] for begin in range(0, len(examples), BATCH)]
    tokens = [(tokenize_examples(batch, pair.student), tokenize_examples(batch, pair.teacher)) for batch in batches]
    texts = [[m.messages[1].content for m in batch] for batch in batches]

    def tokenize() -> None:
        for batch in texts:
            for side in (pair.student, pair.teacher):
                side.tokenizer.backend_tokenizer.encode_batch(batch, add_special_tokens=False)

    ways: dict[str, Callable[[], Any]] = {
        "tokenizing": tokenize,
        "from text": lambda: [row for batch in batches for row in align(batch, pair)],
        "given tokens": lambda: [row for both in tokens for row in align_rows(*both, pair)],
    }
    timings = harness.interleave(ways, options.repeats)
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
    harness.report("alignment", list(rows[0]), rows, notes, options)
    return aligned


def report_tables(folder: str, options: harness.Options) -> None:
    """Report the time, memory and disk space of the tables."""
    facts = harness.in_child(measure_tables, folder)
    harness.report(
        "projection_tables", list(facts), [facts], ["Peak memory, without that of both tokenizers."], options
    )


def measure_tables(folder: str) -> dict[str, harness.Cell]:
    """Measure building and opening the tables; runs in a separate process."""
    pair = load(folder)
    cpu = torch.device("cpu")
    sizes = len(pair.student.spelling), len(pair.teacher.spelling)
    start = time.perf_counter()
    peak = harness.peak_memory(lambda: build_tables(pair), cpu)
    build_seconds = time.perf_counter() - start

    open_tables(pair, Path(folder) / "tables")
    start = time.perf_counter()
    open_tables(pair, Path(folder) / "tables")
    open_seconds = time.perf_counter() - start
    (path,) = (Path(folder) / "tables").iterdir()
    return {
        "student tokens": sizes[0],
        "teacher tokens": sizes[1],
        "build s": build_seconds,
        "peak MB": harness.megabytes(peak),
        "disk MB": path.stat().st_size / 1e6,
        "open s": open_seconds,
    }


def report_projection(pair: TokenizerPair, rows: list[Alignment], options: harness.Options) -> None:
    """Report the time of a token's projection relative to the teacher's softmax."""
    tables = build_tables(pair)
    projection = Projection(
        tables, count_first_tokens(rows), vocabulary=len(pair.student.spelling), device=options.device
    )
    row = max(rows, key=lambda one: len(one.student))
    places = find_places(row, tables).to(options.device)
    logits = torch.randn(len(row.teacher_ids), len(pair.teacher.spelling), device=options.device)
    probs = logits.softmax(-1)
    ways: dict[str, Any] = {"softmax": lambda: logits.softmax(-1), "projection": lambda: projection(probs, places)}
    timings = harness.interleave(ways, options.repeats)
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
    notes = [f"A row of {len(places)} student tokens and {len(logits)} teacher tokens, float32."]
    harness.report("projection", list(cells[0]), cells, notes, options)


if __name__ == "__main__":
    main()
