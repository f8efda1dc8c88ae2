"""What every test shares."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test may depend on the network
# Read when torch is imported: tensors of a few hundred elements take longer to hand to threads than to compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

from tests.browser import Browser, find, launched

# Read when Triton is imported: without a GPU its kernels are interpreted, slowly and exactly.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

ROOT = Path(__file__).parent.parent

# A machine that decides over a change tries the same examples each time; new ones are found where people work.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI") == "true":
    settings.load_profile("ci")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Encoded data goes to a cache of the session's own, that of its child processes too."""
    users = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    with pytest.MonkeyPatch.context() as patch:
        if "MPLCONFIGDIR" not in os.environ:
            patch.setenv("MPLCONFIGDIR", str(users / "matplotlib"))  # its list of fonts takes seconds to make
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """Optional reference data; what needs it is skipped where it is absent."""
    folder = Path(os.environ.get("HYMBA_TUNE_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"needs the reference data; {folder} is not a folder (set HYMBA_TUNE_SHARED)")
    return folder


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The CUDA graphs that a test captures, which are recorded and replayed on the CPU."""
    from tests.recorded import recorded_graphs

    return recorded_graphs(monkeypatch)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small random model with the packaged tokenizer. To be left as it is."""
    from tests.runs import save_model  # slow to import, and not every session needs it

    return save_model(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="session")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a model like `small_model`, wide enough to be quantized to 4 bits. To be left as it is."""
    from tests.runs import WIDE, save_model

    return save_model(tmp_path_factory.mktemp("models") / "wide", **WIDE)


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of conversations."""
    from tests.runs import save_questions

    return save_questions(tmp_path_factory.mktemp("data") / "questions.jsonl")


@pytest.fixture(scope="session")
def finished_run(small_model: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a LoRA run of 30 steps. To be left as it is."""
    from tests.runs import run, settings

    out = tmp_path_factory.mktemp("runs") / "finished"
    config = settings(small_model, questions, out, steps=30, eval_split=0.2, eval_every=10, log_every=5)
    return run(config, report=True).path


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser to look at pages with."""
    program = find()
    if program is None:
        assert os.environ.get("CI") != "true", "no Chromium, with which pages are looked at (apt-get install chromium)"
        pytest.skip("needs Chromium to look at pages with (apt-get install chromium)")
    with launched(program, tmp_path_factory.mktemp("profile")) as running:
        yield running
