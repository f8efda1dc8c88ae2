"""Both sides' tokens on one answer: against a twin that walks byte by byte."""

from __future__ import annotations

import json
from functools import cache
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hymba_tune.checkpoint import load_tokenizer
from hymba_tune.config import Learn
from hymba_tune.data import Conversation, Message, Text
from hymba_tune.data.formats import Example
from hymba_tune.distill.alignment import Alignment, Unaligned, align, align_rows
from hymba_tune.distill.alignment_report import AlignmentReport, matched_vocabulary
from hymba_tune.distill.pair import TokenizedRow, TokenizerPair, make_pair, tokenize_examples
from hymba_tune.distill.spelling import END
from hymba_tune.errors import ConfigError
from tests.data.small_tokenizers import CHATML, LLAMA3_TOKENS, byte_level, turns
from tests.distill.texts import TEXTS
from tests.distill.tokenizers import ALL
from tests.reference import naive_alignment as naive

PAIRS = [("hymba", "llama3"), ("hymba", "chatml"), ("hymba", "mistral"), ("hymba", "unigram"), ("chatml", "hymba")]


@cache
def pair(student: str, teacher: str) -> TokenizerPair:
    return make_pair(ALL[student], ALL[teacher])


def talk(*contents: str, system: str | None = None) -> Conversation:
    return Conversation(turns(*contents, system=system))


def rows(example: Example, both: TokenizerPair) -> tuple[TokenizedRow, TokenizedRow]:
    (student,), (teacher,) = tokenize_examples([example], both.student), tokenize_examples([example], both.teacher)
    assert isinstance(student, TokenizedRow)
    assert isinstance(teacher, TokenizedRow)
    return student, teacher


def aligned(example: Example, both: TokenizerPair) -> Alignment:
    (row,) = align([example], both)
    assert isinstance(row, Alignment), row
    return row


def check(example: Example, both: TokenizerPair) -> None:
    """The row as the twin has it; its spans spell the answers on both sides."""
    row, (student, teacher) = aligned(example, both), rows(example, both)
    assert (row.student_ids, row.teacher_ids) == (student.ids, teacher.ids)
    positions, spans = [], []
    for ours, theirs in zip(student.answers, teacher.answers, strict=True):
        pieces = [
            [side.spelling.tokens[token] for token in ids[answer.begin : answer.end]]
            for side, ids, answer in ((both.student, student.ids, ours), (both.teacher, teacher.ids, theirs))
        ]
        assert [side[-1] for side in pieces] == [END, END]
        for found in naive.positions(*pieces, ours.content):
            positions.append(found._replace(student=found.student + ours.begin, teacher=found.teacher + theirs.begin))
        for a, b, c, d in naive.spans(*pieces, ours.content):
            spans.append((a + ours.begin, b + ours.begin, c + theirs.begin, d + theirs.begin))
    positions = [found for found in positions if found.student and found.teacher]
    assert list(zip(row.student, row.teacher, row.spelled, row.first, row.crossing, strict=True)) == positions
    assert list(map(tuple, row.spans.tolist())) == [span for span in spans if span[0] and span[2]]


@pytest.mark.parametrize("names", PAIRS, ids="-".join)
@settings(deadline=None, max_examples=50)
@given(texts=st.lists(TEXTS, min_size=1, max_size=3))
def test_conversation_aligns_as_the_twin(names: tuple[str, str], texts: list[str]) -> None:
    example = talk(*chain.from_iterable(("What?", text) for text in texts))
    check(example, pair(*names))
    answers = [answer.content.decode() for answer in rows(example, pair(*names))[0].answers]
    assert answers == [text.strip() for text in texts]


@pytest.mark.parametrize("names", PAIRS, ids="-".join)
@settings(deadline=None, max_examples=50)
@given(text=TEXTS)
def test_plain_text_aligns_as_the_twin(names: tuple[str, str], text: str) -> None:
    check(Text(text), pair(*names))
    assert rows(Text(text), pair(*names))[1].answers[0].content.decode() == text


@settings(deadline=None, max_examples=50)
@given(text=TEXTS)
def test_spans_spell_the_whole_answer_on_both_sides(text: str) -> None:
    both = pair("hymba", "llama3")
    row = aligned(talk("What?", text), both)
    for side, ids, (begin, end) in (
        (both.student, row.student_ids, row.spans.T[:2]),
        (both.teacher, row.teacher_ids, row.spans.T[2:]),
    ):
        spelled = [side.spelling.spell(ids[a:b]) for a, b in zip(begin, end, strict=True)]
        assert b"".join(spelled) == text.strip().encode() + END


@settings(deadline=None, max_examples=50)
@given(batch=st.lists(TEXTS, max_size=5))
def test_batch_aligns_as_its_rows_alone(batch: list[str]) -> None:
    both = pair("hymba", "llama3")
    examples = [talk("What?", text) for text in batch] + [talk("What?", "▁"), Text("x")]
    for row, example in zip(align(examples, both), examples, strict=True):
        (alone,) = align([example], both)
        assert repr(row) == repr(alone)


def test_same_tokenizer_meets_at_every_token() -> None:
    row = aligned(talk("What?", "naïve 42  🙂"), pair("hymba", "hymba"))
    assert row.student.tolist() == row.teacher.tolist()
    assert not row.spelled.any()
    assert not row.crossing.any()
    assert row.spans[:, 0].tolist() == row.student.tolist()


def test_space_that_a_template_writes_belongs_to_no_answer() -> None:
    """The teacher's first token is `` The``, the student's ``The``."""
    row = aligned(talk("What?", "The answer"), pair("chatml", "mistral"))
    assert row.spelled[0] == 1
    assert row.first[0]


def test_last_answer_alone() -> None:
    both, example = pair("hymba", "llama3"), talk("a", "b", "c", "d")
    (last,), (every,) = align([example], both, learn=Learn.last), align([example], both)
    assert isinstance(last, Alignment)
    assert isinstance(every, Alignment)
    count = len(last.student)
    assert 0 < count < len(every.student)
    assert last.student_ids == every.student_ids
    assert last.student.tolist() == every.student[-count:].tolist()


def test_sides_that_differ_are_dropped_and_counted() -> None:
    both = pair("hymba", "llama3")
    found = align(
        [talk("What?", "a ▁ b"), talk("What?", "fine"), talk("What?", "half \ud83d"), talk("a", "b", "c")], both
    )
    assert isinstance(found[0], Unaligned)
    assert "the tokens of the student's tokenizer do not spell answer 1: at byte 3 of 7, " in found[0].what
    assert isinstance(found[2], Unaligned)
    assert "'\\ud83d' at character" in found[2].what
    report = AlignmentReport()
    report.add(found, both)
    assert report.rows == 4
    assert report.dropped == {"bytes differ": 1, "half a character": 1}


def test_template_that_refuses_is_a_reason() -> None:
    tool = Conversation((Message("user", "a"), Message("tool", "b"), Message("assistant", "c")))
    (found,) = align([tool], pair("hymba", "mistral"))
    assert isinstance(found, Unaligned)
    assert found.reason == "template"


def test_answers_written_differently_are_dropped() -> None:
    both = pair("hymba", "llama3")
    (student,), (teacher,) = (
        tokenize_examples([talk("What?", "yes")], both.student),
        tokenize_examples([talk("What?", "no")], both.teacher),
    )
    (found,) = align_rows([student], [teacher], both)
    assert isinstance(found, Unaligned)
    assert found.what.endswith(
        "writes answer 1 in another way than the student's: at byte 1 of 3, 'no' instead of 'yes'"
    )


def test_teacher_that_spells_something_else_is_dropped() -> None:
    both = pair("hymba", "llama3")
    (student,), (teacher,) = (
        tokenize_examples([talk("What?", "yes")], both.student),
        tokenize_examples([talk("What?", "yes")], both.teacher),
    )
    assert isinstance(teacher, TokenizedRow)
    ids = teacher.ids[: teacher.answers[0].begin] + teacher.ids[:2] + teacher.ids[teacher.answers[0].begin + 2 :]
    (found,) = align_rows([student], [TokenizedRow(ids, teacher.answers)], both)
    assert isinstance(found, Unaligned)
    assert "the tokens of the teacher's tokenizer do not spell answer 1: at byte " in found.what


def test_answers_side_by_side_are_dropped() -> None:
    """Nothing but their text would say where one ends and the next begins."""
    bare = "{% for message in messages %}{{ message.content | trim + eos_token }}{% endfor %}"
    both = make_pair(byte_level(bare, LLAMA3_TOKENS, "<|eot_id|>"), ALL["llama3"])
    (found,) = align([Conversation((Message("user", "a"), Message("assistant", "b"), Message("assistant", "c")))], both)
    assert isinstance(found, Unaligned)
    assert "the student's chat template writes two answers with nothing between" in found.what


def test_teacher_sees_its_own_date_and_system_message() -> None:
    template = (
        "{%- if not date is defined %}{% set date = 'today' %}{% endif %}\n  {% if true %}{{ date }}{% endif %}\n"
    )
    teacher = byte_level(template + CHATML, ["<|im_start|>", "<|im_end|>"], "<|im_end|>")
    example, answered = talk("What?", "yes"), talk("What?", "yes", system="Mine.")

    def shown(one: Conversation, **settings: object) -> str:
        both = make_pair(ALL["hymba"], teacher, **settings)  # type: ignore[arg-type]
        return str(both.teacher.tokenizer.decode(aligned(one, both).teacher_ids))

    plain = shown(example)
    assert plain.startswith("today")
    assert shown(example, teacher_template={"date": '26 "Jul"'}) == plain.replace("today", '26 "Jul"')
    assert "system" not in plain
    assert "system\nBe kind.<|im_end|>" in shown(example, teacher_system="Be kind.")
    assert "system\nMine.<|im_end|>" in shown(answered, teacher_system="Be kind.")
    assert "Be kind." not in shown(answered, teacher_system="Be kind.")


def test_ends_are_mapped_to_each_other() -> None:
    """A base model's end-of-sequence token is another than the one that its template writes."""
    base = byte_level(CHATML, ["<|im_start|>", "<|im_end|>", "<|endoftext|>"], "<|endoftext|>")
    both = make_pair(ALL["hymba"], base, teacher_end="<|im_end|>")
    row = aligned(talk("What?", "yes"), both)
    assert both.teacher.tokenizer.decode(row.teacher_ids).endswith("assistant\nyes<|im_end|>\n")
    last = row.teacher_ids[row.teacher[-1]], row.student_ids[row.student[-1]]
    assert last == (base.convert_tokens_to_ids("<|im_end|>"), ALL["hymba"].eos_token_id)
    assert base.eos_token == "<|endoftext|>"


def test_end_must_be_a_token() -> None:
    with pytest.raises(ConfigError, match=r"The teacher's tokenizer has no token '<end>'"):
        make_pair(ALL["hymba"], ALL["llama3"], teacher_end="<end>")


def test_template_values_need_names() -> None:
    with pytest.raises(ConfigError, match="'a b' cannot be the name of a value"):
        make_pair(ALL["hymba"], ALL["llama3"], teacher_template={"a b": 1})


def test_gsm8k_between_hymba_and_gpt2(shared: Path) -> None:
    reference = shared / "reference"
    both = make_pair(load_tokenizer(reference / "hymba-1.5b-base"), load_tokenizer(reference / "gpt2-tokenizer"))
    lines = (shared / "data/gsm8k/train.jsonl").read_text().splitlines()[:300]
    examples = [talk(row["question"], row["answer"]) for row in map(json.loads, lines)]
    report = AlignmentReport()
    report.add(align(examples, both), both)
    assert not report.dropped
    assert report.bytes == sum(len(example.messages[1].content.strip().encode()) for example in examples)
    total = report.positions.total()
    shares = {kind: round(100 * count / total, 1) for kind, count in report.positions.items()}
    assert round(100 * matched_vocabulary(both), 1) == 57.2
    assert report.matched / total > 0.99
    assert 70 < shares["shared"] < 76
    assert 24 < shares["inside"] < 29
    assert shares["crossing"] < 1
