from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from hymba_tune.errors import CheckpointError, ConfigError
from hymba_tune.report import write_comparison, write_report
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
    assert "It got better: held-out loss" in seen.text
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
    rows = re.findall(r"<tr><td>(\w+)</td><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td></tr>", page)
    assert rows == [("rank", "8", "16", "16"), ("lr", "–", "–", "0.1")]


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
    (run / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match="torn cannot be read: Expecting property name"):
        write_report(run)


def test_half_a_line_of_a_killed_run_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "killed", [2.0, 1.0])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "lo')
    assert "Training loss 2.000 nats a token → 1.000" in write_report(run)[1].sentence
