from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from hymba_tune.config import OnBadRow
from hymba_tune.data import (
    Conversation,
    RowError,
    Text,
    build_dataset,
    encode,
    open_source,
    sample_prompts,
)
from hymba_tune.errors import ConfigError, DataError
from tests.data.inputs import source
from tests.data.small_tokenizers import turns

GOOD = {"prompt": "Hi", "completion": "Hello"}
EMPTY = {"prompt": "Hi", "completion": ""}
LONG = {"prompt": "word " * 200, "completion": "Hello"}


def test_rows_equal_those_of_encode_in_order(hymba: PreTrainedTokenizerFast) -> None:
    sources = [source([GOOD, {"text": "one two three " * 30}]), source([{"prompt": "Bye", "completion": "So " * 60}])]
    dataset, report = build_dataset(sources, hymba, max_length=50)
    examples = [Conversation(turns("Hi", "Hello")), Text("one two three " * 30), Conversation(turns("Bye", "So " * 60))]
    expected = [row for example in examples for row in encode(example, hymba, 50)]
    assert dataset["input_ids"][:] == [row.input_ids for row in expected]
    assert dataset["labels"][:] == [row.labels for row in expected]
    split = len(expected) - 2
    places = ["support.jsonl, line 1", *["support.jsonl, line 2"] * split, "support.jsonl, line 1"]
    assert dataset["place"][:] == places
    assert (report.rows, report.conversations, report.texts, report.cut) == (3, 2, 1, 1)  # a text is split, not cut
    assert report.tokens == sum(len(row.input_ids) for row in expected)
    assert report.learned == sum(row.learned for row in expected)


def test_rows_of_weighted_answers_have_loss_weights(tmp_path: Path, hymba: PreTrainedTokenizerFast) -> None:
    """They survive the cache, and rows without weights are encoded as in data without any."""

    def weighted(weight: float) -> dict[str, object]:
        return {
            "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "A", "weight": weight}]
        }

    plain, plain_report = build_dataset([source([GOOD, weighted(1)])], hymba, max_length=50)
    assert (plain.column_names, plain_report.weighted) == (["input_ids", "labels", "place"], 0)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (GOOD, weighted(0.25))))
    for _ in range(2):
        rows, report = build_dataset(
            [open_source(str(tmp_path / "a.jsonl"))], hymba, max_length=50, cache_dir=tmp_path / "cache"
        )
        assert report.weighted == 1
        assert report.fingerprint != plain_report.fingerprint
        assert rows["input_ids"][:] == plain["input_ids"][:]
        assert rows["loss_weights"][0] is None
        assert set(rows["loss_weights"][1]) == {1.0, 0.25}


def test_batching_changes_nothing(hymba: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": f"{number}?", "completion": "word " * (number % 7 + 1)} for number in range(50)]
    whole, report = build_dataset([source(rows)], hymba, max_length=64)
    monkeypatch.setattr("hymba_tune.data.encoding.BATCH_ROWS", 3)
    monkeypatch.setattr("hymba_tune.data.encoding.BATCH_CHARS", 150)
    seen: list[int] = []
    small, again = build_dataset([source(rows)], hymba, max_length=64, progress=seen.append)
    assert small.to_list() == whole.to_list()
    assert again == report
    assert seen == sorted(seen)
    assert len(seen) > 50 / 3
    assert seen[-1] == 50


def test_fingerprint_depends_on_the_tokens_alone(hymba: PreTrainedTokenizerFast) -> None:
    def fingerprint(*rows: object, max_length: int = 64) -> str:
        return build_dataset([source(rows)], hymba, max_length=max_length)[1].fingerprint

    base = fingerprint(GOOD, {"prompt": "Bye", "completion": "So long"})
    assert (
        fingerprint({"instruction": "Hi", "output": "Hello", "id": 1}, {"prompt": "Bye", "completion": "So long"})
        == base
    )
    others = [
        fingerprint(GOOD),
        fingerprint({"prompt": "Bye", "completion": "So long"}, GOOD),
        fingerprint(GOOD, {"prompt": "Bye", "completion": "So long!"}),
    ]
    assert len({base, *others}) == 4


def test_bad_row_stops_with_its_place_and_how_many_there_are(hymba: PreTrainedTokenizerFast) -> None:
    bot = {"messages": [{"role": "user", "content": "Hi"}, {"role": "bot", "content": "Hello"}]}
    with pytest.raises(RowError) as refusal:
        build_dataset([source([GOOD, bot, GOOD, EMPTY, "text"])], hymba, max_length=64)
    assert str(refusal.value).splitlines() == [
        'Cannot use support.jsonl, line 2: message 2 has role "bot".',
        "  expected   one of: system, user, assistant, tool",
        "  to fix     rename the role, or --map role.bot=assistant",
        "  to skip    --on-bad-row skip   (3 such rows in the file)",
    ]


def test_skipping_every_row_is_not_proposed(hymba: PreTrainedTokenizerFast) -> None:
    with pytest.raises(RowError) as refusal:
        build_dataset([source([EMPTY, "text", EMPTY])], hymba, max_length=64)
    assert "skip" not in str(refusal.value)


def test_only_so_many_rows_are_searched_for_more_bad_ones(
    hymba: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hymba_tune.data.building.LOOK_AHEAD", 2)
    with pytest.raises(RowError, match=r"\(2 such rows among 2 rows\)"):
        build_dataset([source([GOOD, EMPTY, EMPTY, GOOD, EMPTY])], hymba, max_length=64)


def test_unreadable_row_stops_with_its_place(tmp_path: Path, hymba: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{json.dumps(GOOD)}\n{{"prompt": "Hi"\n')
    with pytest.raises(RowError, match=r"a\.jsonl, line 2: not JSON at column 16(.|\n)*the only one in the file"):
        build_dataset([open_source(str(path))], hymba, max_length=64)


def test_row_that_the_template_refuses_is_a_bad_row(hymba: PreTrainedTokenizerFast) -> None:
    picky = "{% if messages[0].content == 'Hi' %}{{ raise_exception('no greetings') }}{% endif %}" + hymba.chat_template
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hymba, "chat_template", picky)
        with pytest.raises(RowError, match=r"support\.jsonl, line 2: the chat template refuses .*no greetings"):
            build_dataset([source([{**GOOD, "prompt": "Bye"}, GOOD])], hymba, max_length=64)


def test_skipped_rows_are_counted_and_listed(tmp_path: Path, hymba: PreTrainedTokenizerFast) -> None:
    dataset, report = build_dataset([source([GOOD, EMPTY, LONG])], hymba, max_length=64, on_bad_row=OnBadRow.skip)
    assert len(dataset) == 1
    assert (report.rows, report.conversations, report.bad_rows, report.too_long) == (3, 1, 1, 1)
    report.write_dropped(tmp_path / "dropped.jsonl")
    listed = [json.loads(line) for line in (tmp_path / "dropped.jsonl").read_text().splitlines()]
    assert listed[0] == {
        "file": "support.jsonl",
        "line": 2,
        "reason": "bad row",
        "what": '"completion" is an empty answer',
    }
    assert (listed[1]["line"], listed[1]["reason"]) == (3, "too long")
    assert re.fullmatch(r"its first answer begins at token [\d,]+ of [\d,]+, past --max-length 64", listed[1]["what"])
    assert json.loads(json.dumps(report.counts()))["fingerprint"] == report.fingerprint


def test_too_long_rows_do_not_stop(hymba: PreTrainedTokenizerFast) -> None:
    _, report = build_dataset([source([LONG, GOOD])], hymba, max_length=64, on_bad_row=OnBadRow.stop)
    assert (report.too_long, report.conversations) == (1, 1)


def test_data_without_a_usable_row_is_refused(tmp_path: Path, hymba: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"of 2 rows, 2 are too long and 0 bad(.|\n)*a larger --max-length"):
        build_dataset([source([LONG, LONG])], hymba, max_length=64, cache_dir=tmp_path)
    with pytest.raises(
        DataError, match=r"0 are too long and 1 bad\. The first, support\.jsonl, line 1: .*empty answer"
    ):
        build_dataset([source([EMPTY])], hymba, max_length=64, on_bad_row=OnBadRow.skip, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_data_that_the_template_refuses_names_another_template(hymba: PreTrainedTokenizerFast) -> None:
    tokenizer = copy.deepcopy(hymba)
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    tokenizer.chat_template = refusal + hymba.get_chat_template()
    rows = [{"system": "Be brief.", "prompt": "Hi", "completion": "Hello"}]
    for on_bad_row in OnBadRow:
        with pytest.raises(
            DataError, match=r"no system role(.|\n)*to fix .*--chat-template hymba or alpaca \(of a tea"
        ):
            build_dataset([source(rows)], tokenizer, max_length=64, on_bad_row=on_bad_row)


def test_wrong_mapping_is_refused_before_any_row_is_read(hymba: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="promt"):
        build_dataset([source([])], hymba, max_length=64, mapping={"promt": "question"})


def test_samples_are_prompts_and_reference_answers() -> None:
    messages = [
        {"role": message.role, "content": message.content} for message in turns("Hi", "Hello", "Bye", "So long", "?")
    ]
    rows = [{"messages": messages, "contexts": ["c"]}, EMPTY, {"text": "x"}, {"q": "1", "a": "2"}, GOOD]
    samples = sample_prompts([source(rows), source([GOOD])], 2)
    assert samples == [
        (Conversation(turns("Hi", "Hello", "Bye"), contexts=("c",)), "So long"),
        (Conversation(turns("Hi")), "Hello"),
    ]
    assert sample_prompts([source(rows)], 5, {"prompt": "q", "completion": "a"}) == [(Conversation(turns("1")), "2")]
