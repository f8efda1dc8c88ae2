from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from hymba_tune.checkpoint import load_tokenizer
from hymba_tune.config import EvalConfig
from hymba_tune.data import Conversation, Message, RowError, Text
from hymba_tune.data.chat import render, tokenize
from hymba_tune.errors import DataError
from hymba_tune.evaluate.scoring import TextScore, score_rows
from hymba_tune.evaluate.texts import ScoringTexts, spelled_bytes
from tests.runs import SMALL
from tests.tiny import tiny_model

ROWS = [
    {"prompt": "I see two cats. What do I see?", "completion": "You see two cats."},
    {"text": "naïve ☃ 漢字 🙂, and a good deal more of it, so that it does not fit into one row of a few tokens. " * 3},
    {
        "messages": [
            {"role": "user", "content": "One?"},
            {"role": "assistant", "content": "Two."},
            {"role": "user", "content": "Three?"},
            {"role": "assistant", "content": "Four 🙂."},
        ]
    },
]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(torch.float64, **SMALL)


@pytest.fixture(scope="module")
def tokenizer(small_model: Path) -> Any:
    return load_tokenizer(small_model)


@pytest.fixture
def texts(tokenizer: Any, tmp_path: Path) -> Any:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def make(**changes: Any) -> ScoringTexts:
        return ScoringTexts.named(EvalConfig(data=[str(path)], **{"max_length": 40} | changes), tokenizer)

    return make


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_score_is_the_sum_over_all_tokens(texts: Any, model: Any, batch_size: int) -> None:
    nats = 0.0
    tokens = right = 0
    for row in texts().rows():
        logits = model(torch.tensor([row.encoded.input_ids])).logits[0].detach().log_softmax(-1)
        for place, label in enumerate(row.encoded.labels):
            if label >= 0:
                nats -= float(logits[place - 1, label])
                right += int(logits[place - 1].argmax()) == label
                tokens += 1
    score = score_rows(model, texts().rows(), batch_size=batch_size, progress=lambda _: None)
    assert score.nats == pytest.approx(nats, rel=1e-6)
    assert (score.tokens, score.right) == (tokens, right)
    assert score.tokens == texts().count().tokens
    assert score.spelled == texts().count().spelled


def test_bytes_of_answers_are_counted(texts: Any) -> None:
    """White space in front of an answer is part of it, its end token is not."""
    counts = texts(max_rows=1, max_length=2048).count()
    assert counts.spelled == len("You see two cats.")
    assert texts(max_length=2048, learn="last").count().spelled == sum(
        len(text.encode()) for text in ("You see two cats.", ROWS[1]["text"], "Four 🙂.")
    )


def test_a_long_text_is_scored_in_parts_and_no_byte_is_counted_twice(texts: Any) -> None:
    whole = texts(max_length=2048).count()
    parts = texts(max_length=16).count()
    assert parts.parts > whole.parts
    assert parts.spelled < whole.spelled  # nothing predicts the first token of a part
    assert parts.rows == whole.rows == len(ROWS)


@pytest.mark.parametrize("text", ["a☃b", " two  spaces", "漢字\n🙂\t", "éé", "x"])
def test_every_byte_is_counted_once(text: str, tokenizer: Any) -> None:
    rendered = render(Text(text), tokenizer)
    (encoded,) = tokenize([rendered], tokenizer)
    assert sum(spelled_bytes(rendered, encoded, tokenizer)) == len(text.encode())


def test_bytes_are_counted_for_their_tokens(tokenizer: Any) -> None:
    rendered = render(Conversation((Message("user", "Hé"), Message("assistant", "two cats"))), tokenizer)
    (encoded,) = tokenize([rendered], tokenizer)
    sizes = spelled_bytes(rendered, encoded, tokenizer)
    answer = [size for size, label in zip(sizes, encoded.labels, strict=True) if label >= 0]
    assert sum(answer) == len("two cats")
    assert answer[-1] == 0  # the end token


def test_measures_follow_from_the_sums() -> None:
    score = TextScore(nats=8 * math.log(2), tokens=4, spelled=16, right=1)
    assert score.loss == pytest.approx(2 * math.log(2))
    assert score.perplexity == pytest.approx(4)
    assert score.bits_per_byte == pytest.approx(0.5)
    assert score.accuracy == 0.25
    assert math.isnan(TextScore(1.0, 1, 0, 0).bits_per_byte)
    assert TextScore(1e4, 1, 1, 0).perplexity == math.inf


def test_bad_rows_stop_or_are_counted(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    with pytest.raises(RowError, match=r"bad.jsonl, line 2: it has no \"completion\""):
        ScoringTexts.named(EvalConfig(data=[str(path)]), tokenizer).count()
    counts = ScoringTexts.named(EvalConfig(data=[str(path)], on_bad_row="skip"), tokenizer).count()
    assert (counts.rows, counts.bad_rows, counts.parts) == (2, 1, 1)


def test_data_without_tokens_to_score_is_rejected(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": "many words " * 40, "completion": "b"}) + "\n")
    with pytest.raises(DataError, match=r"Nothing to score in .*long.jsonl: 1 rows, 0 of them bad"):
        ScoringTexts.named(EvalConfig(data=[str(path)], max_length=16), tokenizer).count()
