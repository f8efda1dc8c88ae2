from __future__ import annotations

import errno
import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hymba_tune.errors import CheckpointError, ConfigError
from hymba_tune.report import RunRecord, judge, write_comparison, write_report
from hymba_tune.report.compare import differing
from tests.browser import DESK, PHONE, Browser, Page
from tests.report.inputs import write_nasty_run, write_run

CURVES = ["Loss", "Learning rate", "Gradient norm, before clipping", "Speed", "Peak memory"]
MOVED = "How far the weights moved"


def assert_sound(seen: Page, width: int) -> None:
    """Nothing the browser complains of, nothing fetched, nothing cut off, every plot readable."""
    assert not seen.complaints
    assert not seen.requests
    assert not seen.over
    assert seen.width == width
    for plot in seen.plots:
        assert plot.width > 300, plot
        assert plot.height > 180, plot
        assert plot.paths > 5, plot
        assert len(plot.alt) > 30, plot
        assert not plot.clipped, plot
        assert not plot.meet, plot
        assert plot.smallest > 8, plot


@pytest.mark.parametrize(("width", "dark"), [(DESK, False), (PHONE, False), (DESK, True)])
def test_page_of_a_finished_run_in_a_browser(browser: Browser, finished_run: Path, width: int, dark: bool) -> None:
    seen = browser.look(finished_run / "report.html", width, dark=dark)
    assert_sound(seen, width)
    assert [plot.title for plot in seen.plots] == [*CURVES, MOVED]
    assert "held-out rows are too few to say whether it got better: held-out loss" in seen.text
    assert "finished at step 30" in seen.text
    assert "I see one cats. What do I see?" in seen.text
    assert "hymba-tune sft --model" in seen.text
    assert f"hymba-tune sft --resume {finished_run}" in seen.text


def test_page_of_a_run_that_has_everything_in_a_browser(browser: Browser, tmp_path: Path) -> None:
    page, _ = write_report(write_nasty_run(tmp_path / "nasty <b>&"))
    for width in (PHONE, DESK):
        seen = browser.look(page, width)
        assert_sound(seen, width)
    titles = [
        "Loss",
        "Held-out loss by source",
        "Pairs ranked correctly",
        "Margin of rewards",
        "Unknown measure",
        *CURVES[1:],
        MOVED,
    ]
    assert [plot.title for plot in seen.plots] == titles
    assert "predicted 3.00 GB" in next(plot.alt for plot in seen.plots if plot.title == "Peak memory")
    assert "<script>document.title" in seen.text
    assert "failed at step 300" in seen.text
    assert "11 too long · 1 bad row" in seen.text
    assert "82 %" in seen.text
    assert "Training objective" in seen.text
    assert "3.0 GB predicted, 2.9 GB measured (-3 %)" in seen.text


def test_tables_break_no_words_on_a_phone(browser: Browser, tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, [3.0], [4.0, 2.0], settings={"rank": len(name)}) for name in ("a", "bb", "ccc")]
    write_comparison(runs, tmp_path / "compare.html")
    lines = browser.look(tmp_path / "compare.html", 360).text.splitlines()
    assert "held-out loss, before" in lines
    measures = {"model": "m", "weight_bytes": 1, "measures": {"loss": 2.0, "exact_match": 0.5}, "tasks": {}}
    tests = {"loss": {"word": "better", "n": 24, "p": 0.01}, "exact_match": {"word": "too few to say", "n": 4, "p": 1}}
    evaluation = {
        "when": "2026-11-30T11:28:01+0000",
        "settings": {"data": ["held.jsonl"]},
        "models": [measures | {"name": name} for name in ("runs/my-run", "hymba-nano")],
        "compared": [{"with": "hymba-nano", "tests": tests}],
    }
    (runs[0] / "evaluations.json").write_text(json.dumps([evaluation]))
    seen = browser.look(write_report(runs[0])[0], 360)
    assert_sound(seen, 360)
    assert "tokens that are the likeliest" not in seen.text
    assert "loss, nats a token" in seen.text.splitlines()
    assert "against hymba-nano: loss better (n = 24) · right answers too few to say (n = 4)" in seen.text


def test_answers_come_before_curves(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [3.0], [4.0, 2.0])
    page = write_report(run)[0].read_text()
    assert page.index("Answers before and after") < page.index("What happened")


def test_gaps_and_large_changes_are_explained(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [3.0, float("nan"), 2.0], [4.0, 2.0])
    part = {"group": "MLP", "part": "up_proj", "layer": 0, "size": 0.1}
    meta = {"group": "meta tokens", "part": "memory_tokens", "layer": None, "size": 5.76}
    for parts, explained in (([part], False), ([part, meta], True)):
        (run / "updates.json").write_text(json.dumps({"parts": parts}))
        page = write_report(run)[0].read_text()
        assert "Gaps: 1 value is NaN or infinite." in page
        assert "shared with the layer before" in page
        assert ("moved by more than its norm" in page) == explained


def test_a_reward_is_not_shown_as_a_held_out_loss(tmp_path: Path) -> None:
    for name, rewards in (("one", [0.5, 0.7]), ("two", [0.5, 0.6])):
        losses = [-reward for reward in rewards]
        columns = {"reward": [0.4, 0.6], "eval_reward": rewards}
        settings = {"verb": "grpo", "reward": ["exact"]}
        write_run(tmp_path / name, [0.1, 0.2], losses, settings=settings, columns=columns)
    page = write_report(tmp_path / "one")[0].read_text()
    assert "-0.700" not in page
    assert re.search(r"Reward of answers: .*0\.700", page)
    write_comparison([tmp_path / "one", tmp_path / "two"], tmp_path / "compared.html")
    page = (tmp_path / "compared.html").read_text()
    assert "Held-out reward" in page
    assert "Held-out loss:" not in page
    assert "-0.700" not in page


def test_page_says_from_where_the_weights_moved(tmp_path: Path) -> None:
    parts = [{"group": "MLP", "part": "up_proj", "layer": layer, "size": 0.1} for layer in (0, 1)]
    for start in ("merge", "continue"):
        run = write_run(tmp_path / start, [3.0], settings={"verb": "dpo", "start": start})
        (run / "updates.json").write_text(json.dumps({"parts": parts}))
        page = write_report(run)[0].read_text()
        assert MOVED in page
        assert (f"{MOVED} from the base" in page) == (start == "continue")
        assert ("the changes of its earlier training are included" in page) == (start == "continue")


def test_comparison_in_a_browser(browser: Browser, finished_run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", [3.0, 2.0], [4.0, 3.0, 2.5], facts={"seconds": 12.0}, settings={"rank": 8})
    write_comparison([finished_run, other, write_nasty_run(tmp_path / "nasty")], tmp_path / "compare.html")
    for width in (PHONE, DESK):
        seen = browser.look(tmp_path / "compare.html", width)
        assert_sound(seen, width)
    assert [plot.title for plot in seen.plots][:2] == ["Held-out loss", "Loss"]
    assert all(plot.alt.split(": ", 1)[1][:2] in ("A ", "B ", "C ") for plot in seen.plots)


def test_comparison_names_the_best_and_what_differs(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "one", [3.0], [4.0, 2.0], settings={"rank": 8}, columns={"eval_loss/A.jsonl": [5.0, 1.0]}),
        write_run(tmp_path / "two", [3.0], [4.0, 1.5], settings={"rank": 16}),  # the default
        write_run(tmp_path / "three", [3.0], settings={"lr": 0.1}),
    ]
    compared = write_comparison(runs, tmp_path / "compare.html")
    assert [(letter, record.name) for letter, record, _ in compared] == [("A", "one"), ("B", "two"), ("C", "three")]
    assert compared[1][2]["held-out loss, best"] == "1.500 nats a token"
    of_source = {name: value for name, value in compared[0][2].items() if "A.jsonl" in name}
    assert of_source == {"held-out loss on A.jsonl, last": "1.000 nats a token"}
    page = (tmp_path / "compare.html").read_text()
    assert "B is best, with the lowest held-out loss: B 1.500, A 2.000." in page
    rows = re.findall(
        r"<tr><td>(\w+)</td><td data-of=.A.>(.*?)</td><td data-of=.B.>(.*?)</td><td data-of=.C.>(.*?)</td></tr>", page
    )
    assert rows == [("rank", "8", "16", "16"), ("lr", "–", "–", "0.1")]


def test_runs_on_different_held_out_data_are_not_ranked(tmp_path: Path) -> None:
    held_out = [{"held_out": {"rows": 100, "fingerprint": digest}} for digest in "xyx"]
    one, two, three = (
        write_run(tmp_path / name, [3.0], [4.0, loss], facts=facts)
        for name, loss, facts in zip(("one", "two", "three"), (2.0, 1.5, 1.0), held_out, strict=True)
    )
    old = [write_run(tmp_path / f"old-{data}", [3.0], [4.0, 2.0], settings={"data": [data]}) for data in "ab"]
    for number, runs in enumerate(([one, two], [one, old[0]], old)):
        write_comparison(runs, tmp_path / f"{number}.html")
        page = (tmp_path / f"{number}.html").read_text()
        assert "were evaluated on different held-out data, so their losses cannot be compared." in page
        assert "is best" not in page
    write_comparison([one, three], tmp_path / "same.html")
    assert "B is best, with the lowest held-out loss" in (tmp_path / "same.html").read_text()


@pytest.mark.parametrize(
    ("losses", "rows", "verdict"),
    [
        ((2.0, 1.9), 100, "B is best, with the lowest held-out loss: B 1.900, A 2.000 on 100 held-out rows."),
        ((2.0, 1.0), 2, "Too few rows to say which is best, B or A: B 1.000, A 2.000 on 2 held-out rows."),
        ((2.0, 2.0), 100, "Too few rows to say which is best, A or B"),
    ],
)
def test_a_winner_is_not_chance(losses: tuple[float, float], rows: int, verdict: str, tmp_path: Path) -> None:
    facts = {"held_out": {"rows": rows, "fingerprint": "x"}}
    runs = [write_run(tmp_path / str(number), [3.0], [4.0, loss], facts=facts) for number, loss in enumerate(losses)]
    write_comparison(runs, tmp_path / "compare.html")
    assert verdict in (tmp_path / "compare.html").read_text()


def test_settings_that_are_the_same_do_not_differ() -> None:
    assert differing({"A": {"x": 1, "y": []}, "B": {"x": 1, "y": None}}) == {}
    assert differing({"A": {"x": [1, 2]}, "B": {}}) == {"x": ["1, 2", "–"]}


def test_runs_of_other_losses_are_not_ranked(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, [3.0], [4.0, 2.0], settings={"verb": name}) for name in ("sft", "dpo")]
    write_comparison(runs, tmp_path / "compare.html")
    assert "minimize different losses" in (tmp_path / "compare.html").read_text()


def test_runs_without_held_out_data_are_not_ranked(tmp_path: Path) -> None:
    write_comparison([write_run(tmp_path / name, [3.0]) for name in "ab"], tmp_path / "compare.html")
    assert "Fewer than two of these runs" in (tmp_path / "compare.html").read_text()


def test_comparison_must_be_writable_and_not_too_long(tmp_path: Path) -> None:
    run = write_run(tmp_path / "one", [3.0])
    with pytest.raises(ConfigError, match=r"there is no folder .*nowhere"):
        write_comparison([run, run], tmp_path / "nowhere" / "compare.html")
    with pytest.raises(ConfigError, match="27 runs are too many for one page"):
        write_comparison([run] * 27, tmp_path / "compare.html")


def test_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    page, verdict = write_report(write_run(tmp_path / "begun"))
    assert verdict.sentence == "It ended before its first step was measured."
    text = page.read_text()
    assert "not finished, at step 0" in text
    assert "No prompt was answered." in text
    assert "<figure>" not in text


def test_what_is_not_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is not a run: it has no config\.yaml"):
        write_report(tmp_path)
    run = write_run(tmp_path / "torn", [2.0, 1.0])
    for settings in ("[", "- a\n", "\0\0\0", "verb: [sft]\n"):
        (run / "config.yaml").write_text(settings)
        with pytest.raises(
            CheckpointError, match=r"torn/config\.yaml cannot be read: (.|\n)*\n  to fix     restore it"
        ):
            write_report(run)


def test_half_a_line_of_a_killed_run_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "killed", [2.0, 1.0])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "lo')
    verdict = write_report(run)[1]
    assert "Training loss 2.000 nats a token → 1.000" in verdict.sentence
    assert len(verdict.notes) == 1  # on held-out data only


@pytest.mark.parametrize("name", ["run.json", "samples.json", "updates.json", "evaluations.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"\0" * 99, b"\xff\xfe", b"7", b"[" * 9999], ids=range(6))
def test_torn_files_count_as_absent_and_are_named(name: str, content: bytes, tmp_path: Path) -> None:
    run = write_run(tmp_path / "torn", [2.0, 1.0])
    (run / name).write_bytes(content)
    record = RunRecord.read(run)
    assert record.damaged == [name]
    assert judge(record).notes[-1] == f"After a crash, these cannot be read: {name}."


def test_torn_lines_of_metrics_are_left_out_and_counted(tmp_path: Path) -> None:
    run = write_run(tmp_path / "torn", [2.0, 1.0])
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    torn = [
        b"\0" * 100,
        lines[0],
        b'{"step": 15, "lo',
        b"\0\0\n",
        b'{"step": "x"}\n',
        b"[1]\n",
        b"\xff\n",
        lines[1],
        b'{"st',
    ]
    (run / "metrics.jsonl").write_bytes(b"".join(torn))
    record = RunRecord.read(run)
    assert record.series("loss") == ([10, 20], [2.0, 1.0])
    assert record.damaged == ["4 lines of metrics.jsonl"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
KEYS = ("data", "memory", "kept", "ended", "parameters", "described", "held_out", "vocabulary", "kernels", "versions")


@given(
    facts=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4),
    lists=st.fixed_dictionaries({name: st.lists(JSON, max_size=2) for name in ("samples.json", "evaluations.json")}),
    updates=st.dictionaries(st.sampled_from(("parts", "absent")), JSON),
    settings=st.dictionaries(st.sampled_from(("data", "model", "targets", "method", "start")), JSON),
)
@hypothesis.settings(
    max_examples=20, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_edited_files_give_a_page_or_one_message(
    facts: dict[str, Any],
    lists: dict[str, Any],
    updates: dict[str, Any],
    settings: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    run = write_run(tmp_path_factory.mktemp("runs") / "edited", settings=settings, facts=facts)
    for name, content in {**lists, "updates.json": updates}.items():
        (run / name).write_text(json.dumps(content))
    with suppress(CheckpointError):
        page, _ = write_report(run)
        assert page.read_text().rstrip().endswith("</html>")


def test_page_that_cannot_be_written_can_go_elsewhere(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [2.0, 1.0])
    with (
        patch("hymba_tune.report.page.write_text", side_effect=OSError(errno.EROFS, "Read-only file system")),
        pytest.raises(ConfigError, match=r"report\.html cannot be written: Read-only file system\.\n.*another --out"),
    ):
        write_report(run)
    page, _ = write_report(run, tmp_path / "page.html")
    assert "Training loss" in page.read_text()
    with pytest.raises(ConfigError, match=r"page\.html exists"):
        write_report(run, tmp_path / "page.html")
    write_report(run, tmp_path / "page.html", overwrite=True)
    assert not (run / "report.html").exists()


def test_run_whose_loss_is_not_finite_is_set_aside(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "one", [3.0], [4.0, float("nan")]),
        write_run(tmp_path / "two", [3.0], [4.0, 1.5]),
        write_run(tmp_path / "three", [3.0], [4.0, 2.0]),
    ]
    write_comparison(runs, tmp_path / "compare.html")
    page = (tmp_path / "compare.html").read_text()
    assert "B is best, with the lowest held-out loss: B 1.500, C 2.000" in page
    assert "The losses of A are not finite." in page
    write_comparison([runs[0], runs[0]], tmp_path / "none.html")
    assert "None of these runs ended with a finite loss." in (tmp_path / "none.html").read_text()
