"""Runs the tests of another library on a small Hymba, or on a control, in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import LlamaConfig, LlamaForCausalLM

from hymba_tune.checkpoint import load_tokenizer
from hymba_tune.registry import resolve_model
from tests.peers.sources import helpers_of, tests_of
from tests.runs import SMALL, save_model
from tests.tiny import CONFIG

SUITES = Path(__file__).parent / "suites"
LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "pad_token_id": 0,
}
SMALL_CONFIGS: dict[str, dict[str, Any]] = {
    "hymba": CONFIG | {"num_hidden_layers": 2, "kv_reuse_group": None, "global_attn_idx": [0]},
    "llama": LLAMA,
}


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


def run_suite(
    library: str, group: str, folder: Path, *, model: str = "hymba", only: Sequence[str] = ()
) -> dict[str, Result]:
    """Run a group of the tests of a library.

    Args:
        library: "transformers" or "peft".
        group: The class of the tests.
        folder: An existing, empty folder to work in.
        model: The model to test: "hymba", or the control "llama".
        only: The names of the tests to run; all tests of the group if it is empty.

    Returns:
        The result of each test, by its name.
    """
    for file in SUITES.glob("*.py"):
        shutil.copyfile(file, folder / file.name)
    (folder / "settings.json").write_text(json.dumps({"model": model, "config": SMALL_CONFIGS[model]}))
    (folder / "pytest.ini").write_text("[pytest]\n")
    if library == "peft":
        _save(model, folder / model)

    suite = f"{library}_suite.py::{group}"
    paths = [folder, tests_of(library), *helpers_of(library)]
    command = [sys.executable, "-m", "pytest", "-c", "pytest.ini", "--rootdir", ".", "-p", "no:cacheprovider"]
    command += ["-p", "peers_plugin", "-q", "--tb=line", "-W", "ignore"]
    done = subprocess.run(
        [*command, *(f"{suite}::{name}" for name in only)] if only else [*command, suite],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr  # others mean that the tests did not run
    results: dict[str, dict[str, str]] = json.loads((folder / "results.json").read_text())
    return {name: Result(**result) for name, result in results.items()}


def _save(model: str, folder: Path) -> None:
    """Save a model that reads the packaged tokenizer."""
    if model == "hymba":
        save_model(folder)
        return
    LlamaForCausalLM(
        LlamaConfig(**LLAMA | {name: SMALL[name] for name in ("vocab_size", "pad_token_id")})
    ).save_pretrained(folder)
    load_tokenizer(resolve_model("hymba-nano").folder).save_pretrained(folder)
