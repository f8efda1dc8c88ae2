"""The text every Python carries, cleaned: the documentation strings and comments of its standard library."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import io
import re
import sys
import sysconfig
import textwrap
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from pydoc_data.topics import topics
from types import ModuleType
from typing import Any

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef

# Tables, bundled copies, and folders whose comments are mostly notes to self.
SKIPPED_FOLDERS = {"site-packages", "encodings", "idlelib", "idle_test", "pydoc_data", "turtledemo", "__pycache__"}
TEST_FOLDERS = {"test", "tests"}
# Importing these opens a browser or prints a poem.
SKIPPED_MODULES = {"antigravity", "this"}

BOILERPLATE = re.compile(
    r"copyright|licen[cs]e|warrant(y|ies)|all rights reserved|redistribut|permission to use|-\*-|pylint|noqa"
    r"|pragma|type: ignore|\$(id|revision|date)|\S+@\S+\.\w+|\b(written|contributed|maintained|created) by\b",
    re.IGNORECASE,
)
RULER = re.compile(r"^\s*([-=*#~_+^.])\1{3,}\s*$|^\s*[-=*#~]{2,}\s+|\s+[-=*#~]{4,}\s*$", re.MULTILINE)
TYPOGRAPHY = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-", "\u2026": "..."}
)
LIST_ITEM = re.compile(r"^([-*+•o]|\d+[.)]|\([a-z\d]+\)|:\w+|@\w+|\.\.|>>>|\.\.\.|\|)(\s|$|\w*:)")


@dataclass(frozen=True)
class Entry:
    """A documented object, or a comment (which has no name).

    Attributes:
        module: Dotted module name; ``topics.<name>`` for a page of the language reference.
        kind: What is documented.
        name: Qualified name with the module; empty for a comment.
        call: The object with its arguments, ``shutil.copy(src, dst)``; empty where there is none.
        paragraphs: Clean text, at least one paragraph.
    """

    module: str
    kind: str
    name: str
    call: str
    paragraphs: tuple[str, ...]


def read_entries() -> list[Entry]:
    """Everything documented in this Python, in a fixed order, no paragraph twice."""
    entries: list[Entry] = []
    seen: set[str] = set()
    for entry in _all_entries():
        fresh = tuple(dict.fromkeys(p for p in entry.paragraphs if p not in seen))
        seen.update(fresh)
        if fresh:
            entries.append(replace(entry, paragraphs=fresh))
    return entries


def documents(entries: Iterable[Entry], max_chars: int) -> Iterator[tuple[str, str]]:
    """Lay the entries of a module end to end and cut them at paragraphs.

    Args:
        entries: The entries in order; those of one module are neighbors.
        max_chars: A document's length limit; only a paragraph longer than it is longer.

    Yields:
        The module and the document's text.
    """
    module, text = "", ""
    for entry in entries:
        for i, paragraph in enumerate(entry.paragraphs):
            block = f"{entry.call}\n{paragraph}" if i == 0 and entry.call else paragraph
            longer = f"{text}\n\n{block}" if text else block
            if text and (entry.module != module or len(longer) > max_chars):
                yield module, text
                longer = block
            module, text = entry.module, longer
    if text:
        yield module, text


def clean_paragraphs(text: str) -> tuple[str, ...]:
    """Dedent, cut at blank lines, join wrapped lines, and keep prose and doctests, each with the heading above it."""
    text = RULER.sub("", inspect.cleandoc(text.replace("\x0c", "").translate(TYPOGRAPHY).expandtabs()))
    paragraphs = []
    heading = ""
    for block in re.split(r"\n\s*\n", text):
        paragraph = _unwrap(block)
        if _is_readable(paragraph):
            paragraphs.append(f"{heading}{paragraph}")
        heading = f"{paragraph}\n" if _is_heading(paragraph) else ""
    return tuple(paragraphs)


def _unwrap(block: str) -> str:
    lines = [line.rstrip() for line in textwrap.dedent(block).strip("\n").splitlines()]
    wrapped = not any(line[0].isspace() or LIST_ITEM.match(line) for line in lines)
    # Short lines are a list, not a wrapped paragraph.
    if wrapped and all(len(line) > 50 for line in lines[:-1]):
        return re.sub(r"(?<=\S)  +", " ", " ".join(lines))
    return "\n".join(lines)


def _is_heading(block: str) -> bool:
    """Whether a block only names what follows, as ``str.casefold()`` or ``Note:`` does."""
    return bool(re.fullmatch(r"[\w.]+(\(.*\)|:)", block)) and len(block) < 60


def _is_readable(block: str) -> bool:
    if not block.isascii() or BOILERPLATE.search(block) or len(block) > 1400:
        return False
    words = re.findall(r"[A-Za-z]{2,}", block)
    if ">>>" in block:
        return len(words) >= 2
    letters = sum(c.isalpha() or c == " " for c in block)
    return len(words) >= 3 and letters / len(block) > 0.72 and len(re.findall(r"\d+", block)) < len(words)


def _all_entries() -> Iterator[Entry]:
    for name, text in sorted(topics.items()):
        if paragraphs := clean_paragraphs(text):
            yield Entry(f"topics.{name}", "topic", name, "", paragraphs)
    library = Path(sysconfig.get_paths()["stdlib"])
    tests = []
    for path in sorted(library.rglob("*.py")):
        folders = set(path.relative_to(library).parts)
        if folders & SKIPPED_FOLDERS:
            continue
        if folders & TEST_FOLDERS:
            tests.append(path)
        else:
            yield from source_entries(path, _module_name(path.relative_to(library)))
    for name in sorted(sys.stdlib_module_names - SKIPPED_MODULES):
        yield from compiled_entries(name)
    for path in tests:
        # A test's docstring is a title, often of one line: only longer notes are worth reading.
        for entry in source_entries(path, _module_name(path.relative_to(library))):
            notes = tuple(p for p in entry.paragraphs if len(p) > 80)
            if notes:
                yield replace(entry, kind="comment", name="", call="", paragraphs=notes)


def _module_name(path: Path) -> str:
    parts = [part for part in path.with_suffix("").parts if part != "__init__"]
    return _public(".".join(parts))


def _public(module: str) -> str:
    """The name people import: ``_pydecimal`` is ``decimal``, ``_socket`` is ``socket``, ``posix`` is ``os``."""
    return {"posix": "os", "nt": "os"}.get(module, re.sub(r"^_(py)?(?=[a-z])", "", module))


def source_entries(path: Path, module: str) -> Iterator[Entry]:
    """The documentation strings and comments of a source file, in its order."""
    try:
        with tokenize.open(path) as file:
            source = file.read()
        tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError):  # files that test exactly this
        return
    found = [*_docstrings(tree, module), *_comments(source, module)]
    yield from (entry for _, entry in sorted(found, key=lambda pair: pair[0]))


def _docstrings(tree: ast.Module, module: str) -> Iterator[tuple[int, Entry]]:
    if paragraphs := clean_paragraphs(ast.get_docstring(tree) or ""):
        yield 0, Entry(module, "module", module, "", paragraphs)
    stack: list[tuple[str, ast.AST]] = [(module, node) for node in tree.body]
    while stack:
        prefix, node = stack.pop()
        if not isinstance(node, Definition):
            stack += [(prefix, child) for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr)]
            continue
        name = f"{prefix}.{node.name}"
        if paragraphs := clean_paragraphs(ast.get_docstring(node) or ""):
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            yield node.lineno, Entry(module, kind, name, _call(name, node), paragraphs)
        if isinstance(node, ast.ClassDef):
            stack += [(name, child) for child in node.body]


def _call(name: str, node: Definition) -> str:
    if isinstance(node, ast.ClassDef):
        return f"class {name}"
    arguments = re.sub(r"^(self|cls)\b(, /)?(, )?", "", ast.unparse(node.args))
    return f"{name}({arguments})"


def _comments(source: str, module: str) -> Iterator[tuple[int, Entry]]:
    """Comments of several lines or a whole sentence that stand on lines of their own."""
    blocks: dict[int, list[str]] = {}
    start = last = -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or token.line.lstrip()[0] != "#":
            continue
        line = token.start[0]
        if line != last + 1:
            start = line
        blocks.setdefault(start, []).append(token.string.lstrip("#!"))
        last = line
    for line, lines in blocks.items():
        text = textwrap.dedent("\n".join(lines))
        paragraphs = tuple(p for p in clean_paragraphs(text) if _is_sentence(p))
        if paragraphs:
            yield line, Entry(module, "comment", "", "", paragraphs)


def _is_sentence(paragraph: str) -> bool:
    """Whether a comment is more than a label or code that was commented out."""
    letters = sum(c.isalpha() or c == " " for c in paragraph)
    return len(paragraph.split()) >= 8 and letters / len(paragraph) > 0.85 and paragraph[0].isalpha()


def compiled_entries(name: str) -> Iterator[Entry]:
    """The documentation of a module written in C, which only the living objects carry."""
    try:
        spec = importlib.util.find_spec(name)
        if spec is None or (spec.origin or "").endswith((".py", ".pyc")) or spec.origin == "frozen":
            return
        module = importlib.import_module(name)
    except ImportError:  # an optional module this Python was built without
        return
    public = _public(name)
    prefix = "" if name == "builtins" else f"{public}."
    if paragraphs := clean_paragraphs(inspect.getdoc(module) or ""):
        yield Entry(public, "module", public, "", paragraphs)
    for key, value in sorted(vars(module).items()):
        if not isinstance(value, ModuleType):
            yield from _object_entries(public, f"{prefix}{key}", value)


def _object_entries(module: str, name: str, value: Any) -> Iterator[Entry]:
    if not callable(value) or name.rpartition(".")[2].startswith("_"):
        return
    kind = "class" if isinstance(value, type) else "function"
    if paragraphs := clean_paragraphs(getattr(value, "__doc__", None) or ""):
        yield Entry(module, kind, name, _live_call(name, value), paragraphs)
    if kind == "class":
        for key, member in sorted(vars(value).items()):
            if not isinstance(member, type):
                yield from _object_entries(module, f"{name}.{key}", member)


def _live_call(name: str, value: Any) -> str:
    if isinstance(value, type):
        return f"class {name}"
    signature = getattr(value, "__text_signature__", None)
    if signature is None:  # the text itself tells the arguments
        return name
    arguments = re.sub(r"^\$\w+(, /)?(, )?", "", signature[1:-1])
    return f"{name}({arguments})"
