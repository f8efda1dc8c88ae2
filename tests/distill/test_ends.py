"""The token that ends an answer is the one that the teacher's template writes, and the student learns it as its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from hymba_tune.config import DistillConfig
from hymba_tune.data import Conversation, Text
from hymba_tune.distill.alignment import Alignment, align
from hymba_tune.distill.alignment_report import AlignmentReport
from hymba_tune.distill.capture import pair_of
from hymba_tune.distill.pair import TokenizerPair, make_pair
from hymba_tune.distill.preflight import Preflight
from hymba_tune.distill.spelling import END
from hymba_tune.distill.tables import count_first_tokens
from hymba_tune.distill.target_maker import CaptureStats, TargetBatch, TargetMaker
from hymba_tune.distill.teacher import ModelTeacher, find_teacher
from hymba_tune.errors import ConfigError, TrainingError
from tests.data.small_tokenizers import turns
from tests.distill.ending_teachers import ENDS, NEXT_TURN, NOWHERE, TWO_ENDS, Knowing, qwen_base
from tests.distill.teachers import random_model, tokenizer_size
from tests.distill.tokenizers import ALL

SAID = ("What is the answer?", "The answer is 42.", "And then?", "That is all")
TALK = Conversation(turns(*SAID))
TEACHERS = pytest.mark.parametrize("name", ENDS)


def taught(
    pair: TokenizerPair, example: Conversation | Text, teacher: Any, folder: Path
) -> tuple[Alignment, TargetBatch]:
    (row,) = align([example], pair)
    assert isinstance(row, Alignment), row
    maker = TargetMaker.of(
        teacher,
        pair,
        count_first_tokens([row]),
        vocabulary=len(pair.student.spelling),
        top_k=8,
        temperature=1.0,
        device=torch.device("cpu"),
        tables_dir=folder,
    )
    ((_, found),) = maker([row])
    return row, found


def knowing(tokenizer: PreTrainedTokenizerBase) -> Knowing:
    messages = [{"role": message.role, "content": message.content} for message in TALK.messages]
    return Knowing(tokenizer, messages)


def targets_of_end(pair: TokenizerPair, row: Alignment, found: TargetBatch) -> list[float]:
    """What the student is to give its end token where an answer ends, if it has a target there."""
    at = found.targets.at.tolist()
    places = [index for index, place in enumerate(at) if row.student_ids[place] == pair.student.end]
    top = found.targets.top
    return [float(top.log_probs[place][top.student_tokens[place] == pair.student.end].exp().sum()) for place in places]


@TEACHERS
def test_row_ends_with_the_templates_own_token_once(name: str) -> None:
    tokenizer, end = ENDS[name]
    pair = make_pair(ALL["hymba"], tokenizer)
    assert pair.teacher.end == tokenizer.convert_tokens_to_ids(end)
    (row,) = align([TALK], pair)
    assert isinstance(row, Alignment)
    written = tokenizer.apply_chat_template(
        [{"role": message.role, "content": message.content} for message in TALK.messages], tokenize=False
    )
    assert row.teacher_ids == tokenizer(written, add_special_tokens=False)["input_ids"][: len(row.teacher_ids)]
    assert row.student_ids[row.student[-1]] == pair.student.end
    assert row.teacher_ids[row.teacher[-1]] == pair.teacher.end


@TEACHERS
def test_targets_of_end_tokens_are_end_tokens(name: str, tmp_path: Path) -> None:
    tokenizer, end = ENDS[name]
    pair = make_pair(ALL["hymba"], tokenizer)
    row, found = taught(pair, TALK, knowing(tokenizer), tmp_path)
    assert targets_of_end(pair, row, found) == pytest.approx([0.99, 0.99], abs=0.02)
    assert (found.stats.ends, found.stats.mean_end) == (2, pytest.approx(0.99))
    line = Preflight(AlignmentReport(), 1.0, found.stats, 1, 1.0, 1.0, end).lines()["p(end)"]
    assert line == f"after an answer, the teacher gives its end token {end} p = 0.990 on average"


def test_end_that_is_not_the_teachers_is_seen(tmp_path: Path) -> None:
    """The row then has both tokens, and the teacher expects the other one."""
    tokenizer, _ = ENDS["gemma"]
    pair = make_pair(ALL["hymba"], tokenizer, teacher_end="<eos>")
    row, found = taught(pair, TALK, knowing(tokenizer), tmp_path)
    assert max(targets_of_end(pair, row, found)) < 0.01
    preflight = Preflight(AlignmentReport(), 1.0, found.stats, 1, 1.0, 1.0, "<eos>")
    floors = {"min_aligned": 0.0, "min_probability": 0.0}
    with pytest.raises(TrainingError, match=r"its end token <eos> a probability of [\de.-]+ on av(.|\n)*--teacher-end"):
        preflight.check(**floors, min_end=0.01)
    preflight.check(**floors, min_end=0.0)
    Preflight(AlignmentReport(), 1.0, CaptureStats(), 1, 1.0, 1.0, "<eos>").check(**floors, min_end=0.01)
    assert preflight.lines()["p(end)"].endswith(" on average · low: the student learns to go on where the data stops")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (NOWHERE, r"writes no special token after an answer"),
        ("{{ raise_exception('No!') }}", r"or refuses a conversation of two questions"),
        ("{{ 'nothing of it' }}", r"writes no special token after an answer"),
        (
            NEXT_TURN,
            r"writes <\|im_start\|> after an answer within a conversation, and no special token after the last",
        ),
        (TWO_ENDS, r"writes <\|im_end\|> after an answer within a conversation, and <\|return\|> after the last one"),
    ],
)
def test_unknown_end_token_is_an_error(template: str, message: str) -> None:
    tokenizer = qwen_base(template)
    with pytest.raises(ConfigError, match=message + r"(.|\n)*--teacher-end TOKEN(.|\n)*often <\|endoftext\|>"):
        make_pair(ALL["hymba"], tokenizer)
    assert make_pair(ALL["hymba"], tokenizer, teacher_end="<|im_end|>").teacher.end == 2


def test_end_after_the_last_answer_alone_is_the_tokenizers_own() -> None:
    template = NOWHERE + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    assert make_pair(ALL["hymba"], qwen_base(template)).teacher.end == 0


def test_template_keeps_its_own_end_of_sequence_token() -> None:
    """Which it may write elsewhere."""
    template = "{{ 'Begin.' + eos_token }}" + ENDS["qwen base"][0].chat_template
    pair = make_pair(ALL["hymba"], qwen_base(template))
    (row,) = align([TALK], pair)
    assert isinstance(row, Alignment)
    text = pair.teacher.tokenizer.decode(row.teacher_ids)
    assert text.startswith("Begin.<|endoftext|><|im_start|>user")
    assert text.endswith("That is all<|im_end|>\n")


def test_given_end_is_written_by_a_template_that_asks_for_one() -> None:
    pair = make_pair(ALL["hymba"], qwen_base("{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"))
    assert pair.teacher.end == 0
    named = make_pair(ALL["hymba"], qwen_base(None), teacher_end="<|im_end|>")
    (row,) = align([TALK], named)
    assert isinstance(row, Alignment)
    assert named.teacher.tokenizer.decode(row.teacher_ids).endswith("Assistant\nThat is all<|im_end|>\n")
    assert "<|endoftext|>" not in named.teacher.tokenizer.decode(row.teacher_ids)


@TEACHERS
def test_plain_text_ends_with_the_tokenizers_own_token(name: str, tmp_path: Path) -> None:
    tokenizer, _ = ENDS[name]
    pair = make_pair(ALL["hymba"], tokenizer)
    teacher = ModelTeacher(random_model("llama", tokenizer_size(tokenizer)), tokenizer, "it")
    row, found = taught(pair, Text("The answer is 42."), teacher, tmp_path)
    assert row.teacher_ids[-1] == tokenizer.eos_token_id
    assert row.student_ids[-1] == pair.student.end
    assert found.stats.ends == 0
    assert {pair.teacher.spelling.tokens[token] for token in pair.teacher.ends} == {END}


def test_alias_of_a_base_model_ends_as_its_template_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = qwen_base()
    random_model("qwen2", tokenizer_size(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", Mock(return_value=str(tmp_path)))
    found = find_teacher("qwen2.5-7b")
    pair = pair_of(DistillConfig(), ALL["hymba"], found)
    assert pair.teacher.tokenizer.eos_token == "<|im_end|>"
    assert found.tokenizer.eos_token == "<|endoftext|>"
    named = pair_of(DistillConfig(teacher_end="<|endoftext|>"), ALL["hymba"], found)
    assert named.teacher.tokenizer.eos_token == "<|endoftext|>"
