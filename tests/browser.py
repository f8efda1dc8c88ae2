"""Rendered pages: one headless Chromium for all tests, controlled through a pipe."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PHONE, DESK = 375, 1280
"""Window widths in CSS pixels."""
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
QUIET += ["--disable-component-update", "--disable-sync", "--hide-scrollbars", "--remote-debugging-pipe"]
FACTS = """
(() => {
  const past = (inner, outer) => inner.right > outer.right + 1 || inner.left < outer.left - 1
    || inner.bottom > outer.bottom + 1 || inner.top < outer.top - 1;
  const box = element => element.getBoundingClientRect();
  const name = element => element.outerHTML.slice(0, 120);
  const page = {left: 0, right: innerWidth, top: -Infinity, bottom: Infinity};
  const over = [...document.body.querySelectorAll('*')]
    .filter(element => !element.closest('.scroll > *') && past(box(element), page)).map(name);
  const plots = [...document.querySelectorAll('figure')].map(figure => {
    const svg = figure.querySelector('svg'), labels = [...svg.querySelectorAll('text')];
    const apart = (a, b) => a.right <= b.left + 1 || b.right <= a.left + 1
      || a.bottom <= b.top + 1 || b.bottom <= a.top + 1;
    const meet = [];
    labels.forEach((one, i) => labels.slice(i + 1).forEach(other => {
      if (!apart(box(one), box(other))) meet.push(one.textContent + ' | ' + other.textContent);
    }));
    return {
      title: figure.querySelector('figcaption').textContent,
      alt: figure.querySelector('[role=img]').getAttribute('aria-label'),
      width: box(svg).width, height: box(svg).height, paths: svg.querySelectorAll('path').length,
      clipped: labels.filter(label => past(box(label), box(svg))).map(label => label.textContent),
      meet: meet, smallest: Math.min(...labels.map(label => box(label).height)),
    };
  });
  return {over: over, plots: plots, text: document.body.innerText, width: document.documentElement.scrollWidth};
})()
"""
"""JavaScript that collects all facts about a page as one JSON object."""


@dataclass(frozen=True)
class Plot:
    """A rendered plot: sizes in pixels, labels that are clipped (``clipped``) and pairs that overlap (``meet``)."""

    title: str
    alt: str
    width: float
    height: float
    paths: int
    clipped: list[str]
    meet: list[str]
    smallest: float


@dataclass
class Page:
    """A rendered page.

    Attributes:
        text: The visible text.
        plots: Every plot.
        over: Elements that extend beyond the sides of the window.
        width: Width of the whole page in pixels.
        complaints: Errors and warnings of the browser.
        requests: Addresses that the page loads, without its own.
    """

    text: str
    plots: list[Plot]
    over: list[str]
    width: int
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


class Browser:
    """A running Chromium. See `launched`."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands = commands
        self._answers = answers
        self._received = b""
        self._number = 0
        self._session = ""
        self._events: list[dict[str, Any]] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def look(self, page: Path, width: int = DESK, *, dark: bool = False, picture: Path | None = None) -> Page:
        """Render a page in a window of some width.

        Args:
            page: An HTML file.
            width: Width of the window in CSS pixels.
            dark: Whether to prefer the dark color scheme.
            picture: Where to save a screenshot of the whole page, as PNG.
        """
        self._events.clear()
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])
        self._call("Page.navigate", url=page.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._receive()
        facts = self._call("Runtime.evaluate", expression=FACTS, returnByValue=True)["result"]["value"]
        facts = json.loads(json.dumps(facts).replace(r"\u00a0", " "))
        facts["plots"] = [Plot(**plot) for plot in facts["plots"]]
        if picture is not None:
            shot = self._call("Page.captureScreenshot", captureBeyondViewport=True)
            picture.write_bytes(base64.b64decode(shot["data"]))
        return Page(**facts, complaints=self._complaints(), requests=self._requests(page.resolve().as_uri()))

    def _complaints(self) -> list[str]:
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [json.dumps(event["params"])[:2000] for event in self._events if event["method"] in kinds]

    def _requests(self, own: str) -> list[str]:
        sent = [event["params"] for event in self._events if event["method"] == "Network.requestWillBeSent"]
        return [url for params in sent if (url := params["request"]["url"]) != own and not url.startswith("data:")]

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "result" in answer, answer
                return dict(answer["result"])

    def _receive(self) -> dict[str, Any]:
        """Read the next message; events are collected."""
        while b"\0" not in self._received:
            more = os.read(self._answers, 2**16)
            assert more, "the browser has ended"
            self._received += more
        message, _, self._received = self._received.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        if "method" in answer:
            self._events.append(answer)
        return answer


def find() -> str | None:
    """The program of an installed browser, or None."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextmanager
def launched(program: str, profile: Path) -> Iterator[Browser]:
    """Run Chromium with an empty profile, and end it afterwards."""
    # Chromium reads commands from descriptor 3 and writes answers to 4; the shell assigns these numbers.
    read, commands = _pipe()
    answers, write = _pipe()
    arguments = ["bash", "-c", f'exec "$@" 3<&{read} 4>&{write}', "bash", program, *QUIET, f"--user-data-dir={profile}"]
    process = subprocess.Popen(arguments, pass_fds=(read, write), stderr=subprocess.DEVNULL)
    os.close(read)
    os.close(write)
    try:
        yield Browser(commands, answers)
    finally:
        process.terminate()
        process.wait()
        os.close(commands)
        os.close(answers)


def _pipe() -> tuple[int, int]:
    """A pipe whose ends have descriptors of at least 10, so that 3 and 4 stay free."""
    ends = os.pipe()
    high = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return high[0], high[1]
