"""The tests of transformers and PEFT pass on a small Hymba, except for those in the table of exceptions.

Opt-in, as it downloads the tests and takes a quarter of an hour: ``pytest -m peers tests/peers``, with
``-k TestDecoderModels`` for one group of them.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.peers import compatibility
from tests.peers.exceptions import TABLE
from tests.peers.suite import run_suite

pytestmark = pytest.mark.peers


@pytest.mark.parametrize(("library", "group"), compatibility.GROUPS)
def test_every_test_passes_or_is_in_the_table(library: str, group: str, tmp_path: Path) -> None:
    results = run_suite(library, group, tmp_path)
    compatibility.save(library, group, results)
    failed = {name: result for name, result in results.items() if result.outcome == "failed"}
    assert len(failed) < len(results) / 2, "most tests fail, so the suite itself is broken"

    unexplained = [name for name in failed if not any(entry.covers(name, failed[name]) for entry in TABLE)]
    assert not unexplained, "\n".join(f"{name}: {failed[name].reason}" for name in unexplained)


def test_every_exception_is_still_needed() -> None:
    results = [item for group in compatibility.GROUPS for item in compatibility.saved(*group).items()]
    failed = [(name, result) for name, result in results if result.outcome == "failed"]
    assert [entry for entry in TABLE if not any(entry.covers(*test) for test in failed)] == []


def test_the_document_states_these_results() -> None:
    compatibility.check_document()
