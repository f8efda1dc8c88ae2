"""Runs of distillation from settings to a finished directory."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hymba_tune.config import DistillConfig
from hymba_tune.errors import ConfigError
from hymba_tune.files import WHOLE
from hymba_tune.plan import plan
from hymba_tune.train.resuming import resume_config
from hymba_tune.train.run import Run
from hymba_tune.train.screen import Screen
from tests.distill.runs import run, settings
from tests.distill.teachers import random_model, save_teacher
from tests.runs import same_tensors, tensors

KINDS: dict[str, dict[str, Any]] = {
    "packed": {"packing": True, "loss": ["projection", "alm=0.5"]},
    "stages": {"stages": ["0.4", "0.6:on-policy=0.6,loss=kl"], "teacher": "alike", "grad_accum": 2},
    "hidden": {"loss": ["kl"], "match_hidden": "cosine", "teacher": "alike", "packing": True},
    "online": {"loss": ["jsd"], "online": True, "method": "full", "teacher": "alike"},
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def alike(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with the student's tokenizer."""
    folder = tmp_path_factory.mktemp("alike")
    random_model("llama", 4096).save_pretrained(folder)
    for file in small_model.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture
def configure(
    small_model: Path, teacher: Path, alike: Path, questions: Path, tmp_path: Path
) -> Callable[..., DistillConfig]:
    def make(out: str = "out", **changes: Any) -> DistillConfig:
        chosen = alike if changes.get("teacher") == "alike" else teacher
        changes = {"answer_tokens": 5} | {name: value for name, value in changes.items() if name != "teacher"}
        return settings(small_model, chosen, questions, tmp_path / out, **changes)

    return make


def test_run_measures_the_data_and_the_teacher(configure: Callable[..., DistillConfig]) -> None:
    lines: dict[str, str] = {}

    class Reading(Screen):
        def banner(self, given: dict[str, str]) -> None:
            lines.update(given)

    finished = run(configure(steps=12, eval_every=6, lr=2e-2), Reading())
    assert (finished.adapter / "adapter_model.safetensors").is_file()
    first, *_, last = finished.evaluations()
    assert last.eval_loss is not None
    assert first.eval_loss is not None
    assert last.eval_loss < first.eval_loss
    assert last.more["eval_distillation"] < first.more["eval_distillation"]
    assert last.more.keys() == {"eval_distillation", "eval_bits_per_byte"}
    trained = next(row for row in finished.rows() if row.loss is not None)
    assert trained.more.keys() == {"cross_entropy", "distillation"}
    assert lines["aligned"] == "24 of 24 rows byte for byte"
    assert lines["loss"] == "0.7 × (projection + alm) + 0.3 × ce"
    assert finished.facts()["described"] == {
        name: lines[name] for name in ("teacher", "aligned", "sanity", "p(end)", "loss")
    }
    assert "trained by hymba-tune distill" in (finished.path / "README.md").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_equals_uninterrupted(kind: str, configure: Callable[..., DistillConfig], tmp_path: Path) -> None:
    whole = run(configure("whole", **({"steps": 5, "save_every": 3, "eval_every": 3} | KINDS[kind])))
    killed = Path(shutil.copytree(whole.path, tmp_path / "killed"))
    for folder in ("adapter", "model"):
        shutil.rmtree(killed / folder, ignore_errors=True)
    (killed / "checkpoints/checkpoint-5" / WHOLE).unlink()
    assert Run(killed).last_checkpoint().name == "checkpoint-3"
    finished = run(resume_config(DistillConfig(resume=killed)))
    result = "model" if whole.model.is_dir() else "adapter"
    assert same_tensors(finished.path / result, whole.path / result)
    logged = [[(row.step, row.loss, row.eval_loss, row.more) for row in one.rows()] for one in (finished, whole)]
    assert logged[0] == logged[1]


def test_projections_of_hidden_states_are_no_part_of_the_result(configure: Callable[..., DistillConfig]) -> None:
    finished = run(configure(teacher="alike", loss=["ce"], match_hidden="mse", steps=8, eval_every=4, match_weight=0.2))
    first, *_, last = finished.evaluations()
    assert last.more["eval_hidden_states"] < first.more["eval_hidden_states"]
    assert last.more.keys() == {"eval_hidden_states", "eval_bits_per_byte"}
    assert not [name for name in tensors(finished.adapter) if "maps" in name]
    groups = finished.facts()["optimizer"]["groups"]
    assert groups[-1]["name"] == "projections of hidden states"
    assert groups[-1]["parameters"] == 3 * 32 * 24


def test_memory_of_an_online_teacher_is_estimated(configure: Callable[..., DistillConfig], teacher: Path) -> None:
    size = sum(tensor.nbytes for tensor in tensors(teacher).values())
    assert plan(configure(online=True)).parts.extra_bytes == size
    assert plan(configure()).parts.extra_bytes == 0
    parts = [run(configure(str(online), online=online)).facts()["memory"]["parts"] for online in (True, False)]
    assert parts[0]["extra_bytes"] - parts[1]["extra_bytes"] == size


def test_memory_of_the_hidden_state_loss_is_estimated(configure: Callable[..., DistillConfig], alike: Path) -> None:
    """The states of a batch of 4 × 64 tokens, both sides' for the gradients, and 3 maps with theirs and moments."""
    kept = sum(tensor.nbytes for tensor in tensors(alike).values())
    states, maps = 256 * (3 * 24 * 4 + 3 * 4 * (32 + 2 * 24)), 3 * 32 * 24 * 16
    assert plan(configure(teacher="alike", loss=["ce"], match_hidden="mse")).parts.extra_bytes == kept + states + maps


def test_quantized_student_learns_the_same_from_targets_as_from_the_teacher(
    configure: Callable[..., DistillConfig],
) -> None:
    losses = []
    for online in (False, True):
        finished = run(configure(str(online), quantize="int8", online=online))
        assert finished.facts()["quantized"] == "int8"
        losses.append([row.loss for row in finished.rows() if row.loss is not None])
    assert len(losses[0]) == 2
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)  # sixteen bits a probability


def test_dry_run_leaves_nothing(configure: Callable[..., DistillConfig]) -> None:
    config = configure(dry_run=True, loss=["alm"])
    run(config)
    assert config.out is not None
    assert not config.out.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": ["kl"]}, r"--loss kl compares the same tokens on both sides(.|\n)*--loss auto"),
        ({"match_hidden": "mse"}, r"--match-hidden compares the same(.|\n)*--loss auto without --match-hidden"),
        ({"teacher_end": "<nothing>"}, "The teacher's tokenizer has no token '<nothing>' to end an answer with"),
    ],
)
def test_teacher_that_does_not_fit_the_losses_is_refused(
    changes: dict[str, Any], message: str, configure: Callable[..., DistillConfig]
) -> None:
    config = configure(**changes)
    with pytest.raises(ConfigError, match=message):
        run(config)
    assert config.out is not None
    assert not config.out.exists()


def test_missing_teacher_is_an_error(configure: Callable[..., DistillConfig]) -> None:
    with pytest.raises(ConfigError, match="--teacher is missing"):
        run(configure().model_copy(update={"teacher": ""}))
