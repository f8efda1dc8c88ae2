from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

from hymba_tune.checkpoint import load_tokenizer
from hymba_tune.config import SFTConfig
from hymba_tune.data import open_sources, with_chat_template
from hymba_tune.data.checking import check_sources
from hymba_tune.errors import ConfigError
from hymba_tune.footprint import Batch
from hymba_tune.footprint.cards import CARDS, LAUNCH
from hymba_tune.footprint.work import DECODING_LAUNCHES, Speeds, Work, step_work, token_work
from hymba_tune.model.backends import OPERATIONS
from hymba_tune.plan import Length, Plan, plan
from tests.cli.conftest import Command
from tests.runs import run, settings
from tests.tiny import RELEASED, tiny_model


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the released model's configuration and no weights: a plan reads nothing else."""
    folder = tmp_path_factory.mktemp("released")
    RELEASED.save_pretrained(folder)
    return str(folder)


def test_a_plan_needs_no_weights_and_what_it_proposes_fits(released: str) -> None:
    planned = plan(SFTConfig(model=released, gradient_checkpointing=True, max_length=256, batch_size=64))
    assert 2.5e9 < planned.parts.weights < 3.5e9
    assert planned.tokens_per_step == 64 * 256
    assert len({verdict.needs for verdict in planned.gpus}) == 1
    assert (planned.gpus[0].fits, planned.gpus[0].change) == (False, "--batch-size 32 --grad-accum 2")
    assert (planned.gpus[-1].fits, planned.gpus[-1].change) == (True, "")


def test_a_plan_for_gpus_needs_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SFTConfig(model="hymba-nano", max_length=256, batch_size=2)
    gpus = plan(config).gpus
    for operation in OPERATIONS.values():
        if native := operation.backends.get("native"):
            missing = replace(native, unavailable_reason=lambda: "no C++ compiler")
            monkeypatch.setattr(operation, "backends", operation.backends | {"native": missing})
    assert plan(config).gpus == gpus


def test_every_weight_in_little_memory_cannot_be_helped(released: str) -> None:
    planned = plan(SFTConfig(model=released, method="full", max_length=256, batch_size=1))
    assert planned.gpus[0].change is None


@pytest.fixture(scope="module")
def plans(released: str) -> Callable[..., Plan]:
    """Plans of training every weight, each made once."""
    settings: dict[str, Any] = {"method": "full", "gradient_checkpointing": True, "max_length": 256, "batch_size": 2}
    return cache(lambda **changes: plan(SFTConfig(model=released, **settings | changes)))


def test_shares_of_several_processes(plans: Callable[..., Plan]) -> None:
    alone = plans()
    ddp, fsdp, zero3 = several = [plans(nproc="8", strategy=strategy) for strategy in ("ddp", "fsdp", "zero3")]
    assert {(planned.processes, planned.rows_per_step, planned.tokens_per_step) for planned in several} == {
        (8, 16, 8 * alone.tokens_per_step)
    }
    assert ddp.parts.weights == alone.parts.weights
    assert fsdp.parts.weights == pytest.approx(alone.parts.weights / 8, rel=1e-3)
    assert zero3.parts.optimizer < alone.parts.optimizer / 4
    assert (alone.bytes_sent, fsdp.bytes_sent) == (0, pytest.approx(1.5 * ddp.bytes_sent, rel=0.02))
    for planned in several:
        speeds = [gpu.tokens_per_s / one.tokens_per_s for gpu, one in zip(planned.gpus, alone.gpus, strict=True)]
        assert all(0 < speed < 8 for speed in speeds)
        l40s, a100 = planned.gpus[-2:]
        assert a100.tokens_per_s > 1.2 * l40s.tokens_per_s  # by its memory and its links


def test_sharding_is_proposed_where_copies_do_not_fit(plans: Callable[..., Plan]) -> None:
    assert plans(nproc="8", strategy="ddp").gpus[0].change == "--strategy fsdp"
    assert plans().gpus[0].change is None


def test_offloaded_memory_is_not_that_of_a_gpu(plans: Callable[..., Plan]) -> None:
    kept = plans(nproc="8", strategy="zero3")
    offloaded = plans(nproc="8", strategy="zero3", offload="optimizer")
    assert offloaded.parts.offloaded > kept.parts.optimizer
    assert offloaded.gpus[0].needs < kept.gpus[0].needs


def test_global_batch_and_machines_set_rows_and_steps(small_model: Path) -> None:
    words: dict[str, Any] = {"model": str(small_model), "batch_size": 2, "max_length": 64, "steps": 10}
    planned = plan(SFTConfig(**words, nproc="2", nnodes=2, rendezvous="a:1", global_batch=32))
    assert (planned.processes, planned.rows_per_step) == (4, 32)
    assert planned.length == Length(10, 10 * 32 * 64)
    with pytest.raises(ConfigError, match="which 3 processes cannot share evenly"):
        plan(SFTConfig(**words, nproc="3", global_batch=32))


def test_operations_of_a_step_are_those_of_its_products() -> None:
    model = tiny_model()
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    work = partial(step_work, dtype=torch.float32, own_kernels=False, optimizer="adamw")

    def operations(**settings: Any) -> float:
        # Of one batch more than of another: meta tokens, and what is computed once, are the same.
        one, two = (work(model, Batch.full(texts, 64), **settings) for texts in (1, 2))
        return (sum(f for f, _ in two.products) - sum(f for f, _ in one.products)) / 64

    trained = operations(checkpointing=False)
    assert 6 * linear < trained < 8 * linear  # attention's are beside those of the weights
    assert operations(checkpointing=True) > trained + 1.8 * linear
    model.requires_grad_(False)
    assert trained - operations(checkpointing=False) == pytest.approx(2 * linear, rel=0.01)


def test_a_step_takes_its_products_and_bytes_or_its_launches() -> None:
    work = Work(((8.0, 2.0), (1.0, 6.0)), bytes=4.0, launches=3)
    speeds = Speeds(operations=2.0, bytes=1.0, launch=0.5)
    assert work.seconds(speeds) == 4 + 6 + 4
    assert work.seconds(replace(speeds, overlap=False)) == 14 + 1.5
    assert work.seconds(replace(speeds, launch=10.0)) == 30
    assert (work + work).seconds(speeds) == work.repeated(2).seconds(speeds) == 28
    assert (work * 2).launches == 3


def test_a_batch_of_texts_is_decoded_faster_than_one_and_never_faster_than_its_launches() -> None:
    speeds = CARDS[80].speeds
    one, many = (token_work(3e9, 1.5e9, 32, texts, texts * 30e6).seconds(speeds) / texts for texts in (1, 128))
    assert many < one / 20
    assert one == pytest.approx(max(3.03e9 / speeds.bytes, 32 * DECODING_LAUNCHES * LAUNCH))


def test_a_card_with_more_operations_and_fewer_bytes_does_not_train_faster(plans: Callable[..., Plan]) -> None:
    for changes in ({}, {"method": "lora"}, {"method": "lora", "quantize": "nf4"}):
        l40s, a100 = plans(**changes).gpus[-2:]
        assert a100.tokens_per_s > 1.1 * l40s.tokens_per_s


def test_plan_as_a_table_and_as_json(command: Command) -> None:
    words = ("plan", "--model", "hymba-nano", "--max-length", "64")
    shown = command(*words)
    assert shown.code == 0
    assert "8 GB (RTX 4060)" in shown.out
    assert "processes" not in shown.out
    several = command(*words, "--nproc", "4", "--strategy", "zero2", "--offload", "optimizer").out
    assert "4 processes · zero2 · 32 rows a step · each sends " in several
    assert "in CPU memory, for each process" in several
    planned = json.loads(command(*words, "--json").out)
    assert [gpu["has"] >> 30 for gpu in planned["gpus"]] == [8, 12, 16, 24, 48, 80]


def test_plan_tells_how_long_steps_take(command: Command) -> None:
    words = ("plan", "--model", "hymba-nano", "--max-length", "64", "--steps", "1000")
    shown = command(*words).out
    assert "1,000 steps · 512,000 tokens in all" in shown
    assert re.search(r"tok/s +time\n", shown)
    here = json.loads(command(*words, "--json").out)["here"]
    assert here["seconds"] == pytest.approx(512_000 / here["tokens_per_s"])


def test_plan_tells_how_long_its_data_takes(small_model: Path, questions: Path) -> None:
    def length(**changes: Any) -> Length:
        settings = {"model": str(small_model), "data": [str(questions)], "batch_size": 4, "epochs": 1, **changes}
        planned = plan(SFTConfig(**settings))
        assert planned.length
        assert planned.here.seconds == pytest.approx(planned.length.tokens / planned.here.tokens_per_s)
        return planned.length

    tokenizer = with_chat_template(load_tokenizer(small_model), None)
    checked = check_sources(open_sources([str(questions)]), tokenizer, max_length=2048)
    whole = length(eval_split=0)
    assert whole == Length(math.ceil(checked.rows / 4), checked.tokens)
    assert length(eval_split=0.5, epochs=2).tokens == whole.tokens
    assert length(eval_split=0, steps=3).tokens == pytest.approx(12 * checked.tokens / checked.rows, abs=1)
    assert length(eval_split=0, weights=[2]).tokens == 2 * whole.tokens
    assert length(eval_split=0, packing=True, max_length=512).steps < whole.steps
    assert plan(SFTConfig(model=str(small_model))).length is None


def test_plan_of_data_that_cannot_be_used(small_model: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "bad.jsonl").write_text("no\n")
    (tmp_path / "empty.jsonl").touch()
    for name, message in {"bad": "Nothing to train on in", "empty": "it has no rows"}.items():
        failed = command("plan", "--model", small_model, "--data", tmp_path / f"{name}.jsonl")
        assert failed.code == 2
        assert message in failed.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model", "hymba-nan"), "--model hymba-nan: no such folder"),
        (("--verb", "sfd"), "verb is 'sfd', expected one of sft"),
        (("--rank", "0"), "--rank 0: must be at least 1"),
        (("--model", "hymba-nano", "--targets", "x"), "targets: the model has no linear layer called x"),
        (("--recipe", "dmo"), "There is no recipe dmo."),
    ],
)
def test_plan_of_what_cannot_be(words: tuple[str, ...], message: str, command: Command) -> None:
    failed = command("plan", *words)
    assert failed.code == 2
    assert message in failed.err


def test_dry_run_leaves_nothing(small_model: Path, questions: Path, tmp_path: Path, command: Command) -> None:
    out = tmp_path / "out"
    shown = command("sft", "--model", small_model, "--data", questions, "--out", out, "--steps", "7", "--dry-run")
    assert shown.code == 0
    assert "7 steps" in shown.out
    assert "needs about" in shown.out
    assert not out.exists()
    out.mkdir()
    assert command("sft", "--model", small_model, "--data", questions, "--out", out, "--dry-run").code == 0
    assert list(out.iterdir()) == []


def test_run_records_estimated_and_measured_memory(finished_run: Path) -> None:
    memory = json.loads((finished_run / "run.json").read_text())["memory"]
    assert memory["predicted_bytes"] > sum(memory["parts"].values())
    assert memory["measured_bytes"] > 2**28


def test_run_too_large_for_the_machine_says_so(
    small_model: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hymba_tune.cli.screen import RichScreen
    from hymba_tune.train import memory_estimate

    banner: dict[str, str] = {}

    class Seeing(RichScreen):
        def banner(self, lines: dict[str, str]) -> None:
            banner.update(lines)

    monkeypatch.setattr(memory_estimate, "device_memory", lambda _: 2**20)
    assert run(settings(small_model, questions, tmp_path / "out", dry_run=True), Seeing()) is None
    assert "may run out: --batch-size 2 --grad-accum 2" in banner["memory"]


def test_plan_and_banner_have_the_same_defaults_by_size(command: Command, questions: Path) -> None:
    shown = command("sft", "--model", "hymba-nano", "--data", questions, "--dry-run").out
    assert "learning rate 4e-3, by model size" in shown
    assert "150 steps (50 epochs, by model size and rows)" in " ".join(shown.split())
    assert "143 steps ·" in command("plan", "--model", "hymba-nano", "--data", questions).out  # of 22.8 rows

    chosen_by_user = command(
        "sft", "--model", "hymba-nano", "--data", questions, "--dry-run", "--lr", 1e-3, "--steps", 5
    )
    assert "by model size" not in chosen_by_user.out
