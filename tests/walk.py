"""Pages that are run as a reader copies them: every ```bash block, line by line, in one shell, and what it prints.

A ```text block shows the output of the ```bash block before it. It is compared line by line, by these rules:

- ``…`` in a line stands for any text, and as a line by itself for any lines.
- Decimal numbers, numbers with a unit of time, memory or speed, and the numbers of a run's table, but its steps, differ
  between machines: each stands for any number, with any unit.
- Spaces count as one. Progress, which a terminal removes when it ends, is left out.

A line that is to fail ends with the comment ``# exit code N``.

``python -m tests.walk docs/tutorial.md`` runs a page, writes new outputs into it where they differ or nothing but ``…``
is shown, and prints the difference of others with ``…``, which are written by hand.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

PORT = "8000"
"""The port that pages name; a walk takes a free one."""
TIMEOUT = 3600
PROGRESS = re.compile(r"^ (?:.* · \d+ s|loading torch and transformers)$|^\[\d+\][ +-]")
STEP = re.compile(r"^(\d+/\d+)(?= )(.*)$")
UNIT = r"\s(?:s|min|h|B|KB|MB|GB|tok/s|threads?)\b"
DECIMALS = r"\.\d+(?:e[+-]\d+)?"
NUMBER = re.compile(rf"(?:< )?\d[\d,]*(?:{DECIMALS})?(?:{UNIT})?")
VARIES = re.compile(rf"(?:< )?\d[\d,]*(?:{DECIMALS}(?:{UNIT})?|{UNIT})")
SHELL = (
    """set -m; trap 'echo "$LINENO $?" >> {folder}/failures' ERR; trap 'kill $(jobs -p) 2>/dev/null || true' EXIT; """
)


@dataclass
class Block:
    """A fenced block of a page.

    Attributes:
        language: The word after the fence.
        line: Number of the opening fence's line, from 1.
        lines: What is inside.
    """

    language: str
    line: int
    lines: list[str] = field(default_factory=list)


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    block: Block | None = None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if block is None and line.startswith("```"):
            block = Block(line[3:].strip(), number)
        elif block is not None and line == "```":
            yield block
            block = None
        elif block is not None:
            block.lines.append(line)


def commands(block: Block) -> Iterator[list[str]]:
    """The words of every command of hymba-tune in a block, without what the shell reads."""
    for line in "\n".join(block.lines).replace("\\\n", " ").splitlines():
        if "hymba-tune " not in line:
            continue
        reader = shlex.shlex(line, posix=True, punctuation_chars="();<>|&")
        reader.whitespace_split = True
        words: list[str] = []
        for word in [*reader, ";"]:
            if set(word) <= set("();<>|&"):
                if words[:1] == ["hymba-tune"]:
                    yield words[1:]
                words = []
            elif words or not re.match(r"\w+=", word):
                words.append(word)


def walk(page: Path, folder: Path, changes: Mapping[str, str] | None = None) -> dict[int, list[str]]:
    """Run every ```bash block of a page, in order and in one shell.

    Args:
        page: The page.
        folder: Where the shell starts; an empty folder.
        changes: Texts of commands to replace, for a shorter run; each occurs once.

    Returns:
        The lines that each block printed, by the line of its fence.

    Raises:
        AssertionError: If a line failed that should not, or a line did not fail that should.
    """
    notes = folder.with_name(f"{folder.name}-printed")
    notes.mkdir()
    script = [SHELL.format(folder=shlex.quote(str(notes)))]
    script += [""] * len(page.read_text(encoding="utf-8").splitlines())
    shells = [block for block in blocks(page) if block.language == "bash"]
    for block in shells:
        script[block.line - 1] += f"exec > {shlex.quote(str(notes / str(block.line)))} 2>&1"
        script[block.line : block.line + len(block.lines)] = block.lines

    port = _free_port()
    text = re.sub(rf"\b{PORT}\b", port, "\n".join(script))
    for old, new in (changes or {}).items():
        assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times in {page.name}"
        text = text.replace(old, new)
    here = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    usual = {"PATH": here, "COLUMNS": "80", "TERM": "dumb"}
    subprocess.run(
        ["bash", "-c", text], cwd=folder, env=os.environ | usual, stdin=subprocess.DEVNULL, timeout=TIMEOUT, check=False
    )
    printed = {block.line: (notes / str(block.line)).read_text(encoding="utf-8") for block in shells}
    printed = {line: output.replace(port, PORT).replace(str(folder), "…") for line, output in printed.items()}
    _check_failures(page, notes / "failures", printed)
    return {line: _kept(output) for line, output in printed.items()}


def differences(page: Path, printed: Mapping[int, list[str]]) -> Iterator[tuple[Block, str]]:
    """The ```text blocks of a page that do not show what was printed, each with the difference."""
    before: Block | None = None
    for block in blocks(page):
        if block.language == "text" and before is not None and before.language == "bash":
            output = printed[before.line]
            if not _pattern(block.lines).fullmatch("".join(f"{_masked(line)}\n" for line in output)):
                names = (f"{page.name}, line {block.line}", "printed")
                shown = [line.rstrip() for line in block.lines]
                yield block, "\n".join(difflib.unified_diff(shown, output, *names, lineterm="", n=1))
        before = block


def _check_failures(page: Path, failures: Path, printed: Mapping[int, str]) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    expected = {
        number: int(found[1])
        for number, line in enumerate(lines, 1)
        if (found := re.search(r"# exit code (\d+)$", line))
    }
    pairs = (line.split() for line in failures.read_text().splitlines()) if failures.exists() else ()
    failed = {int(number): int(code) for number, code in pairs}
    shown = "".join(f"{lines[line]}\n{output}\n" for line, output in printed.items())
    assert failed == expected, f"exit codes by the line of {page.name}: {failed}, expected {expected}\n{shown}"


def _kept(output: str) -> list[str]:
    lines = [line.rstrip() for line in output.splitlines()]
    return "\n".join(line for line in lines if not PROGRESS.match(line)).strip("\n").splitlines()


def _masked(line: str) -> str:
    line = " ".join(line.split())
    if step := STEP.match(line):
        line = step[1] + NUMBER.sub("#", step[2].replace(" ▲", "").replace(" ▼", ""))
    return VARIES.sub("#", line)


def _pattern(shown: list[str]) -> re.Pattern[str]:
    parts = []
    for line in shown:
        if line.strip() == "…":
            parts.append(r"(?:.*\n)*?")
        else:
            parts.append(".*".join(re.escape(part) for part in _masked(line).split("…")) + r"\n")
    return re.compile("".join(parts))


def _free_port() -> str:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return str(listening.getsockname()[1])


def main(page: Path) -> None:
    """Run a page and refresh its outputs."""
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace("```text\n…\n```", "```text\n```"), encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        (work := Path(folder, "work")).mkdir()
        printed = walk(page, work)
    lines = page.read_text(encoding="utf-8").splitlines()
    for block, difference in reversed(list(differences(page, printed))):
        sys.stdout.write(f"{difference}\n")
        if not any("…" in line for line in block.lines):
            output = printed[max(line for line in printed if line < block.line)]
            lines[block.line : block.line + len(block.lines)] = output
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
