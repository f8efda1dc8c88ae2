from __future__ import annotations

import pytest

from hymba_tune.errors import did_you_mean, nearest


@pytest.mark.parametrize(("word", "near"), [("rnk", "rank"), ("packing", ""), ("", "")])
def test_nearest_known_word_is_suggested_if_one_is_close(word: str, near: str) -> None:
    known = ["alpha", "rank", "ranks"]
    assert nearest(word, known) == nearest(word, iter(known)) == near
    assert did_you_mean(word, known) == (f"did you mean {near}?" if near else "")
