from __future__ import annotations

import json
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from hymba_tune.config import Learn, OnBadRow
from hymba_tune.data import Source, build_dataset, open_source
from hymba_tune.data.check_counts import Check, FileCheck, Lengths
from hymba_tune.data.check_facts import facts, histogram, next_commands, overview, problems, verdict
from hymba_tune.data.check_page import check_page
from hymba_tune.data.checking import check_sources
from hymba_tune.errors import ConfigError, DataError
from tests.browser import DESK, PHONE, Browser
from tests.data.inputs import source

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
GOOD = {"messages": [USER, ANSWER]}
BOT = {"messages": [USER, {"role": "bot", "content": "Hello"}]}
LONG = {"prompt": "Hi", "completion": "word " * 100}
LATE = {"prompt": "word " * 100, "completion": "Hello"}
TEXT = {"text": "once upon a time " * 10}


def check(rows: Sequence[object], tokenizer: PreTrainedTokenizerFast, max_length: int = 64) -> Check:
    return check_sources([source(rows)], tokenizer, max_length=max_length)


def test_counts_equal_those_of_a_run(hymba: PreTrainedTokenizerFast) -> None:
    rows = [GOOD, LONG, LATE, TEXT, BOT, {"prompt": "a", "completion": ""}]
    result = check(rows, hymba)
    _, report = build_dataset([source(rows)], hymba, max_length=64, on_bad_row=OnBadRow.skip)
    same = ("rows", "bad_rows", "too_long", "tokens", "learned")
    assert [getattr(result, name) for name in same] == [getattr(report, name) for name in same]
    assert result.cut == report.cut == 1
    assert result.continued == 1
    assert result.tokens_lost == check([LONG], hymba, 10_000).tokens - 64
    assert sum(result.lengths.rows.values()) == 4


def test_learn_last_counts_only_the_last_answer(hymba: PreTrainedTokenizerFast) -> None:
    rows = [{"messages": [USER, ANSWER, USER, ANSWER]}]
    every, last = (check_sources([source(rows)], hymba, max_length=99, learn=learn) for learn in Learn)
    assert every.learned == 2 * last.learned


def test_bad_rows_are_counted_by_kind_with_the_first_places(hymba: PreTrainedTokenizerFast) -> None:
    unknown_role = [{"messages": [USER] * turns + [BOT["messages"][1]]} for turns in (1, 2, 3, 4)]
    result = check([*unknown_role, GOOD, {"prompt": "a", "completion": " "}, 7], hymba)
    assert [(problem.what, problem.rows) for problem in result.problems.values()] == [
        ('message N has role "bot"', 4),
        ('"completion" is an empty answer', 1),
        ("the row is a number", 1),
    ]
    bots = result.problems['message N has role "bot"']
    assert bots.examples == [f'support.jsonl, line {n}: message {n + 1} has role "bot"' for n in (1, 2, 3)]
    assert bots.fix == "rename the role, or --map role.bot=assistant"
    assert verdict(result) == "Cannot be trained on yet: 6 of 7 rows would stop a run."
    assert not result.usable
    assert result.files[0].formats == {"messages": 5, "prompt and completion": 1, "unreadable": 1}


@pytest.mark.parametrize(("rows", "proposed"), [([BOT, GOOD], True), ([BOT, BOT], False)])
def test_skipping_every_row_is_not_proposed(rows: list[object], proposed: bool, hymba: PreTrainedTokenizerFast) -> None:
    assert any("--on-bad-row skip" in problem.fix for problem in problems(check(rows, hymba))) == proposed


def test_kinds_of_findings_have_a_bound(hymba: PreTrainedTokenizerFast) -> None:
    rows = [
        {"messages": [USER, {"role": f"bot{chr(97 + n % 26)}{chr(97 + n // 26)}", "content": "x"}]} for n in range(99)
    ]
    rows += [{**GOOD, f"column {n}": 1} for n in range(99)]
    result = check(rows, hymba)
    assert len(result.problems) == 41
    assert result.problems["something else"].rows == 59
    assert len(result.hidden) == 41


def test_repeated_rows_and_other_answers(hymba: PreTrainedTokenizerFast) -> None:
    rows = [
        {"prompt": "How many?", "completion": "Two."},
        GOOD,
        {"instruction": "How many?", "output": "Two."},
        {"prompt": "how  many", "completion": "Three."},
        {"prompt": "Hi", "completion": "Hello"},
        {"text": "How many?"},
        {"prompt": "How many?", "completion": "Two.", "system": "Be brief."},
    ]
    result = check(rows, hymba).duplicates
    assert (result.rows, result.other_answers) == (2, 1)
    assert result.examples == [
        ("support.jsonl, line 3", "support.jsonl, line 1"),
        ("support.jsonl, line 5", "support.jsonl, line 2"),
    ]


def test_repeats_are_named_across_files(hymba: PreTrainedTokenizerFast) -> None:
    result = check_sources([source([LATE, GOOD], "a"), source([TEXT, GOOD], "b")], hymba, max_length=64)
    assert result.duplicates.examples == [("b, line 2", "a, line 2")]


def test_oddities_are_noted_and_do_not_make_data_unusable(hymba: PreTrainedTokenizerFast) -> None:
    rows = [
        {"messages": [USER, USER, ANSWER, ANSWER]},
        {"messages": [{**USER, "content": " "}, ANSWER, USER]},
        {"messages": [{**USER, "name": "Ann"}, {**ANSWER, "reasoning": "…"}], "id": 3, "source": "x", "kept": False},
        {"messages": [ANSWER, USER, ANSWER]},
    ]
    result = check(rows, hymba)
    assert {note.what: (note.rows, note.examples) for note in result.notes.values()} == {
        "two messages from the user in a row": (1, ["support.jsonl, line 1"]),
        "two answers in a row": (1, ["support.jsonl, line 1"]),
        "the last message is not an answer, so it has no loss": (1, ["support.jsonl, line 2"]),
        "an empty message from the user": (1, ["support.jsonl, line 2"]),
        "its reasoning is read as <think>…</think> before the answer": (1, ["support.jsonl, line 3"]),
        "it begins with an answer, which is context without loss": (1, ["support.jsonl, line 4"]),
    }
    assert result.hidden == {"id": 1, "source": 1, "kept": 1, "messages[].name": 1}
    label, keys = overview(result)[-1]
    assert label == "not shown"
    assert {"id (1)", "messages[].name (1)"} <= set(keys.split(", "))
    assert result.usable


def test_file_that_cannot_be_read_does_not_stop_the_check_of_others(
    hymba: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "empty.jsonl").touch()
    result = check_sources([open_source(str(tmp_path / "empty.jsonl")), source([GOOD])], hymba, max_length=64)
    assert result.rows == 1
    assert not result.usable
    assert verdict(result) == f"Cannot be trained on yet: {tmp_path}/empty.jsonl cannot be used."
    assert problems(result)[0].what == f"Cannot use {tmp_path}/empty.jsonl: it has no rows."
    assert next_commands(result, ["a"], "m", [], 64) == []


def test_answers_with_labels_can_be_trained_on_with_sft_and_kto(hymba: PreTrainedTokenizerFast) -> None:
    labeled = {"prompt": "a", "completion": "b", "label": True}
    commands = dict(next_commands(check([labeled], hymba), ["a"], "m", [], 64))
    assert commands["train"].replace("sft", "kto") == commands["kto"]
    assert "kto" not in dict(next_commands(check([GOOD], hymba), ["a"], "m", [], 64))


@pytest.mark.parametrize("column", ["label", "kto_tag"])
def test_answers_labeled_bad_are_for_kto_only(column: str, hymba: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "a", "completion": answer, column: answer == "good"} for answer in ("good", "bad", "worse")]
    result = check(rows, hymba)
    commands = dict(next_commands(result, ["a"], "m", [], 64))
    assert "train" not in commands
    assert commands["kto"].startswith("hymba-tune kto --data a")
    assert commands["kto"].endswith("--map label=kto_tag") == (column == "kto_tag")
    whats = [problem.what for problem in problems(result)]
    assert "2 rows: its label says that the answer is bad, which sft would learn" in whats
    assert not [what for what in whats if what.startswith("every label")]


def test_null_label_is_noted(hymba: PreTrainedTokenizerFast) -> None:
    result = check([{"prompt": "a", "completion": "b", "label": None}, {"text": "a", "label": None}], hymba)
    assert {note.what: note.rows for note in result.notes.values()} == {"its label is null": 1}


@pytest.mark.parametrize("good", [True, False])
def test_labels_of_one_kind_are_named(good: bool, hymba: PreTrainedTokenizerFast) -> None:
    result = check([{"prompt": "a", "completion": "b", "label": good}] * 2, hymba)
    only = {True: "good", False: "bad"}[good]
    assert not [note for note in result.notes if "null" in note]
    assert f"every label says that the answer is {only}" in [problem.what for problem in problems(result)]


def test_data_without_an_answer_within_max_length_is_not_usable(hymba: PreTrainedTokenizerFast) -> None:
    result = check([LATE], hymba)
    assert verdict(result) == "Cannot be trained on: no answer begins within --max-length 64."
    assert not result.usable


def test_wrong_mapping_is_refused(hymba: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="promt"):
        check_sources([source([GOOD])], hymba, max_length=64, mapping={"promt": "x"})


def test_larger_max_length_is_proposed_within_reason(hymba: PreTrainedTokenizerFast) -> None:
    result = check([LONG, LATE], hymba)
    longest = max(result.lengths.rows)
    fixes = [problem.fix for problem in problems(result)]
    assert f"--max-length {-(-longest // 64) * 64} fits 99% of the rows" in fixes
    result.lengths = Lengths()
    result.lengths.rows.update({100_000: 9, 10: 1})
    assert "shorten them, or use a larger --max-length" in [problem.fix for problem in problems(result)]


@pytest.mark.parametrize(
    ("rows", "bars"),
    [
        ({}, []),
        ({5: 2}, [(0, 7, 2)]),
        (
            {5: 2, 70: 3, 99: 1},
            [(0, 15, 2), (16, 31, 0), (32, 47, 0), (48, 63, 0), (64, 79, 3), (80, 95, 0), (96, 111, 1)],
        ),
        ({20: 90, 600: 1}, [(16, 31, 90), (32, 63, 0), (64, 127, 0), (128, 255, 0), (256, 511, 0), (512, 1023, 1)]),
    ],
)
def test_histogram_counts_every_row_once(rows: dict[int, int], bars: list[tuple[int, int | None, int]]) -> None:
    lengths = Lengths()
    lengths.rows.update(rows)
    assert histogram(lengths) == bars
    assert sum(count for _, _, count in histogram(lengths)) == sum(rows.values())


def test_quantiles_are_lengths_that_occur() -> None:
    lengths = Lengths()
    lengths.rows.update({10: 50, 20: 49, 1000: 1})
    assert [lengths.quantile(share) for share in (0.5, 0.9, 0.99, 1.0)] == [10, 20, 20, 1000]
    assert Lengths().quantile(0.5) == 0


def test_facts_are_values_for_json(hymba: PreTrainedTokenizerFast) -> None:
    data = json.loads(json.dumps(facts(check([GOOD, GOOD, BOT, LONG], hymba))))
    assert data["usable"] is False
    assert data["problems"][0]["rows"] == 1
    assert data["duplicates"]["rows"] == 1
    assert data["at_max_length"] == {"max_length": 64, "too_long": 0, "cut": 1, "continued": 0}
    assert data["tokens"]["learned_share"] == data["tokens"]["learned"] / data["tokens"]["kept"]
    assert sum(bar["rows"] for bar in data["lengths"]["histogram"]) == 3


def test_memory_grows_by_the_hashes_only(hymba: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hymba_tune.data.encoding.BATCH_ROWS", 16)

    def peak(count: int) -> int:
        rows = Source("a", lambda: iter(source([{"text": f"{n}" * 50} for n in range(8)] * (count // 8))))
        tracemalloc.start()
        try:
            assert check_sources([rows], hymba, max_length=64).rows == count
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(16)
    few, many = peak(160), peak(1600)
    assert many - few < 200_000


class TestPage:
    """The page of a check, as a browser shows it."""

    @pytest.mark.parametrize(("width", "dark"), [(PHONE, True), (DESK, False)])
    def test_shows_the_whole_check(
        self, width: int, dark: bool, browser: Browser, hymba: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        rows = [GOOD, GOOD, LONG, LATE, TEXT, {"prompt": "<script>x()</script>", "kompletion": "<b>"}, BOT]
        result = check(rows, hymba)
        page = tmp_path / "page.html"
        page.write_text(check_page(result, model="m", commands=[("train", "hymba-tune sft --data x")]))
        seen = browser.look(page, width, dark=dark)
        assert not seen.complaints
        assert not seen.requests
        assert not seen.over
        assert [plot.title for plot in seen.plots] == [
            "Row lengths",
            "Use of rows",
            "Use of tokens",
        ]
        assert not [plot for plot in seen.plots if plot.clipped or plot.meet or not plot.paths]
        assert "Cannot be trained on yet: 2 of 7 rows would stop a run." in seen.text
        assert 'it has no "completion" (but prompt, kompletion)' in seen.text
        assert "hymba-tune sft --data x" in seen.text

    def test_renders_without_any_row(self, browser: Browser, tmp_path: Path) -> None:
        result = Check(64, files=[FileCheck("<a>", problem=DataError("It is broken."))])
        (tmp_path / "page.html").write_text(check_page(result, model="m", commands=[]))
        seen = browser.look(tmp_path / "page.html")
        assert not seen.complaints
        assert not seen.plots
        assert "<a>" in seen.text
        assert "It is broken." in seen.text
