"""Pages as a browser shows them: one headless Chromium for all tests, told what to do through a pipe."""

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
"""Widths of windows, in CSS pixels."""
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
QUIET += ["--disable-component-update", "--disable-sync", "--hide-scrollbars", "--remote-debugging-pipe"]
LOOK = """
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
"""Everything asked of a page at once, as JSON."""


@dataclass(frozen=True)
class Drawn:
    """A plot as it is shown: pixels, words that leave the drawing, and pairs of words that lie on each other."""

    title: str
    alt: str
    width: float
    height: float
    paths: int
    clipped: list[str]
    meet: list[str]
    smallest: float


@dataclass
class Seen:
    """A page as it is shown.

    Attributes:
        text: What can be read.
        plots: Every plot.
        over: Elements that leave the window at its sides.
        width: Of the whole page, pixels.
        complaints: Errors, warnings and refusals of the browser.
        requests: Addresses that the page asked for beside its own.
    """

    text: str
    plots: list[Drawn]
    over: list[str]
    width: int
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


class Browser:
    """A running Chromium. See `launched`."""

    def __init__(self, said: int, heard: int) -> None:
        self._out, self._in, self._heard = said, heard, b""
        self._number, self._session = 0, ""
        self._events: list[dict[str, Any]] = []
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._ask(f"{domain}.enable")

    def look(self, page: Path, width: int = DESK, *, dark: bool = False, picture: Path | None = None) -> Seen:
        """Open a page in a window of some width.

        Args:
            page: An HTML file.
            width: CSS pixels.
            dark: Whether the reader prefers dark pages.
            picture: Where to put a screenshot of the whole page, as PNG.
        """
        self._events.clear()
        self._ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._ask("Emulation.setEmulatedMedia", features=[scheme])
        self._ask("Page.navigate", url=page.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._receive()
        found = self._ask("Runtime.evaluate", expression=LOOK, returnByValue=True)["result"]["value"]
        found["plots"] = [Drawn(**plot) for plot in found["plots"]]
        if picture is not None:
            shot = self._ask("Page.captureScreenshot", captureBeyondViewport=True)
            picture.write_bytes(base64.b64decode(shot["data"]))
        return Seen(**found, complaints=self._complaints(), requests=self._requests(page.resolve().as_uri()))

    def _complaints(self) -> list[str]:
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [json.dumps(event["params"])[:2000] for event in self._events if event["method"] in kinds]

    def _requests(self, own: str) -> list[str]:
        sent = [event["params"] for event in self._events if event["method"] == "Network.requestWillBeSent"]
        return [url for params in sent if (url := params["request"]["url"]) != own and not url.startswith("data:")]

    def _ask(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "result" in answer, answer
                return dict(answer["result"])

    def _receive(self) -> dict[str, Any]:
        """The next message; those that nobody asked for are kept."""
        while b"\0" not in self._heard:
            more = os.read(self._in, 2**16)
            assert more, "the browser has ended"
            self._heard += more
        message, _, self._heard = self._heard.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        if "method" in answer:
            self._events.append(answer)
        return answer


def find() -> str | None:
    """The browser of this machine."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextmanager
def launched(program: str, profile: Path) -> Iterator[Browser]:
    """Chromium with an empty profile, ended afterwards."""
    # It reads what it is told at descriptor 3 and answers at 4; the shell puts them there.
    (read, said), (heard, write) = _pipe(), _pipe()
    words = ["bash", "-c", f'exec "$@" 3<&{read} 4>&{write}', "bash", program, *QUIET, f"--user-data-dir={profile}"]
    process = subprocess.Popen(words, pass_fds=(read, write), stderr=subprocess.DEVNULL)
    os.close(read)
    os.close(write)
    try:
        yield Browser(said, heard)
    finally:
        process.terminate()
        process.wait()
        os.close(said)
        os.close(heard)


def _pipe() -> tuple[int, int]:
    """A pipe whose ends lie out of the way of the first descriptors."""
    ends = os.pipe()
    far = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return far[0], far[1]
