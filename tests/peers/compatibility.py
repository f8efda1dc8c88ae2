"""Keeps the results of the peers' tests; ``python -m tests.peers.compatibility`` writes them into the documentation."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib.metadata import version

from tests.conftest import ROOT
from tests.peers.exceptions import KINDS, TABLE
from tests.peers.sources import CACHE
from tests.peers.suite import Result

GROUPS = [
    ("transformers", "PeersModelTest"),
    ("peft", "TestDecoderModels"),
    ("peft", "TestSequenceClassificationModels"),
    ("peft", "TestTokenClassificationModels"),
]
DOCUMENT = ROOT / "docs" / "compatibility.md"
BEGIN, END = "<!-- written by python -m tests.peers.compatibility: begin -->\n", "<!-- end -->\n"
TITLES = {
    "PeersModelTest": "common tests of models",
    "TestDecoderModels": "decoders",
    "TestSequenceClassificationModels": "classifiers of texts",
    "TestTokenClassificationModels": "classifiers of tokens",
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
    for kind, title in KINDS.items():
        reasons = dict.fromkeys(entry.reason for entry in TABLE if entry.kind == kind)
        lines += [f"| {title} | {reason} |" for reason in reasons]
    lines += ["", "| method of PEFT | with Hymba | passing tests |", "|---|---|---|", *_methods()]
    return "\n".join(lines) + "\n"


def _methods() -> Iterator[str]:
    """Yield a row for each method of PEFT: it works unless its training fails."""
    by_method: dict[str, list[tuple[str, str, Result]]] = {}
    for library, group in GROUPS:
        for name, result in saved(library, group).items():
            if result.method and result.outcome != "skipped":
                by_method.setdefault(result.method, []).append((group, name, result))
    for method, tests in sorted(by_method.items()):
        failed = [(group, name) for group, name, result in tests if result.outcome == "failed"]
        entries = dict.fromkeys(entry for entry in TABLE for test in failed if entry.covers(*test))
        trains = not any(name.startswith("test_training_decoders[") for _, name in failed)
        reasons = "; ".join(dict.fromkeys(entry.reason for entry in entries))
        verdict = "refused" if not trains else "works, except" if failed else "works"
        passed = len(tests) - len(failed)
        yield f"| {method} | {verdict}{': ' if reasons else ''}{reasons} | {passed} of {len(tests)} |"


def check_document() -> None:
    """Check that the documentation has the tables of the kept results."""
    assert section() in DOCUMENT.read_text(encoding="utf-8"), "python -m tests.peers.compatibility writes them"


if __name__ == "__main__":
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    DOCUMENT.write_text(before + BEGIN + section() + END + after, encoding="utf-8")
