"""The common tests of transformers and PEFT pass on a small Hymba, except for those in the table of exceptions.

Opt-in, as it downloads the tests and takes half an hour: ``pytest -m peers tests/peers``, with ``-k TestDecoderModels``
for one group of them.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.peers import compatibility
from tests.peers.exceptions import TABLE, UPSTREAM
from tests.peers.suite import run_suite

pytestmark = pytest.mark.peers


@pytest.mark.parametrize(("library", "group"), compatibility.GROUPS)
def test_every_test_passes_or_is_in_the_table(library: str, group: str, tmp_path: Path) -> None:
    results = run_suite(library, group, tmp_path)
    compatibility.save(library, group, results)
    failed = [name for name, result in results.items() if result.outcome == "failed"]
    assert len(failed) < len(results), "no test passed"

    unexplained = [name for name in failed if not any(entry.covers(group, name) for entry in TABLE)]
    assert not unexplained, "\n".join(f"{name}: {results[name].reason}" for name in unexplained)
    entries = [entry for entry in TABLE if entry.group == group]
    stale = [entry for entry in entries if not any(entry.covers(group, name) for name in failed)]
    assert not stale, "these tests pass by now"


@pytest.mark.parametrize(("library", "group"), compatibility.GROUPS)
def test_faults_of_the_libraries_are_those_of_llama_too(library: str, group: str, tmp_path: Path) -> None:
    results = compatibility.saved(library, group)
    entries = [entry for entry in TABLE if entry.group == group and entry.kind == UPSTREAM]
    names = [name for name, result in results.items() if result.outcome == "failed"]
    names = [name for name in names if any(entry.covers(group, name) for entry in entries)]
    if not names:
        return
    control = run_suite(
        library, group, tmp_path, model="llama", only=[name.replace("hymba", "llama") for name in names]
    )
    passing = [name for name, result in control.items() if result.outcome != "failed"]
    assert not passing, "these faults are Hymba's own"


def test_the_document_states_these_results() -> None:
    compatibility.check_document()
