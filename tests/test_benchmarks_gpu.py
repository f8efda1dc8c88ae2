"""The GPU benchmark at toy sizes on a CPU, so that it keeps working without a GPU."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from hymba_tune.model import use_kernels
from hymba_tune.model.backends import OPERATIONS, Backend
from tests.conftest import ROOT

TABLES = ("card", "twin", "scan", "attention", "step", "step_kernels", "decode", "operations", "parity")

BARE = """
import re, runpy, sys
from importlib import metadata
from importlib.machinery import PathFinder

def name_of(requirement):
    return re.sub("[-_.]+", "-", re.match("[A-Za-z0-9._-]+", requirement)[0]).lower()

installed, todo = set(), ["torch", "triton", "transformers", "peft", "accelerate"]
while todo:
    name = name_of(todo.pop())
    if name not in installed:
        installed.add(name)
        try:
            todo += [one for one in metadata.requires(name) or () if "extra ==" not in one]
        except metadata.PackageNotFoundError:
            pass
installed.add("hymba-tune")
packages = metadata.packages_distributions()
absent = {module for module, names in packages.items() if not installed & {*map(name_of, names)}} - {"tests"}

class Bare(PathFinder):
    '''Finds only five packages and what they require.'''

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in absent else super().find_spec(name, path, target)

sys.meta_path = [Bare if finder is PathFinder else finder for finder in sys.meta_path]
sys.argv = sys.argv[1:]
sys.path[0] = sys.argv[0].rpartition("/")[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script; its folder is on the import path for its modules."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    return gpu


@pytest.fixture
def bench(gpu: ModuleType, tmp_path: Path) -> Any:
    """A quick run on the CPU with a time limit of a minute."""
    options = gpu.Options(True, 1, torch.device("cpu"), (torch.float32,), tmp_path)
    return gpu.Bench(options, time.monotonic() + 60)


@pytest.fixture
def backend() -> Iterator[None]:
    """Removes backends that a test adds."""
    before = {name: dict(operation.backends) for name, operation in OPERATIONS.items()}
    yield
    for name, backends in before.items():
        OPERATIONS[name].backends = backends


def written(folder: Path, name: str) -> dict[str, Any]:
    (path,) = folder.glob(f"gpu_{name}.*.json")
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def test_every_section_runs_where_only_five_packages_are_installed(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "gpu.py"
    process = subprocess.run(
        [sys.executable, "-c", BARE, str(script), "--quick", "--out", str(tmp_path)],
        cwd=tmp_path,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    results = {name: written(tmp_path, name) for name in TABLES}
    assert not [note for result in results.values() for note in result["notes"] if "failed" in note]
    assert {row["verdict"] for name in ("twin", "parity") for row in results[name]["rows"]} == {"right"}
    for name in ("operations", "parity"):
        found = {row["operation"] for row in results[name]["rows"]}
        assert found >= OPERATIONS.keys() - ({"scan", "attention"} if name == "operations" else set())
    assert {row["backend"] for row in results["scan"]["rows"]} >= {"torch"}
    assert {row["pass"] for row in results["attention"]["rows"]} == {"forward", "and backward"}
    assert {row["checkpointing"] for row in results["step"]["rows"]} == {"yes", "no"}
    models = [(row["model"], row["batch"]) for row in results["decode"]["rows"]]
    assert list(dict.fromkeys(models)) == [
        (model, batch) for model in ("Hymba-1.5B", "Llama-3.2-3B") for batch in (1, 4)
    ]


def test_the_tests_that_need_a_gpu_end_at_their_limit_and_keep_their_lines(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del gpu
    import gpu_tests

    script = "import signal, sys; print('a line', flush=True); signal.pause()"
    status = gpu_tests.run([sys.executable, "-c", script], 0.5, tmp_path / "out" / "gpu_tests.txt")
    assert status == -signal.SIGINT
    assert (tmp_path / "out" / "gpu_tests.txt").read_text().startswith("a line\n")

    commands: list[list[str]] = []
    monkeypatch.setattr(gpu_tests, "run", lambda command, *_: commands.append(command) or 0)
    assert gpu_tests.main(["--out", str(tmp_path)]) == 0
    assert f"{ROOT / 'tests' / 'model' / 'test_scan_triton.py'}" in commands[0]
    assert not [word for word in commands[0] if "cli" in word]


def test_without_a_gpu_only_toy_sizes_are_measured(gpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu"])
    assert "--quick runs on a CPU" in capsys.readouterr().err


def test_a_section_that_fails_does_not_stop_the_next(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[Any] = []

    def fail(bench: Any) -> None:
        with bench.table("scan", ("what",)) as table:
            table.add({"what": "a row"})
            raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu, "SECTIONS", {"scan": gpu.Section(fail, 1), "step": gpu.Section(calls.append, 1)})
    assert gpu.main(["--quick", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert len(calls) == 1
    assert "failed: scan: RuntimeError: no such kernel" in capsys.readouterr().out
    result = written(tmp_path, "scan")
    assert result["rows"] == [{"what": "a row"}]
    assert result["notes"] == ["cut short: RuntimeError: no such kernel"]


def test_after_a_device_fault_the_remaining_sections_run_in_a_new_process(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(_: Any) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    commands: list[list[str]] = []
    monkeypatch.setattr(gpu, "SECTIONS", dict.fromkeys(("scan", "step", "decode"), gpu.Section(fault, 1)))
    monkeypatch.setattr(gpu, "alive", lambda _: False)
    started = SimpleNamespace(run=lambda command, **_: commands.append(command))
    monkeypatch.setattr(gpu, "subprocess", started)
    assert gpu.main(["--quick", "--device", "cpu", "--kernels", "scan=auto"]) == 1
    (command,) = commands
    assert command[1] == gpu.__file__
    again = gpu._read(command[2:])
    assert (again.only, again.quick, again.continued) == (["step", "decode"], True, True)
    assert again.kernels == ["scan=auto"]


def test_nothing_new_is_started_after_the_time_limit(
    gpu: ModuleType, bench: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.deadline = time.monotonic() - 1
    with pytest.raises(gpu.OutOfTimeError, match="time limit"):
        bench.attempt("anything", lambda: None)
    gpu.run(bench, "scan")
    assert "scan was cut short" in capsys.readouterr().out
    assert not bench.failures


def test_a_killed_run_loses_nothing_it_has_measured(gpu: ModuleType, tmp_path: Path) -> None:
    words = ["--quick", "--device", "cpu", "--only", "card", "parity", "--out", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, gpu.__file__, *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if line.startswith("parity:"):
            process.kill()
            break
    process.stdout.close()
    process.wait()
    assert not list(tmp_path.glob("*.json"))

    (rows,) = tmp_path.glob("gpu.*.jsonl")
    with rows.open("a") as file:
        file.write('{"table": "parity", "ro')  # as a kill within a line leaves it
    assert gpu.main(["--tables", str(rows)]) == 0
    first_columns = {"card": "fact", "parity": "operation"}
    counted = {
        name: sum(line.startswith(f"{name}: {first} ") for line in seen) for name, first in first_columns.items()
    }
    assert all(len(written(tmp_path, name)["rows"]) >= count > 0 for name, count in counted.items())
    assert written(tmp_path, "parity")["quick"]


def test_tables_are_those_of_the_last_run_also_on_another_machine(gpu: ModuleType, tmp_path: Path, bench: Any) -> None:
    from gpu_journal import Journal

    journal = Journal(tmp_path / "gpu.some-card.jsonl")
    for value in (1, 2):
        journal.begin(bench.options)
        journal.write(table="scan", columns=["ms"])
        journal.write(table="scan", row={"ms": value})
    lines = (tmp_path / "gpu.some-card.jsonl").read_text()
    (tmp_path / "gpu.some-card.jsonl").write_text(re.sub('"slug": "[^"]*"', '"slug": "some-card"', lines))
    assert gpu.main(["--tables", str(tmp_path / "gpu.some-card.jsonl")]) == 0
    result = json.loads((tmp_path / "gpu_scan.some-card.json").read_text())
    assert result["rows"] == [{"ms": 2}]


def test_sections_have_shares_of_530_seconds_and_what_one_leaves_goes_to_the_next(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gpu.SECONDS == 530
    left: dict[str, float] = {}
    sections = {
        name: gpu.Section(lambda bench, name=name: left.update({name: bench.deadline - time.monotonic()}), seconds)
        for name, seconds in {"scan": 10, "step": 30}.items()
    }
    monkeypatch.setattr(gpu, "SECTIONS", sections)
    assert gpu.main(["--quick", "--device", "cpu", "--only", "scan", "step", "--seconds", "4000"]) == 0
    assert 0 < left["scan"] <= 1000 < 3000 < left["step"] <= 4000


def test_work_that_goes_on_after_its_deadline_is_interrupted(
    gpu: ModuleType, bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compile_for_ever(bench: Any) -> None:
        while True:
            bench.attempt("compile", signal.pause)

    monkeypatch.setattr(gpu, "GRACE", 0.01)
    monkeypatch.setattr(gpu, "SECTIONS", {"scan": gpu.Section(compile_for_ever, 1)})
    bench.deadline = time.monotonic() + 0.01
    gpu.run(bench, "scan")
    assert "scan was cut short" in capsys.readouterr().out


def test_a_failing_variant_does_not_stop_the_others(bench: Any) -> None:
    measured = bench.measure("a sum", {"works": lambda: None, "fails": lambda: torch.ones(2) + torch.ones(3)})
    assert measured["works"].timing.median > 0
    assert "RuntimeError" in measured["fails"]
    assert bench.failures == [f"a sum, fails: {measured['fails']}"]


def test_out_of_memory_is_a_result_and_not_a_failure(bench: Any) -> None:
    def fill() -> None:
        raise torch.OutOfMemoryError("tried to allocate more than there is")

    assert bench.attempt("fill", fill).startswith("OutOfMemoryError")
    assert not bench.failures


def test_kernels_are_summed_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_profile

    second = 1_000_000_000
    summed = gpu_profile.sum_kernels([("a", second), ("b", 4 * second), ("a", second // 2)])
    assert summed == {"a": (1.5, 2), "b": (4.0, 1)}
    # The profiler's events have the attributes that are read; on a CPU it records only the host's work.
    monkeypatch.setattr(gpu_profile, "ProfilerActivity", SimpleNamespace(CUDA=ProfilerActivity.CPU))
    device = SimpleNamespace(type="cuda")
    assert gpu_profile.kernels(lambda: torch.ones(2) + 1, device) == {}
    monkeypatch.setattr(gpu_profile, "DeviceType", SimpleNamespace(CUDA=DeviceType.CPU))
    seconds, launches = gpu_profile.kernels(lambda: torch.ones(2) + 1, device)["aten::add"]
    assert launches == 1
    assert 0 < seconds < 1


def test_limits_that_cannot_be_measured_are_an_error(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_measure import Failure, measure_limits

    monkeypatch.setattr(bench, "measure", lambda _, ways: dict.fromkeys(ways, Failure("the card is on fire")))
    with pytest.raises(RuntimeError, match="limits of the device cannot be measured: copy the card is on fire"):
        measure_limits(bench)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("wrong", ["outputs", "gradients"])
def test_parity_finds_a_wrong_backend(bench: Any, wrong: str) -> None:
    from gpu_cases import convolution_cases
    from gpu_journal import Table
    from gpu_parity import compare

    operation = OPERATIONS["conv"]
    correct = operation.backends["torch"].run
    weigh = {"outputs": lambda y: y * 1.001, "gradients": lambda y: y.detach() + (y - y.detach()) * 1.001}[wrong]
    alone = correct._replace(alone=lambda *inputs: weigh(correct.alone(*inputs)))
    operation.backends["wrong"] = Backend("wrong", alone)
    cases = list(convolution_cases(bench, torch.float32))
    table = Table("parity", bench.journal)
    verdicts = {row["backend"]: row["verdict"] for row in compare(bench, operation, torch.float32, cases, table)}
    assert {name: verdicts[name] for name in ("torch", "wrong")} == {"torch": "right", "wrong": "WRONG"}
    (failure,) = bench.failures
    assert "conv float32 wrong: wrong by 1.0e-03" in failure
    assert {"table": "parity", "note": failure} in bench.journal.entries


def test_parity_within_the_model_restores_the_choice_of_kernels(bench: Any) -> None:
    from gpu_journal import Table
    from gpu_parity import compare_models

    before = use_kernels(conv="torch")
    try:
        rows = list(compare_models(bench, torch.float32, Table("parity", bench.journal)))
        assert OPERATIONS["conv"].chosen == "torch"
    finally:
        use_kernels(**before)
    assert {row["verdict"] for row in rows} == {"right"}


def test_the_error_of_nan_is_infinite() -> None:
    from gpu_cases import relative_error

    assert relative_error(torch.tensor([math.nan]), torch.ones(1)) == math.inf
    assert relative_error(torch.full((4,), 0.5), torch.zeros(4)) == 1


def test_attention_flops_count_each_visible_pair() -> None:
    from gpu_kernels import FORWARD, Heads, attention_flops

    heads = Heads(queries=3, groups=1, meta=4)
    for tokens, window in ((9, 5), (9, None), (3, 5), (6, 5)):
        rows = torch.arange(tokens)
        distance = rows[:, None] - rows
        visible = (distance >= 0) & (distance <= (tokens if window is None else window))
        pairs = int(visible.sum()) + 4 * tokens + 4 * 5 // 2
        assert attention_flops(heads, tokens, window, FORWARD) == 3 * pairs * 2 * (64 + 128)


def test_error_reasons_have_one_line_without_markup() -> None:
    from gpu_measure import reason

    assert reason(ValueError("[/bold] shape\n in the kernel")) == "ValueError: (/bold) shape"


def test_a_loss_that_is_not_finite_is_a_failure(bench: Any) -> None:
    from gpu_step import _measured

    class Step:
        loss = torch.tensor(math.nan)

        def __call__(self) -> None:
            pass

    _measured(bench, Step(), "bf16, 48, no")
    assert bench.failures == ["bf16, 48, no: the loss is nan"]


def test_the_floor_is_the_longest_of_the_three_times() -> None:
    from gpu_kernels import Floor
    from gpu_measure import Limits

    floor = Floor(moved=6.0, exponentials=8.0, multiply_adds=9.0)
    assert floor.seconds(Limits(bandwidth=2.0, matmul=1.0, special=1.0, float32=3.0)) == (8.0, "exp")
    assert floor.seconds(Limits(bandwidth=2.0, matmul=1.0, special=None, float32=None)) == (3.0, "bytes")
