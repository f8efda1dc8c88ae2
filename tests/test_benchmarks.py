"""Benchmarks run and write their tables; no measured number is asserted."""

from __future__ import annotations

import importlib
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers

from hymba_tune.cli.main import app
from tests.conftest import ROOT
from tests.tolerances import FLOAT64

pytestmark = pytest.mark.end_to_end

TIMES = {"ms", "min", "max"}
COLUMNS = {
    "train_step": {
        "train_step": {"dtype", "step", "M weights", "tokens/s", "x falcon-h1", "x linear", *TIMES},
        "train_step_meta": {"dtype", "meta tokens", "loss", "text tokens/s", "x faster", *TIMES},
    },
    "scan": {
        "scan": {"E", "texts", "dtype", "backend", "x reference", "peak MB", *TIMES},
        "scan_length": {"backend", "tokens", "us a token", "a token, relative", *TIMES},
    },
    "attention": {
        "attention": {"dtype", "way", "x dense mask", "peak MB", *TIMES},
        "attention_length": {"way", "tokens", "us a token", "peak MB", "peak kB a token", *TIMES},
    },
    "decode": {
        "decode": {
            *("dtype", "model", "batch", "prompt", "prompt ms"),
            *("read tokens/s", "written tokens/s", "x llama", "cache MB"),
        },
    },
    "headline": {
        "headline": {
            *("model", "batch", "tokens/s", "x llama", "x linear", "x own linear", "MB a token", "GB/s", "% limit"),
            *TIMES,
        },
    },
    "packing": {
        "packing": {"dtype", "batch, meta tokens", "rows computed", "text tokens/s", "x faster", *TIMES},
    },
    "preference": {
        "preference": {
            *("seed", "sft loss before", "sft loss", "dpo loss before"),
            *("dpo loss", "dpo accuracy", "dpo margin", "minutes"),
        },
    },
    "few_rows": {
        "few_rows": {"data", "rows", "defaults", "loss before", "loss", "right %", "steps", "cpu s"},
    },
    "rewards": {
        "rewards": {
            *("seed", "exact %", "exact %, grpo", "exact %, sft again", "sampled %", "sampled %, grpo"),
            *("grpo steps", "sft steps", "cpu s"),
        },
    },
    "memory": {"memory": {"dtype", "setting", "tokens", "peak MB", "kB a token"}},
    "alignment": {
        "alignment": {"what", "MB/s", "x tokenizing", *TIMES},
        "projection_tables": {"student tokens", "teacher tokens", "build s", "peak MB", "disk MB", "open s"},
        "projection": {"what", "us a token", "x softmax", *TIMES},
    },
    "distill": {
        "distill_teachers": {"model", "parameters", "vocabulary", "mbit a byte", "digits"},
        "distill": {
            *("loss", "lr", "mbit a byte", "change", "+-", "way %"),
            *("digits", "exact %", "teacher's"),
        },
        "distill_around": {"loss", "lr", "seeds", "mbit a byte", "change", "+-", "digits"},
        "distill_longer": {"loss", "lr", "seeds", "mbit a byte", "change", "+-", "digits", "exact %", "teacher's"},
    },
    "quantize": {
        "quantize": {
            *("text", "scheme", "perplexity before", "after", "rise %", "KL mnat"),
            *("same likeliest %", "tokens", "MB before", "MB after"),
        },
        "quantize_weights": {"scheme", "kind", "modules", "error %", "MB before", "MB after"},
        "quantize_search": {"scheme", "quantized", "rise %", "KL mnat", "MB saved"},
    },
    "scaling": {
        "scaling": {
            *("dtype", "strategy", "processes", "rows", "tokens a row", "tokens/s", "x one", "step s"),
            *("peak MB", "estimated MB"),
        },
    },
    "serve_load": {
        "serve_stall": {"dtype", "chunk", "step ms", "longest step ms", "steps stalled", "first token ms"},
        "serve_reuse": {"dtype", "chats", "reuse", "first token ms", "x", "MB"},
    },
    "distill_memory": {"distill_memory": {"loss", "tokens", "peak MB", "whole logits MB"}},
}
"""The tables of each benchmark and their columns."""


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports a benchmark or a module that they share, as running one does."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    verbosity = transformers.logging.get_verbosity()
    yield importlib.import_module
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()


SLOW = {"scaling"}
"""Benchmarks whose quick mode starts several processes, which takes a minute."""


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in COLUMNS])
def test_benchmark_writes_its_tables(name: str, benchmark: Any, tmp_path: Path) -> None:
    benchmark(name).main(["--quick", "--device", "cpu", "--dtype", "float32", "--out", str(tmp_path)])
    results = {result["name"]: result for result in map(json.loads, map(Path.read_text, tmp_path.iterdir()))}
    assert {table: set(result["columns"]) for table, result in results.items()} == COLUMNS[name]
    for result in results.values():
        assert result["quick"]
        assert result["machine"]["versions"]["torch"] == torch.__version__
        assert result["rows"]
        assert all(value is not None for row in result["rows"] for value in row.values())


def test_quick_runs_write_no_results_by_default(benchmark: Any) -> None:
    harness: ModuleType = benchmark("harness")
    assert harness.options("", ["--quick"], repeats=5).out is None
    assert harness.options("", [], repeats=5).out == ROOT / "benchmarks" / "results"


def test_one_model_is_timed_by_the_work_of_one_core(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness, threads = benchmark("harness"), torch.get_num_threads()
    monkeypatch.setitem(harness.CLOCK, "now", harness.CLOCK["now"])
    benchmark("headline").main(["--quick", "--device", "cpu", "--own", "--cpu-time", "--out", str(tmp_path)])
    torch.set_num_threads(threads)
    assert harness.CLOCK["now"] is time.process_time
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("headline_own_cpu_time.")
    result = json.loads(path.read_text())
    assert {row["model"] for row in result["rows"]} == {"hymba"}
    assert "x llama" not in result["columns"]


def test_scaling_compares_with_the_same_rows_in_one_process(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaling = benchmark("scaling")
    commands: list[list[str]] = []

    original = scaling.subprocess.run

    def run(command: list[str], **settings: Any) -> Any:
        if "--out" not in command:  # git, for the machine's description
            return original(command, **settings)
        commands.append(command)
        several = "--nproc" in command
        out = Path(command[command.index("--out") + 1])
        out.mkdir(exist_ok=True)
        lines = [{"loss": 1.0, "tokens_per_s": speed * (1 + 0.8 * several)} for speed in (1.0, 1.0, 90.0, 100.0, 110.0)]
        (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"eval_loss": 1.0}]))
        (out / "run.json").write_text(json.dumps({"memory": {"measured_bytes": 2e6, "predicted_bytes": 1e6}}))

        return None

    monkeypatch.setattr(scaling.subprocess, "run", run)
    words = ["--device", "cpu", "--dtype", "float32", "--processes", "1", "2", "--strategies", "ddp", "fsdp"]
    scaling.main([*words, "--out", str(tmp_path)])
    (result,) = map(json.loads, map(Path.read_text, tmp_path.iterdir()))
    rows = result["rows"]
    assert {(row["strategy"], row["processes"], row["x one"]) for row in rows} == {
        ("ddp", 1, 1.0),
        ("ddp", 2, 1.8),
        ("fsdp", 2, 1.8),
    }
    assert {(row["rows"], row["tokens a row"]) for row in rows} == {(4, 512), (4, 256), (4, 1024), (1, 512), (8, 512)}
    assert (rows[0]["tokens/s"], rows[0]["peak MB"], rows[0]["estimated MB"]) == (100, 2, 1)
    assert len(commands) == 15
    for command in commands:
        app.parse_args(command[3:], exit_on_error=False, print_error=False)


def test_tables_of_the_scaling_page_are_computed(benchmark: Any) -> None:
    """Where this fails, run `python benchmarks/clusters.py --write`."""
    clusters = benchmark("clusters")
    page = clusters.PAGE.read_text(encoding="utf-8")
    # A kernel that moves a few bytes more or less does not make the page wrong.
    words, numbers = zip(*map(_words_and_numbers, (page, clusters.computed(page))), strict=True)
    assert words[0] == words[1]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.1, abs=1)
    lora, full = (clusters.Run("", method, "ddp") for method in ("lora", "full"))
    assert 0.15 < lora.sent(8) / 1e9 < 0.16  # 22M parameters in float32, 2 × 7/8 of them
    assert clusters.speedup(full, "InfiniBand", 8) > 7.9
    # By hand: 12 GB over a port of 12.5 GB/s of each machine.
    assert full.exchange(16, clusters.networks(16)["Ethernet"]) == pytest.approx(full.sent(16) / 12.5e9, rel=0.03)


def _words_and_numbers(page: str) -> tuple[str, list[float]]:
    number = re.compile(r"\d[\d,]*(?:\.\d+)?")
    return number.sub("", page), [float(found.replace(",", "")) for found in number.findall(page)]


def test_variants_are_timed_in_turn(benchmark: Any) -> None:
    calls: list[str] = []
    timings = benchmark("harness").interleave({name: lambda name=name: calls.append(name) for name in "AB"}, repeats=2)
    assert "".join(calls) == "AABB" * 3  # the first round warms up; short calls are made twice
    assert [len(timing.rounds) for timing in timings.values()] == [2, 2]


def test_ratio_is_the_median_of_the_rounds(benchmark: Any) -> None:
    timing = benchmark("harness").Timing
    # The machine was ten times slower in the last round, which does not change the ratio.
    assert timing((2.0, 2.0, 20.0)).over(timing((1.0, 1.0, 10.0))) == 2.0


def test_peak_memory_includes_memory_that_was_freed(benchmark: Any) -> None:
    harness = benchmark("harness")
    peak = harness.in_child(harness.peak_memory, _hold_32_megabytes, torch.device("cpu"))
    assert peak is None or 32e6 < peak < 40e6


def _hold_32_megabytes() -> None:
    torch.ones(8_000_000)


def test_meta_tokens_in_rows_are_the_same_function(benchmark: Any) -> None:
    models = benchmark("models")
    once = models.hymba(torch.device("cpu"), torch.float64, **models.TOY | {"num_memory_tokens": 4})
    in_rows = models.MetaTokensInRows(once)
    lengths = [3, 7, 1, 9]
    ids = models.random_ids(once, sum(lengths))
    losses = models.packed_loss(once, ids, lengths), in_rows(ids, lengths)
    FLOAT64.check(losses[1], losses[0], "loss")
    for loss in losses:
        loss.backward()
    FLOAT64.check(in_rows.meta.grad, once.model.memory_tokens.weight.grad, "gradient of the meta tokens")
    own, others = once.get_input_embeddings().weight, in_rows.inner.get_input_embeddings().weight
    FLOAT64.check(others.grad, own.grad, "gradient of the embeddings")


def test_meta_tokens_in_rows_need_a_model_with_meta_tokens(benchmark: Any) -> None:
    models = benchmark("models")
    without = models.hymba(torch.device("cpu"), torch.float32, **models.TOY | {"num_memory_tokens": 0})
    with pytest.raises(ValueError, match="has no meta tokens"):
        models.MetaTokensInRows(without)


def test_dense_mask_is_the_same_attention(benchmark: Any) -> None:
    attention = benchmark("attention")
    generator = torch.Generator().manual_seed(0)
    lengths = [5, 1, 12]
    rows = attention.META + sum(lengths)
    inputs = [torch.randn(rows, heads, 8, generator=generator, dtype=torch.float64) for heads in (5, 1, 1)]
    documents = attention.find_documents(
        (1, sum(lengths)), torch.device("cpu"), num_meta=attention.META, cu_seqlens=torch.tensor([0, 5, 6, 18])
    )
    for window in (3, None):
        dense = attention.dense_mask_attention(*inputs, documents, window)
        FLOAT64.check(dense, attention.ATTENTION.backends["blocks"].run(*inputs, documents, window))


def test_lengths_are_quantiles_of_gsm8k(benchmark: Any) -> None:
    lengths = benchmark("packing").quantiles(16)
    assert lengths == sorted(lengths)
    assert 150 < sum(lengths) / 16 < 250  # GSM8K's mean is 198


def test_fewer_tokens_of_a_target_keep_its_mass(benchmark: Any) -> None:
    losses = benchmark("distill_losses")
    probs = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.7, 0.2, 0.0, 0.1]], dtype=torch.float64)
    top = losses.SparseTarget(torch.tensor([[5, 2, 9], [1, 8, 0]]), probs[:, :3].log(), probs[:, 3].log())
    spans = torch.tensor([[0, 2]]), torch.tensor([-1.0])
    fewer = losses.fewer(losses.Targets(torch.tensor([0, 1]), top, *spans), 1)
    assert fewer.top.student_tokens.tolist() == [[5], [1]]
    FLOAT64.check(fewer.top.log_probs.exp(), probs[:, :1])
    FLOAT64.check(fewer.top.rest_mass.exp(), torch.tensor([0.6, 0.3], dtype=torch.float64))


def test_joined_rows_have_targets_at_the_positions_that_predict_them(benchmark: Any) -> None:
    losses = benchmark("distill_losses")
    students = benchmark("distill_students")
    rows = []
    for ids in ([7, 3, 5], [7, 2, 4, 6]):
        last = torch.tensor([len(ids) - 1])
        top = losses.SparseTarget(torch.tensor([[ids[-1]]]), torch.zeros(1, 1), torch.full((1,), -torch.inf))
        targets = losses.Targets(last, top, torch.stack([last, last + 1], 1), torch.zeros(1))
        labels = torch.tensor([-100, *ids[1:]])
        rows.append(losses.StudentRow(torch.tensor(ids), labels, targets, last, torch.zeros(1, 2)))
    batch = students.join_rows(rows, 1)
    assert batch.labels[batch.targets.at].tolist() == batch.targets.top.student_tokens.flatten().tolist() == [5, 6]
    assert batch.targets.spans.tolist() == [[1, 2], [5, 6]]
    assert batch.begins.tolist() == [1, 5]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 2, 3]
