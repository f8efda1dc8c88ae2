"""Runs the tests of another library on a small Hymba, in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedModel

from hymba_tune.model import HymbaForSequenceClassification, HymbaForTokenClassification
from tests.peers.sources import tests_of
from tests.runs import save_model
from tests.tiny import CONFIG

SUITES = Path(__file__).parent / "suites"
SMALL_CONFIG = CONFIG | {"num_hidden_layers": 2, "kv_reuse_group": None, "global_attn_idx": [0]}
"""The configuration of the common tests of transformers, which ask for two layers at most."""
HEADS: dict[str, type[PreTrainedModel]] = {
    "TestSequenceClassificationModels": HymbaForSequenceClassification,
    "TestTokenClassificationModels": HymbaForTokenClassification,
}
"""The models of the tests of classifiers, which expect a trained head."""


class Result(NamedTuple):
    """What became of a test of another library.

    Attributes:
        outcome: "passed", "failed" or "skipped".
        reason: The error, or why it was skipped.
        method: The method of PEFT that it is about; empty if it is about none.
    """

    outcome: str
    reason: str
    method: str


def run_suite(library: str, group: str, folder: Path) -> dict[str, Result]:
    """Run a group of the tests of a library.

    Args:
        library: "transformers", "peft" or "trl".
        group: The class of the tests.
        folder: An existing, empty folder to work in.

    Returns:
        The result of each test, by its name.
    """
    for file in SUITES.glob("*.py"):
        shutil.copyfile(file, folder / file.name)
    (folder / "config.json").write_text(json.dumps(SMALL_CONFIG))
    (folder / "pytest.ini").write_text("[pytest]\n")
    save_model(folder / "hymba")
    if group in HEADS:
        classifier = HEADS[group].from_pretrained(folder / "hymba", num_labels=3)
        (folder / "hymba" / "model.safetensors").unlink()  # and not written over while the classifier reads it
        classifier.save_pretrained(folder / "hymba")

    suite = f"{library}_suite.py::{group}"
    paths = [folder, *tests_of(library)]
    command = [sys.executable, "-m", "pytest", "-c", "pytest.ini", "--rootdir", ".", "-p", "no:cacheprovider"]
    command += ["-p", "peers_plugin", "-q", "--tb=line", "-W", "ignore"]
    done = subprocess.run(
        [*command, suite],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr  # others mean that the tests did not run
    results: dict[str, dict[str, str]] = json.loads((folder / "results.json").read_text())
    return {name: Result(**result) for name, result in results.items()}
