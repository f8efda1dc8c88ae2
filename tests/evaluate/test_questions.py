from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hymba_tune.data import Conversation, Message, open_source
from hymba_tune.errors import DataError
from hymba_tune.evaluate.questions import AnsweredQuestion, Extraction, Question, read_questions, score_answers

QUESTION = Question(Conversation((Message("user", "1 + 1?"),)), "#### 2")


@pytest.mark.parametrize(
    ("way", "pattern", "text", "extracted"),
    [
        ("gsm8k", None, "He has 3.\n#### 1,800", "1800"),
        ("gsm8k", None, "#### 3 no, #### $-4.50", "-4.5"),
        ("gsm8k", None, "so it is 12", None),
        ("number", None, "3 cats and 12.0 dogs.", "12"),
        ("number", None, "none", None),
        ("exact", None, "  Two cats.\n\nYes \n", "Two cats.\n\nYes"),
        (None, r"answer is (\w+)", "the answer is A. So the answer is B", "B"),
        (None, r"[A-D]\b", "not A but C", "C"),
        (None, r"x(\d)?", "x", "x"),
    ],
)
def test_extracted_part(way: str | None, pattern: str | None, text: str, extracted: str | None) -> None:
    assert Extraction(way, pattern)(text) == extracted


def test_answers_are_counted() -> None:
    answered = [
        AnsweredQuestion(QUESTION, "#### 2", "2", "2"),
        AnsweredQuestion(QUESTION, "#### 3", "3", "2"),
        AnsweredQuestion(QUESTION, "?", None, "2"),
        AnsweredQuestion(QUESTION, "?", None, None),
    ]
    score = score_answers(answered)
    assert (score.questions, score.correct, score.extracted) == (4, 1, 2)
    assert score.exact_match == 0.25
    assert score.standard_error == pytest.approx(0.25)


def test_questions_without_a_part_to_compare_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"prompt": "1 + 1?", "completion": "two"}\n')
    settings: dict[str, Any] = {"max_rows": None, "mapping": {}}
    with pytest.raises(DataError, match=r"No answer in .*q.jsonl contains a part to compare. The first is 'two'"):
        read_questions([open_source(str(path))], Extraction("gsm8k", None), **settings)
    assert len(read_questions([open_source(str(path))], Extraction("exact", None), **settings)) == 1
    path.write_text(json.dumps({"text": "no question"}) + "\n")
    with pytest.raises(DataError, match="There are no questions in"):
        read_questions([open_source(str(path))], Extraction("exact", None), **settings)
