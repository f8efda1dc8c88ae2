"""Texts that a chat template does not show: their rows are dropped and named, or the system message moves."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from hymba_tune.config import SFTConfig
from hymba_tune.data import Conversation, Message
from hymba_tune.distill.alignment import Alignment, align
from hymba_tune.distill.pair import TokenizerPair, Unaligned, for_teacher, left_out, make_pair
from hymba_tune.distill.rows import AlignedData, alignment, read_rows
from hymba_tune.errors import DataError
from tests.conftest import ROOT
from tests.data.small_tokenizers import CHATML, LLAMA3, MISTRAL, byte_level, turns, without_markers
from tests.distill.ending_teachers import gemma
from tests.distill.inputs import quiet, write
from tests.distill.tokenizers import ALL

CASES = ROOT / "tests/distill/cases"
SYSTEM_IN_LAST_QUESTION = MISTRAL.replace(
    "{% if message.role == 'system' %}", "{% if message.role == 'system' %}"
).replace("'[INST] ' + ns.system", "'[INST] ' + (ns.system if loop.last else '')")
"""As Mistral-Nemo's: the system message is shown where the last message is a question, so never with its answer."""


def with_template(name: str, template: str) -> PreTrainedTokenizerBase:
    tokenizer = copy.deepcopy(ALL[name])
    tokenizer.chat_template = template
    return tokenizer


TEXTS = st.text("ab \n", max_size=4)


@settings(deadline=None, max_examples=100)
@given(texts=st.lists(TEXTS, min_size=1, max_size=6), data=st.data())
def test_what_is_missing_is_found_wherever_its_text_occurs(texts: list[str], data: st.DataObject) -> None:
    """Even where another message has the same text, or begins with it; the marks hold no letter of it."""
    example = Conversation(tuple(Message("user", text) for text in texts))
    assert left_out(example, "".join(f"<{text.strip()}>" for text in texts)) is None
    assert left_out(example, "".join(f"<{text.strip()}>" for text in reversed(texts))) is None
    missing = data.draw(st.integers(0, len(texts) - 1))
    text = "".join(f"<{text.strip()}>" for text in texts[:missing] + texts[missing + 1 :])
    found = left_out(example, text)
    if texts[missing].strip():
        assert found is not None
        assert texts[int(found.split()[1]) - 1].strip() == texts[missing].strip()
    else:
        assert found is None


def test_contexts_and_tools_are_texts_too() -> None:
    example = Conversation(turns("a", "b"), ({"type": "function", "function": {"name": "add"}},), ("a passage",))
    assert left_out(example, "a passage add a b") is None
    assert left_out(example, "add a b") == "context 1: 'a passage'"
    assert left_out(example, "a passage a b") == "tool 1: 'add'"


def test_text_within_json_is_there() -> None:
    """Llama's template writes the results of tools so."""
    example = Conversation((Message("user", "a"), Message("tool", '{"x": "é\n"}')))
    assert left_out(example, r'a "{\"x\": \"é\n\"}"') is None
    assert left_out(example, "a") == "message 2 (tool): " + r"""'{"x": "\xe9\n"}'"""


def pair(student: str = "hymba", template: str = SYSTEM_IN_LAST_QUESTION, **options: object) -> TokenizerPair:
    return make_pair(ALL[student], with_template("mistral", template), **options)  # type: ignore[arg-type]


def test_row_whose_system_message_the_teacher_does_not_read_is_dropped_and_named() -> None:
    """Its answers are found all the same, so that nothing else would show it."""
    example = Conversation(turns("a", "b", "c", "d", system="Be brief, whatever they ask you, and kind to them."))
    (found,) = align([example], pair())
    assert isinstance(found, Unaligned)
    assert (found.reason, found.bytes) == ("text left out", 2)
    assert found.what == (
        "the teacher's chat template leaves out message 1 (system): 'Be brief, whatever they ask you, and kin'…"
    )
    (kept,) = align([example], pair(teacher_system_as="user"))
    assert isinstance(kept, Alignment)
    read = ALL["mistral"].decode(kept.teacher_ids)
    assert "[INST] Be brief, whatever they ask you, and kind to them.\n\na [/INST]" in read


def test_students_template_is_checked_too(tmp_path: Path) -> None:
    student = with_template(
        "hymba", "{% for m in messages if m.role != 'system' %}{{ '<extra_id_1>' + m.content + eos_token }}{% endfor %}"
    )
    rows = [{"system": "Be brief.", "prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b"}]
    data = read(write(tmp_path / "a.jsonl", rows), make_pair(student, ALL["llama3"]))
    assert data.alignment.dropped == {"text left out": 1}
    (first,) = data.alignment.first.values()
    assert first.endswith(
        "a.jsonl, line 1: the student's chat template leaves out message 1 (system): 'Be brief.' (1 bytes of answers)"
    )
    assert data.report.dropped_file is not None
    assert "not aligned (text left out): the student's chat template leaves out" in data.report.dropped_file.read_text()


def read(data: str, pair: TokenizerPair, **changes: object) -> AlignedData:
    options = SFTConfig.model_validate({"data": [data], "eval_split": 0, "cache": False, **changes})
    return read_rows(options, pair, context=None, seed=0, prompts=0, working=quiet)


def test_system_message_that_a_template_refuses_goes_into_the_first_question() -> None:
    data = str(CASES / "system_messages.jsonl")
    teacher = gemma()
    teacher.chat_template = (CASES / "gemma.jinja").read_text()
    refused = (
        r"line 1: not aligned \(template\): for the teacher, .*System role not supported(.|\n)*--teacher-system-as user"
    )
    with pytest.raises(DataError, match=refused):
        read(data, make_pair(ALL["hymba"], teacher))
    found = read(data, make_pair(ALL["hymba"], teacher, teacher_system_as="user"))
    assert len(found.rows) == 2
    for row in map(alignment, found.rows):
        read_text = teacher.decode(row.teacher_ids)
        assert "<start_of_turn>user\nBe brief.\n\n" in read_text
        assert "Be brief." in ALL["hymba"].decode(row.student_ids)


@pytest.mark.parametrize(
    ("example", "messages"),
    [
        (Conversation(turns("a", "b", system="S")), [("user", "S\n\na"), ("assistant", "b")]),
        (Conversation(turns("a", "b")), [("user", "T\n\na"), ("assistant", "b")]),
        (Conversation(turns("", "b", system=" S ")), [("user", "S"), ("assistant", "b")]),
        (
            Conversation((Message("system", "S"), Message("tool", "x"), Message("assistant", "b"))),
            [("user", "S"), ("tool", "x"), ("assistant", "b")],
        ),
    ],
)
def test_system_messages_as_the_user(example: Conversation, messages: list[tuple[str, str]]) -> None:
    both = make_pair(ALL["hymba"], ALL["llama3"], teacher_system="T", teacher_system_as="user")
    shown = for_teacher(example, both)
    assert isinstance(shown, Conversation)
    assert [(message.role, message.content) for message in shown.messages] == messages


def test_templates_that_show_everything_drop_nothing() -> None:
    example = Conversation(turns("a", "b", "the same", "c", "the same", "d", system="the same"))
    for template in (CHATML, without_markers(LLAMA3)):
        teacher = byte_level(
            template,
            ["<|im_start|>", "<|im_end|>", "<|eot_id|>"],
            "<|im_end|>" if "im_end" in template else "<|eot_id|>",
            "<|im_start|>",
        )
        (row,) = align([example], make_pair(ALL["hymba"], teacher))
        assert isinstance(row, Alignment)
