from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from hymba_tune.config import Learn
from hymba_tune.data import encode
from hymba_tune.data.formats import parse
from hymba_tune.data.preview import previews, shortened
from tests.data.inputs import source

CONVERSATION = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "So long"},
    ]
}


def test_segments_are_the_text_with_loss_on_the_answers(hymba: PreTrainedTokenizerFast) -> None:
    (row,) = previews([source([CONVERSATION])], hymba)
    assert "".join(text for text, _ in row.segments) == (
        "<s><extra_id_0>System\nBe brief.\n\n<extra_id_1>User\nHi\n<extra_id_1>Assistant\nHello</s>\n"
        "<extra_id_1>User\nBye\n<extra_id_1>Assistant\nSo long</s>\n"
    )
    assert [text for text, kind in row.segments if kind == "loss"] == ["Hello</s>", "So long</s>"]
    (encoded,) = encode(parse(CONVERSATION), hymba, 10_000)
    assert (row.learned, row.tokens) == ((encoded.learned,), len(encoded.input_ids))


def test_learn_and_mapping_apply_as_in_a_run(hymba: PreTrainedTokenizerFast) -> None:
    (row,) = previews([source([CONVERSATION])], hymba, learn=Learn.last)
    assert [text for text, kind in row.segments if kind == "loss"] == ["So long</s>"]
    (row,) = previews([source([{"q": "1", "a": "2"}])], hymba, mapping={"prompt": "q", "completion": "a"})
    assert [text for text, kind in row.segments if kind == "loss"] == ["2</s>"]


def test_text_is_one_segment_with_loss(hymba: PreTrainedTokenizerFast) -> None:
    (row,) = previews([source([{"text": "Once"}])], hymba)
    assert row.segments == (("Once</s>", "loss"),)


def test_bad_row_has_its_problem_and_later_rows_follow(hymba: PreTrainedTokenizerFast) -> None:
    bad, good = previews([source([{"prompt": "x"}, CONVERSATION])], hymba)
    assert bad.problem is not None
    assert bad.problem.what == 'it has no "completion" (but prompt)'
    assert not bad.segments
    assert good.segments


def test_pair_is_a_prompt_and_two_answers(hymba: PreTrainedTokenizerFast) -> None:
    rows = [{"q": "Hi", "chosen": "Hello there", "rejected": "No"}, {"q": "Hi", "chosen": "Oh", "rejected": "Oh"}]
    pair, same = previews([source(rows)], hymba, mapping={"prompt": "q"})
    assert pair.segments == (
        ("<s><extra_id_0>System\n\n<extra_id_1>User\nHi\n<extra_id_1>Assistant\n", "context"),
        ("Hello there</s>", "chosen"),
        ("No</s>", "rejected"),
    )
    (encoded,) = encode(parse({"prompt": "Hi", "completion": "Hello there"}), hymba, 10_000)
    assert pair.learned[0] == encoded.learned > pair.learned[1]
    assert pair.tokens <= len(encoded.input_ids)  # the template ends a turn with a line break, which has no loss
    assert same.problem is not None


def test_long_segments_lose_their_middle() -> None:
    segments = list(shortened([("ab" * 3000, "context"), ("short", "loss")], 10))
    assert segments == [("ababa … 5,990 characters … babab", "context"), ("short", "loss")]
