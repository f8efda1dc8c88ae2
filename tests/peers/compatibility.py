"""Keeps the results of the peers' tests; ``python -m tests.peers.compatibility`` writes them into the documentation."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib.metadata import version

from tests.conftest import ROOT
from tests.peers.exceptions import TABLE
from tests.peers.sources import CACHE
from tests.peers.suite import Result

GROUPS = [
    ("transformers", "PeersModelTest"),
    ("peft", "TestDecoderModels"),
    ("peft", "TestSequenceClassificationModels"),
    ("peft", "TestTokenClassificationModels"),
    ("trl", "TestTrainers"),
]
DOCUMENT, README = ROOT / "docs" / "compatibility.md", ROOT / "README.md"
BEGIN, END = "<!-- written by python -m tests.peers.compatibility: begin -->\n", "<!-- end -->\n"
TRAINING = ("test_training_decoders[", "test_forward_with_labels[")
TRAINER = r"\[([\w-]+)\]"
TITLES = {
    "PeersModelTest": "common tests of models",
    "TestDecoderModels": "decoders",
    "TestSequenceClassificationModels": "classifiers of texts",
    "TestTokenClassificationModels": "classifiers of tokens",
    "TestTrainers": "two steps of each trainer (our own tests)",
}


def save(library: str, group: str, results: Mapping[str, Result]) -> None:
    """Keep the results of a group beside the downloaded tests."""
    CACHE.mkdir(parents=True, exist_ok=True)
    rows = {name: result._asdict() for name, result in results.items()}
    (CACHE / f"{library}-{group}.json").write_text(json.dumps(rows, indent=1))


def saved(library: str, group: str) -> dict[str, Result]:
    """Return the results that `save` kept last."""
    path = CACHE / f"{library}-{group}.json"
    assert path.is_file(), f"{group} was not run: pytest -m peers tests/peers -k {group}"
    return {name: Result(**result) for name, result in json.loads(path.read_text()).items()}


def section() -> str:
    """Return the tables of the documentation, in Markdown."""
    lines = ["| tests of | pass | not applicable | skipped by themselves |", "|---|---|---|---|"]
    for library, group in GROUPS:
        counts = Counter(result.outcome for result in saved(library, group).values())
        name = f"{library} {version(library)}, {TITLES[group]}"
        lines.append(f"| {name} | {counts['passed']} | {counts['failed']} | {counts['skipped']} |")
    lines += ["", "Not applicable:", "", "| why | what |", "|---|---|"]
    lines += [f"| {entry.why} | {entry.what} |" for entry in TABLE]
    lines += ["", "| method of PEFT | with Hymba | passing tests |", "|---|---|---|"]
    lines += [f"| {method} | {verdict} | {count} |" for method, verdict, count in _methods()]
    return "\n".join([*lines, "", f"Trainers of TRL: {_trainers()}."]) + "\n"


def summary() -> str:
    """Return the table of the README, in Markdown."""
    common = Counter(result.outcome for result in saved(*GROUPS[0]).values())
    methods = list(_methods())
    works = [re.sub(", (.*)", r" (\1)", method) for method, verdict, _ in methods if verdict.startswith("works")]
    refused = [re.sub(", (.*)", r" (\1)", method) for method, verdict, _ in methods if not verdict.startswith("works")]
    of_transformers = f"{common['passed']} of {common['passed'] + common['failed']} of its common tests of models"
    rows = [
        (f"transformers {version('transformers')}", of_transformers, "`attn_implementation`"),
        (f"PEFT {version('peft')}", ", ".join(works), ", ".join(refused)),
        (f"TRL {version('trl')}", f"trainers: {_trainers()}", ""),
    ]
    lines = ["| with | works | refused or without effect |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def _trainers() -> str:
    passed = [name for name, result in saved("trl", "TestTrainers").items() if result.outcome == "passed"]
    return ", ".join(re.findall(TRAINER, " ".join(passed)))


def _methods() -> Iterator[tuple[str, str, str]]:
    """Yield each method of PEFT, what Hymba does with it, and its passing tests. It is refused if its training is."""
    by_method: dict[str, list[tuple[str, Result]]] = {}
    for group in GROUPS:
        for name, result in saved(*group).items():
            if result.method and result.outcome != "skipped":
                by_method.setdefault(result.method, []).append((name, result))
    for method, tests in sorted(by_method.items()):
        failed = [(name, result) for name, result in tests if result.outcome == "failed"]
        if not any(name.startswith(TRAINING) for name, _ in tests):
            continue  # the tests of this method only expect errors
        refused = any(name.startswith(TRAINING) for name, _ in failed)
        exceptions = [entry.what for entry in TABLE if any(entry.covers(*test) for test in failed)]
        verdict = "; ".join(exceptions) if refused else "; ".join(["works", *(f"but {what}" for what in exceptions)])
        yield method, verdict, f"{len(tests) - len(failed)} of {len(tests)}"


def check_document() -> None:
    """Check that the documentation has the tables of the kept results."""
    for document, tables in ((DOCUMENT, section()), (README, summary())):
        assert tables in document.read_text(encoding="utf-8"), "python -m tests.peers.compatibility writes them"


if __name__ == "__main__":
    for document, tables in ((DOCUMENT, section()), (README, summary())):
        before, _, rest = document.read_text(encoding="utf-8").partition(BEGIN)
        document.write_text(before + BEGIN + tables + END + rest.partition(END)[2], encoding="utf-8")
