"""The server under abuse: many clients at once send ordinary and hostile requests to hymba-nano.

Every response is compared with the one that is right: an ordinary chat must get the greedy answer that it gets alone,
or 429. Counts server errors (5xx), requests without a response in time (hung) and wrong responses; measures latency and
the server's resident memory. At the end the server gets SIGTERM while streams are open.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console

CONSOLE = Console(markup=False, highlight=False, soft_wrap=True)
TIMEOUT = 120
"""Seconds after which a request is hung."""
BLOCKS = 5
"""Number of times that the memory is read while the requests are sent."""
QUESTIONS = ("Hi", "How many legs have three cats?", "What is 7 + 5?", "Name a color.")
TOKENS = 8
NOTHING = 0
"""The status of a connection that the server closes without a response."""


@dataclass
class Tally:
    """What happened so far."""

    expected: dict[str, str]
    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    hung: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    health: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Client:
    """One connection a request."""

    host: str
    port: int

    async def send(self, data: bytes, *, half_close: bool = False, abandon: float | None = None) -> tuple[int, bytes]:
        """Send bytes, and return the status and the body of the response; with ``abandon``, leave after so long."""
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            writer.write(data)
            await writer.drain()
            if abandon is not None:
                await asyncio.sleep(abandon)
                return NOTHING, b""
            if half_close:
                writer.write_eof()
            response = await reader.read(-1)
        finally:
            writer.close()
        while response.startswith(b"HTTP/1.1 100 "):
            response = response.partition(b"\r\n\r\n")[2]
        status = int(response.split(b" ", 2)[1]) if response else NOTHING
        return status, response.partition(b"\r\n\r\n")[2]


def chat(**fields: Any) -> bytes:
    """A chat request; fields replace the usual ones."""
    usual = {"model": "hymba-nano", "max_tokens": TOKENS, "temperature": 0}
    return post("/v1/chat/completions", json.dumps({**usual, **ask(QUESTIONS[0]), **fields}).encode())


def post(path: str, body: bytes, content_type: str = "application/json") -> bytes:
    """A request that closes the connection after its response."""
    lines = (f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Type: {content_type}", "Connection: close")
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


def ask(question: str) -> dict[str, Any]:
    """The messages of a chat with one question."""
    return {"messages": [{"role": "user", "content": question}]}


def answered(body: bytes) -> str:
    """The text of a whole or a streamed chat response."""
    if b"data: " not in body:
        return str(json.loads(body)["choices"][0]["message"]["content"])
    events = [line[6:] for line in body.split(b"\n") if line.startswith(b"data: ")]
    if events[-1].strip() != b"[DONE]":
        raise ValueError("the stream has no end")
    deltas = [choice["delta"] for event in events[:-1] for choice in json.loads(event)["choices"]]
    return "".join(delta.get("content", "") for delta in deltas)


Kind = tuple[int, tuple[int, ...], Callable[[Client, random.Random], Awaitable[tuple[int, bytes]]], bool]
"""Share in percent, right statuses, how a client behaves, and whether the greedy answer is expected."""
OK, BAD = (200, 429), (400,)


def kinds() -> dict[str, Kind]:
    """What clients send."""
    huge = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
    surrogate = post("/v1/completions", b'{"model": "hymba-nano", "prompt": "\\ud800"}')
    plain = json.dumps({"model": "hymba-nano", "max_tokens": TOKENS, "temperature": 0, **ask(QUESTIONS[0])}).encode()
    long: dict[str, Any] = {"max_tokens": 400, "temperature": 9}
    nulls = dict.fromkeys(("top_p", "n", "seed", "stop", "stream", "logprobs", "user", "max_completion_tokens"))
    return {
        "chat": (30, OK, lambda c, r: c.send(chat(**ask(r.choice(QUESTIONS)))), True),
        "stream": (15, OK, lambda c, r: c.send(chat(**ask(r.choice(QUESTIONS)), stream=True)), True),
        "temperature 1e-45": (5, OK, lambda c, r: c.send(chat(**ask(r.choice(QUESTIONS)), temperature=1e-45)), True),
        "top_p 1e-300": (5, OK, lambda c, _: c.send(chat(temperature=1, top_p=1e-300, stream=True)), True),
        "null parameters": (4, OK, lambda c, _: c.send(chat(**nulls)), True),
        "APPLICATION/JSON": (2, OK, lambda c, _: c.send(post("/v1/chat/completions", plain, "APPLICATION/JSON")), True),
        "half-closed": (4, OK, lambda c, _: c.send(chat(), half_close=True), True),
        "distinct text": (8, OK, lambda c, r: c.send(chat(**ask(str(r.random()) * 4), max_tokens=1)), False),
        "abandoned stream": (6, (NOTHING,), lambda c, r: c.send(chat(**long, stream=True), abandon=r.random()), False),
        "abandoned answer": (4, (NOTHING,), lambda c, r: c.send(chat(**long), abandon=r.random() / 4), False),
        "abandoned body": (2, (NOTHING,), lambda c, _: c.send(chat()[:-5], abandon=0), False),
        "lone surrogate": (3, (*BAD, 429), lambda c, _: c.send(surrogate), False),
        "max_tokens 0": (2, (*BAD, 429), lambda c, _: c.send(chat(max_tokens=0)), False),
        "garbage": (2, BAD, lambda c, _: c.send(b"\0\xff garbage\r\n\r\n"), False),
        "deep JSON": (2, (*BAD, 429), lambda c, _: c.send(post("/v1/completions", b"[" * 100_000)), False),
        "5 MB body": (2, (413,), lambda c, _: c.send(post("/v1/completions", b"a" * 5_000_000)), False),
        "5,001 messages": (1, (*BAD, 429), lambda c, _: c.send(chat(messages=[*huge * 2500, huge[0]])), False),
        "901 messages": (1, (*BAD, 429), lambda c, _: c.send(chat(messages=[*huge * 450, huge[0]])), False),
        "500 kB text": (1, (*BAD, 429), lambda c, _: c.send(chat(**ask("a b " * 125_000))), False),
        "idle": (1, (NOTHING,), lambda c, _: c.send(b"POST /v1/chat"), False),
    }  # fmt: skip


async def attempt(client: Client, name: str, kind: Kind, chance: random.Random, tally: Tally) -> None:
    """Send one request and judge its response."""
    _, right, send, greedy = kind
    question = random.Random()
    question.setstate(chance.getstate())  # the sender draws its question from the same state
    text = question.choice(QUESTIONS) if name in ("chat", "stream", "temperature 1e-45") else QUESTIONS[0]
    start = time.perf_counter()
    try:
        status, body = await asyncio.wait_for(send(client, chance), TIMEOUT)
    except TimeoutError:
        tally.hung[name] += 1
        return
    except OSError as error:
        tally.wrong.append(f"{name}: {error}")
        return

    tally.statuses[name, status] += 1
    if status not in right:
        tally.wrong.append(f"{name}: {status} {body[:200]!r}")
    elif status == 200 and greedy:
        tally.seconds.append(time.perf_counter() - start)
        try:
            answer = answered(body)
        except (ValueError, KeyError) as error:
            tally.wrong.append(f"{name}: {error}")
        else:
            if answer != tally.expected[text]:
                tally.wrong.append(f"{name}: {answer!r}")
    if status == 429:
        await asyncio.sleep(0.2)


async def ping(client: Client, tally: Tally) -> None:
    """Measure how long the server takes to say that it lives."""
    while True:
        start = time.perf_counter()
        await client.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        tally.health.append(time.perf_counter() - start)
        await asyncio.sleep(0.1)


async def abuse(client: Client, pid: int, options: argparse.Namespace) -> Tally:
    """Send all requests, and print the memory after each block of them."""
    expected = {}
    for question in QUESTIONS:
        status, body = await client.send(chat(**ask(question)))
        assert status == 200, body
        expected[question] = answered(body)
    tally = Tally(expected)
    chance = random.Random(options.seed)
    table = kinds()
    sent = options.only or list(table)
    names = chance.choices(sent, [table[name][0] for name in sent], k=options.requests)
    CONSOLE.print(f"before {memory(pid):>8} MB resident")
    pinging = asyncio.create_task(ping(client, tally))
    for block in range(BLOCKS):
        rest = names[block::BLOCKS]

        async def visit(rest: list[str] = rest) -> None:
            while rest:
                name = rest.pop()
                await attempt(client, name, table[name], random.Random(chance.random()), tally)

        await asyncio.gather(*(visit() for _ in range(options.clients)))
        CONSOLE.print(f"after {(block + 1) * options.requests // BLOCKS:>6,} {memory(pid):>5} MB")
    pinging.cancel()
    return tally


async def stop(client: Client, process: subprocess.Popen[str]) -> Counter[str]:
    """Send SIGTERM while streams are open, and count how they end."""
    streams = [asyncio.create_task(client.send(chat(stream=True, max_tokens=900, temperature=9))) for _ in range(8)]
    await asyncio.sleep(1)
    process.send_signal(signal.SIGTERM)
    ends: Counter[str] = Counter()
    for _, body in await asyncio.gather(*streams):
        ends["[DONE]" if b"[DONE]" in body else "error event" if b'data: {"error"' in body else "cut"] += 1
    process.wait(TIMEOUT)
    return ends


def memory(pid: int) -> int:
    """The resident memory of a process in MB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) // 1024


def show(tally: Tally) -> None:
    """Print the counts and the percentiles."""
    for name in kinds():
        counts = {status or "none": n for (own, status), n in sorted(tally.statuses.items()) if own == name}
        CONSOLE.print(f"{name:<20} {counts}" + (f" hung {tally.hung[name]}" if tally.hung[name] else ""))
    errors = sum(n for (_, status), n in tally.statuses.items() if status >= 500)
    total, hung = tally.statuses.total(), tally.hung.total()
    CONSOLE.print(f"responses {total:,}, 5xx {errors}, hung {hung}, wrong {len(tally.wrong)}")
    for what, seconds in (("answers", tally.seconds), ("/health", tally.health)):
        if len(seconds) < 2:
            continue
        cuts = quantiles(seconds, n=100)
        CONSOLE.print(f"{what}: {len(seconds):,}; p50 {cuts[49]:.2f} s, p95 {cuts[94]:.2f} s, p99 {cuts[98]:.2f} s")
    for line in tally.wrong[:10]:
        CONSOLE.print("wrong:", line)


def main() -> None:
    """Start a server, abuse it, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=kinds(), action="append", help="send these requests only")
    options = parser.parse_args()
    command = [str(Path(sys.executable).with_name("hymba-tune")), "serve", "hymba-nano", "--port", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"COLUMNS": "200", "PYTHONUNBUFFERED": "1"}
    ) as process:
        try:
            assert process.stdout
            url = next(line for line in process.stdout if "http://" in line).split()[-1]
            address = urlsplit(url)
            assert address.hostname
            assert address.port
            client = Client(address.hostname, address.port)
            tally = asyncio.run(abuse(client, process.pid, options))
            show(tally)
            CONSOLE.print("streams at SIGTERM:", dict(asyncio.run(stop(client, process))))
        finally:
            process.kill()


if __name__ == "__main__":
    main()
