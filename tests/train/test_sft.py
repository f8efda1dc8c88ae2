from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hymba_tune.config import ChatConfig, SFTConfig
from hymba_tune.errors import CheckpointError, ConfigError, DataError, HymbaTuneError, TrainingError
from hymba_tune.generate import Chat
from hymba_tune.model import (
    attention_native,
    convolution_native,
    elementwise_native,
    few_rows_native,
    one_token_native,
    scan_native,
)
from hymba_tune.model.attention import ATTENTION
from hymba_tune.model.backends import OPERATIONS, Task
from hymba_tune.model.layers import HymbaMLP
from hymba_tune.train.screen import Screen
from tests.runs import merge_run, run, same_tensors, settings, tensors


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_run_directory_holds_what_a_run_made(finished_run: Path) -> None:
    names = {path.name for path in finished_run.iterdir()}
    made = {"config.yaml", "run.json", "metrics.jsonl", "samples.json", "dropped.jsonl", "README.md"}
    made |= {"updates.json", "report.html", "held_out.jsonl"}
    assert names - {"log.txt"} == made | {"adapter", "checkpoints"}
    if "log.txt" in names:
        assert (finished_run / "log.txt").read_text()


def test_settings_are_written_in_full(finished_run: Path, small_model: Path, questions: Path) -> None:
    written = yaml.safe_load((finished_run / "config.yaml").read_text())
    assert written.pop("verb") == "sft"
    assert SFTConfig(**written) == settings(
        small_model, questions, finished_run, steps=30, eval_split=0.2, eval_every=10, log_every=5
    ).model_copy(update={"out": None})
    assert written.keys() >= {"rank", "batch_size", "targets", "seed"}


def test_record_says_what_happened(finished_run: Path, small_model: Path) -> None:
    facts = json.loads((finished_run / "run.json").read_text())
    assert facts["model"] == str(small_model)
    assert (facts["steps"], facts["device"], facts["dtype"]) == (30, "cpu", "torch.float32")
    assert facts["data"]["rows"] == facts["data"]["conversations"] == 24
    assert len(facts["data"]["fingerprint"]) == 64
    assert 0 < facts["parameters"]["trainable"] < facts["parameters"]["total"]
    assert facts["tokens_seen"] > facts["data"]["tokens"]
    assert facts["seconds"] > 0
    assert facts["peak_memory_bytes"] > 2**20


def test_metrics_begin_with_the_evaluation_before_training(finished_run: Path) -> None:
    first, *others = rows(finished_run)
    assert first.keys() == {"step", "eval_loss", "memory_bytes"}
    assert first["step"] == 0
    losses, evaluations = [r for r in others if "loss" in r], [r for r in others if "eval_loss" in r]
    assert [row["step"] for row in losses] == [5, 10, 15, 20, 25, 30]
    assert [row["step"] for row in evaluations] == [10, 20, 30]
    keys = {"step", "loss", "learning_rate", "grad_norm", "tokens_per_s", "memory_bytes"}
    assert all(row.keys() == keys for row in losses)
    assert all(value > 0 for row in losses for value in row.values())


def test_held_out_loss_falls(finished_run: Path) -> None:
    evaluations = [row["eval_loss"] for row in rows(finished_run) if "eval_loss" in row]
    assert evaluations[-1] < evaluations[0] / 2


def test_samples_are_answered_before_and_after(finished_run: Path) -> None:
    samples = json.loads((finished_run / "samples.json").read_text())
    assert [sample["prompt"] for sample in samples] == [
        "I see one cats. What do I see?",
        "I see two dogs, as you do. What do I see?",
        "I see three birds, as you do, as you do. What do I see?",
    ]
    for sample in samples:
        assert sample["reference"].startswith("You see")
        assert sample["before"]
        assert sample["after"].startswith("You see") != sample["before"].startswith("You see")


def test_card_says_what_was_trained_and_how_it_did(finished_run: Path, small_model: Path) -> None:
    card = (finished_run / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == str(small_model)
    first, *_, last = [row["eval_loss"] for row in rows(finished_run) if "eval_loss" in row]
    assert f"| before | 0 | {first:.4f} |\n| after | 30 | {last:.4f} |" in card
    assert f"hymba-tune chat {finished_run}" in card


def test_rows_that_were_left_out_are_listed(small_model: Path, questions: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(questions.read_text() + "not JSON\n" + json.dumps({"prompt": "long " * 90, "completion": "x"}))
    finished = run(settings(small_model, data, tmp_path / "out", on_bad_row="skip", max_length=64, eval_split=0))
    dropped = [json.loads(line) for line in (finished.path / "dropped.jsonl").read_text().splitlines()]
    assert [(row["line"], row["reason"]) for row in dropped] == [(25, "bad row"), (26, "too long")]
    counts = finished.facts()["data"]
    assert (counts["rows"], counts["bad_rows"], counts["too_long"]) == (26, 1, 1)


def test_without_held_out_data_nothing_is_evaluated(small_model: Path, questions: Path, tmp_path: Path) -> None:
    finished = run(settings(small_model, questions, tmp_path / "out", eval_split=0))
    assert not list(finished.evaluations())
    assert "held-out" not in (finished.path / "README.md").read_text()


def test_epochs_pass_over_all_rows(small_model: Path, questions: Path, tmp_path: Path) -> None:
    config = settings(small_model, questions, tmp_path / "out", steps=None, epochs=0.5, eval_split=0, grad_accum=2)
    assert run(config).facts()["steps"] == 2  # 24 rows, 4 a batch, 2 batches a step


class Notes(Screen):
    """Remembers what it was shown."""

    def __init__(self) -> None:
        self.lines: dict[str, str] = {}

    def banner(self, lines: dict[str, str]) -> None:
        self.lines = lines


def test_banner_says_what_is_about_to_run(small_model: Path, questions: Path, tmp_path: Path) -> None:
    data, notes = tmp_path / "data.jsonl", Notes()
    data.write_text(questions.read_text() + "not JSON\n")
    changes = {"grad_accum": 2, "max_length": 36, "on_bad_row": "skip"}
    run(settings(small_model, data, tmp_path / "out", **changes), notes)
    lines = notes.lines
    assert "float32 · cpu (" in lines["model"]
    assert lines["trained"].startswith("LoRA r4 on all (7 kinds × 3 layers) + meta tokens · ")
    assert lines["data"].startswith("24 conversations · ")
    assert lines["data"].endswith(f"1 held out · dropped 1 bad row → {tmp_path / 'out/dropped.jsonl'}")
    assert lines["batch"] == "4 × 2 (accumulation) · up to 36 tokens each · 2 steps"
    assert lines["note"].endswith("rows are longer than --max-length and were cut to it")


def test_banner_and_record_name_the_kernels(small_model: Path, questions: Path, tmp_path: Path) -> None:
    notes = Notes()
    finished = run(settings(small_model, questions, tmp_path / "out", kernels=["scan=torch"]), notes)
    assert "scan torch" in notes.lines["kernels"]
    assert f"attention {ATTENTION.choose(Task('cpu', torch.float32)).name}" in notes.lines["kernels"]
    kernels = finished.facts()["kernels"]
    assert kernels["scan"]["taken"] == "torch"
    assert kernels["attention"]["obstacles"]["flex"] == "it runs on cuda, not on cpu"


@pytest.fixture
def _no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A machine without a compiler, on which nothing was compiled before."""
    monkeypatch.setenv("CXX", "/nonexistent/g++")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    modules = attention_native, convolution_native, elementwise_native, few_rows_native, one_token_native, scan_native
    libraries = [module.LIBRARY for module in modules]
    answers = [attention_native.native_unavailable_reason, *(library.load for library in libraries)]
    for answer in answers:
        answer.cache_clear()
    for operation in OPERATIONS.values():
        monkeypatch.setattr(operation, "_choices", {})
    yield
    for answer in answers:
        answer.cache_clear()


@pytest.mark.usefixtures("_no_compiler")
def test_bfloat16_is_trained_without_a_compiler(small_model: Path, questions: Path, tmp_path: Path) -> None:
    finished = run(settings(small_model, questions, tmp_path / "out", dtype="bfloat16", steps=10, eval_split=0.2))
    taken = {name: choice["taken"] for name, choice in finished.facts()["kernels"].items()}
    training = {"scan": "torch", "conv": "torch", "attention": "blocks", "elementwise": "torch"}
    one_token = {
        "attend": "torch",
        "prepare": "separate",
        "update": "separate",
        "gate_up": "separate",
        "linear": "torch",
    }
    assert taken == training | one_token
    first, *_, last = (row["eval_loss"] for row in rows(finished.path) if "eval_loss" in row)
    assert last < first


def test_kernels_that_cannot_be_used_are_refused_before_weights_are_read(
    small_model: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hymba_tune.train.flow.open_model", None)
    for kernels, message in {
        "scan=triton": "the scan backend triton cannot be used: it runs on cuda, not on cpu; .* can.",
        "scan=fast": "scan backend 'fast'; expected one of auto, native, triton",
        "scam=torch": "'scam' has no kernels to choose; expected one of",
    }.items():
        with pytest.raises(ConfigError, match=f"--kernels: {message}"):
            run(settings(small_model, questions, tmp_path / "out", kernels=[kernels]))
    assert not (tmp_path / "out").exists()


@pytest.fixture
def long_rows(tmp_path: Path) -> Path:
    """A conversation that is longer than the small model's context."""
    data = tmp_path / "long.jsonl"
    rows = [{"prompt": "word " * count, "completion": "yes"} for count in (4, 600)]
    data.write_text("\n".join(map(json.dumps, rows)))
    return data


def test_texts_longer_than_the_model_was_made_for_get_one_warning(
    small_model: Path, long_rows: Path, tmp_path: Path
) -> None:
    notes = Notes()
    run(settings(small_model, long_rows, tmp_path / "out", steps=1, eval_split=0), notes)
    assert "tokens exceed the model's context of 512; expect worse answers" in notes.lines["note"]


def test_strict_length_refuses_them_before_weights_are_read(
    small_model: Path, long_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hymba_tune.train.flow.open_model", None)
    with pytest.raises(ConfigError, match=r"--strict-length: 6\d\d tokens exceed the model's context of 512"):
        run(settings(small_model, long_rows, tmp_path / "out", strict_length=True))
    assert not (tmp_path / "out").exists()


METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora_whole_meta_tokens": {"meta_tokens": "full"},
    "lora_frozen_meta_tokens": {"meta_tokens": "frozen"},
    "rslora_dropout": {"rslora": True, "lora_dropout": 0.1},
    "dora": {"method": "dora"},
    "dora_whole_meta_tokens": {"method": "dora", "meta_tokens": "full"},
    "full": {"method": "full"},
}


@pytest.mark.parametrize(
    ("method", "dtype", "checkpointing"),
    [(method, "float32", False) for method in METHODS]
    + [(method, "bfloat16", True) for method in ("lora", "dora_whole_meta_tokens", "full")],
)
def test_every_method_trains(
    method: str, dtype: str, checkpointing: bool, small_model: Path, questions: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"dtype": dtype, "gradient_checkpointing": checkpointing, "eval_split": 0}
    finished = run(settings(small_model, questions, tmp_path / "out", **METHODS[method], **changes))
    first, second = (row.loss for row in finished.rows() if row.loss is not None)
    assert second < first
    saved = tensors(finished.model if method == "full" else finished.adapter)
    # Adapters stay in float32, in which they were trained; a model is saved in the format it is meant for.
    kind = getattr(torch, dtype) if method == "full" else torch.float32
    assert {tensor.dtype for tensor in saved.values()} == {kind}
    assert {tensor.dtype for tensor in tensors(finished.last_checkpoint()).values()} == {torch.float32}


@pytest.mark.parametrize("method", [{"lora_dropout": 0.3}, {"method": "full"}], ids=["lora", "full"])
def test_checkpointing_changes_no_number(
    method: dict[str, Any], small_model: Path, questions: Path, tmp_path: Path
) -> None:
    one, other = (
        run(settings(small_model, questions, tmp_path / str(on), gradient_checkpointing=on, **method))
        for on in (False, True)
    )
    folder = "model" if "method" in method else "adapter"
    assert same_tensors(one.path / folder, other.path / folder)


def test_the_same_run_again_gives_the_same_weights(small_model: Path, questions: Path, tmp_path: Path) -> None:
    one, other = (run(settings(small_model, questions, tmp_path / name, lora_dropout=0.3)) for name in "ab")
    assert same_tensors(one.adapter, other.adapter)


@pytest.mark.parametrize("targets", ["attention", "ssm"])
def test_a_side_of_in_proj_is_all_that_a_side_preset_changes(
    targets: str, small_model: Path, questions: Path, tmp_path: Path
) -> None:
    changes = {"targets": [targets], "meta_tokens": "frozen", "weight_decay": 0.1}
    finished = run(settings(small_model, questions, tmp_path / "out", **changes))
    folder = merge_run(finished.path, tmp_path / "merged")
    for name, merged in tensors(folder).items():
        base = tensors(small_model)[name]
        if not name.endswith("in_proj.weight"):
            continue
        attention = merged.shape[0] - 2 * 64  # queries, keys, values; then the SSM's input and gate
        mine, others = (slice(attention), slice(attention, None))
        if targets == "ssm":
            mine, others = others, mine
        assert torch.equal(merged[others], base[others])
        assert not torch.equal(merged[mine], base[mine])


def test_run_on_a_run_trains_a_new_adapter_on_top(finished_run: Path, questions: Path, tmp_path: Path) -> None:
    second = run(settings(finished_run, questions, tmp_path / "second", eval_split=0.2))
    start = next(row["eval_loss"] for row in rows(second.path) if row["step"] == 0)
    end = [row["eval_loss"] for row in rows(finished_run) if "eval_loss" in row][-1]
    assert start == pytest.approx(end, rel=1e-5)
    assert second.facts()["model"] == str(finished_run)
    assert Chat(ChatConfig(model=str(second.path), dtype="float32", max_new_tokens=4, temperature=0)).reply("one")
    folder = merge_run(second.path, tmp_path / "merged")
    assert Chat(ChatConfig(model=str(folder), dtype="float32", max_new_tokens=4, temperature=0)).reply("one")


@pytest.fixture
def broken_data(tmp_path: Path) -> Path:
    path = tmp_path / "broken.jsonl"
    path.write_text('{"prompt": "one"}\n')
    return path


def test_data_must_be_given(small_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--data is missing\.(.|\n)*--data demo to try the kit"):
        run(SFTConfig(model=str(small_model), out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data": Path("broken.jsonl")}, DataError, r"Cannot use broken\.jsonl, line 1"),
        ({"data": Path("missing.jsonl")}, DataError, r"Cannot find missing\.jsonl"),
        ({"model": "missing/model/folder"}, ConfigError, r"--model missing/model/folder: no such folder"),
        ({"model": "empty"}, CheckpointError, r"empty: no model in this folder"),
        ({"targets": ["q_proj"]}, ConfigError, r"targets: the model has no linear layer called q_proj"),
        ({"max_length": 8}, DataError, r"Nothing to train on in .*questions\.jsonl"),
        ({"dtype": "float16", "device": "cpu"}, ConfigError, r"--dtype float16 needs a CUDA device"),
        ({"device": "cuda:99"}, ConfigError, r"--device cuda:99: this machine has \d+ CUDA devices"),
        ({"map": ["prmpt=a"]}, ConfigError, r"prmpt"),
        ({"out": Path("broken.jsonl/out")}, ConfigError, r"--out broken\.jsonl/out cannot be written: Not a directory"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_start_that_fails_leaves_nothing_behind(
    changes: dict[str, Any],
    error: type[HymbaTuneError],
    message: str,
    small_model: Path,
    questions: Path,
    broken_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(broken_data.parent)
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=message):
        run(settings(**{"model": small_model, "data": questions, "out": tmp_path / "out"} | changes))
    assert sorted(tmp_path.iterdir()) == before


def test_folder_in_use_is_left_alone(small_model: Path, questions: Path, finished_run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(ConfigError, match=r"is not empty\.\n.*\n  to fix     another --out"):
        run(settings(small_model, questions, tmp_path))
    with pytest.raises(ConfigError, match=rf"is not empty\.\n.*\n  to fix     --resume {finished_run} to continue it"):
        run(settings(small_model, questions, finished_run))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_first_step_that_leaves_a_module_unmoved_stops_the_run(
    small_model: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stops_gradients(self: HymbaMLP, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            gate = torch.nn.functional.silu(self.gate_proj(x))
        return self.down_proj(gate * self.up_proj(x))

    monkeypatch.setattr(HymbaMLP, "forward", stops_gradients)
    with pytest.raises(
        TrainingError, match=r"3 adapted modules did not move .*model\.layers\.0\.moe\.experts\.0\.gate"
    ):
        run(settings(small_model, questions, tmp_path / "out", steps=4, save_every=4))
    assert not (tmp_path / "out").exists()


def test_what_libraries_say_goes_to_the_log(
    small_model: Path, questions: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run(settings(small_model, questions, tmp_path / "out"))
    assert capfd.readouterr() == ("", "")


def test_last_step_is_evaluated_once(small_model: Path, questions: Path, tmp_path: Path) -> None:
    finished = run(settings(small_model, questions, tmp_path / "out", steps=3, eval_every=2))
    assert [row.step for row in finished.evaluations()] == [0, 2, 3]
