from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from hymba_tune.config import Learn
from hymba_tune.data import encode
from hymba_tune.data.formats import parse
from hymba_tune.data.preview import previews, shortened
from tests.data.test_dataset import source

TALK = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "So long"},
    ]
}


def test_pieces_are_the_text_with_what_is_learned_told_apart(hymba: PreTrainedTokenizerFast) -> None:
    (row,) = previews([source([TALK])], hymba)
    assert "".join(text for text, _ in row.pieces) == (
        "<s><extra_id_0>System\nBe brief.\n\n<extra_id_1>User\nHi\n<extra_id_1>Assistant\nHello</s>\n"
        "<extra_id_1>User\nBye\n<extra_id_1>Assistant\nSo long</s>\n"
    )
    assert [text for text, kind in row.pieces if kind == "learned"] == ["Hello</s>", "So long</s>"]
    (encoded,) = encode(parse(TALK), hymba, 10_000)
    assert (row.learned, row.tokens) == ((encoded.learned,), len(encoded.input_ids))


def test_settings_are_those_of_a_run(hymba: PreTrainedTokenizerFast) -> None:
    (row,) = previews([source([TALK])], hymba, learn=Learn.last)
    assert [text for text, kind in row.pieces if kind == "learned"] == ["So long</s>"]
    (row,) = previews([source([{"q": "1", "a": "2"}])], hymba, mapping={"prompt": "q", "completion": "a"})
    assert [text for text, kind in row.pieces if kind == "learned"] == ["2</s>"]


def test_text_is_learned_whole(hymba: PreTrainedTokenizerFast) -> None:
    (row,) = previews([source([{"text": "Once"}])], hymba)
    assert row.pieces == (("Once</s>", "learned"),)


def test_bad_row_says_why_and_the_others_follow(hymba: PreTrainedTokenizerFast) -> None:
    bad, good = previews([source([{"prompt": "x"}, TALK])], hymba)
    assert bad.problem is not None
    assert bad.problem.what == 'it has no "completion" (but prompt)'
    assert not bad.pieces
    assert good.pieces


def test_pairs_are_a_prompt_and_two_answers(hymba: PreTrainedTokenizerFast) -> None:
    rows = [{"q": "Hi", "chosen": "Hello there", "rejected": "No"}, {"q": "Hi", "chosen": "Oh", "rejected": "Oh"}]
    pair, same = previews([source(rows)], hymba, mapping={"prompt": "q"})
    assert pair.pieces == (
        ("<s><extra_id_0>System\n\n<extra_id_1>User\nHi\n<extra_id_1>Assistant\n", "read"),
        ("Hello there</s>", "chosen"),
        ("No</s>", "rejected"),
    )
    (talk,) = encode(parse({"prompt": "Hi", "completion": "Hello there"}), hymba, 10_000)
    assert pair.learned[0] == talk.learned > pair.learned[1]
    assert pair.tokens <= len(talk.input_ids)  # the template ends a turn with a line break, which is not compared
    assert same.problem is not None


def test_long_pieces_lose_their_middle() -> None:
    pieces = list(shortened([("ab" * 3000, "read"), ("short", "learned")], 10))
    assert pieces == [("ababa … 5,990 characters … babab", "read"), ("short", "learned")]
