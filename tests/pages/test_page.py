from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from jinja2 import UndefinedError
from matplotlib.axes import Axes

from hymba_tune.pages import LIGHT, Plot, plot, render
from tests.browser import DESK, PHONE, Browser, Page

TEMPLATE = """
{% extends "base.html.j2" %}
{% from "parts.html.j2" import command, figure, key_figure %}
{% block title %}{{ name }}{% endblock %}
{% block body %}
<h1>{{ name }}</h1>
<ul class="figures">{{ key_figure("loss", "1.234", "nats") }}</ul>
<div class="plots">{% for plot in plots %}{{ figure(plot) }}{% endfor %}</div>
{{ command("again", "hymba-tune sft " ~ "--data x.jsonl " * 40) }}
<pre>{{ "one-very-long-word" * 40 }}</pre>
{% endblock %}
"""


def rising(axes: Axes) -> None:
    axes.plot(range(12), [2**i for i in range(12)], color=LIGHT["first"], label="loss $x$")
    axes.set(xlabel="step", ylabel="nats a token")
    axes.legend()


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A page of a template in another package."""
    (tmp_path / "some_room").mkdir()
    (tmp_path / "some_room" / "__init__.py").touch()
    (tmp_path / "some_room" / "some.html.j2").write_text(TEMPLATE)
    monkeypatch.syspath_prepend(tmp_path)
    plots = [plot(title, f"{title} rises.", rising) for title in ("One", "Two <b>", "Three")]
    (tmp_path / "page.html").write_text(render("some_room", "some.html.j2", name="<script>x()</script>", plots=plots))
    return tmp_path / "page.html"


@pytest.mark.parametrize(("width", "dark"), [(PHONE, False), (DESK, True)])
def test_page_fits_in_a_browser_without_requests_or_errors(
    browser: Browser, page: Path, width: int, dark: bool
) -> None:
    seen = browser.look(page, width, dark=dark)
    assert not seen.complaints
    assert not seen.requests
    assert not seen.over
    assert seen.width == width
    assert "<script>x()</script>" in seen.text
    assert [(plot.title, plot.alt) for plot in seen.plots] == [
        (title, f"{title} rises.") for title in ("One", "Two <b>", "Three")
    ]
    for drawn in seen.plots:
        assert drawn.width > 300
        assert drawn.height > 150
        assert not drawn.clipped
        assert not drawn.meet
        assert drawn.smallest > 9


def test_browser_reports_errors_requests_and_overflow(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(
        '<p style="width: 500px">wide</p><img src="http://localhost:9/x.png"><script>missing()</script>'
    )
    seen: Page = browser.look(tmp_path / "page.html", PHONE)
    assert any("missing is not defined" in complaint for complaint in seen.complaints)
    assert seen.requests == ["http://localhost:9/x.png"]
    assert seen.over
    assert seen.width > PHONE


def test_plot_is_xml_in_the_colors_of_the_page() -> None:
    drawn: Plot = plot("Loss", "It rises.", rising)
    root = ET.fromstring(drawn.svg)
    text = [element.text for element in root.iter("text")]
    assert {"step", "nats a token", "loss $x$"} <= set(text)
    assert "var(--first)" in drawn.svg
    assert not [color for color in LIGHT.values() if color in drawn.svg]
    assert plot("Loss", "It rises.", rising) == drawn


def test_missing_variable_is_an_error(page: Path) -> None:
    assert page.is_file()
    with pytest.raises(UndefinedError, match="'plots' is undefined"):
        render("some_room", "some.html.j2", name="x")
