"""The files of docs/distributed/: they are well-formed, and the commands that they start can be parsed."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from hymba_tune.cli.main import app
from hymba_tune.config import SFTConfig
from tests.conftest import ROOT

FOLDER = ROOT / "docs" / "distributed"
PAGE = ROOT / "docs" / "distributed.md"
SLURM_OPTIONS = {
    *("job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "mem", "time", "output"),
}
"""Options in SLURM's manual of sbatch that the file uses."""
STUBS = {
    "hymba-tune": 'printf "%s\\n" "$@"',
    "torchrun": 'printf "%s\\n" "$@"',
    "scontrol": 'printf "%s\\n" node-a node-b',
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
}
"""Commands that show what a script starts, instead of starting it."""


def started(script: str, tmp_path: Path, *words: str, **environment: str) -> list[str]:
    """The words of the command that a bash script starts."""
    for name, body in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script, "script", *words],
        env={"PATH": path, "HOME": str(tmp_path), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def settings(words: list[str]) -> SFTConfig:
    """The settings of `hymba-tune sft` that words stand for."""
    command, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
    assert command.__name__ == "sft"
    flags: SFTConfig = bound.arguments["flags"]
    return flags


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8")))


def container(template: Mapping[str, Any]) -> dict[str, Any]:
    """The only container of a pod, whose mounts are volumes of the pod."""
    (found,) = template["spec"]["containers"]
    volumes = {volume["name"] for volume in template["spec"]["volumes"]}
    assert {mount["name"] for mount in found["volumeMounts"]} == volumes
    return dict(found)


def test_every_file_is_on_the_page() -> None:
    linked = set(re.findall(r"\]\(distributed/([^)]+)\)", PAGE.read_text(encoding="utf-8")))
    assert linked == {path.name for path in FOLDER.iterdir()}


def test_torchrun_starts_the_command_on_each_machine(tmp_path: Path) -> None:
    script = (FOLDER / "torchrun.sh").read_text()
    words = started(script, tmp_path, FIRST="10.0.0.1", NODES="2", NODE_RANK="1")
    at = words.index("-m")
    assert words[at : at + 3] == ["-m", "hymba_tune.cli", "sft"]
    launcher = dict(zip(words[:at:2], words[1:at:2], strict=True))
    assert launcher == {
        "--nnodes": "2",
        "--node-rank": "1",
        "--nproc-per-node": "8",
        "--master-addr": "10.0.0.1",
        "--master-port": "29500",
    }
    assert settings(words[at + 2 :]).data == ["my.jsonl"]


def test_slurm_tells_each_machine_its_place(tmp_path: Path) -> None:
    script = (FOLDER / "slurm.sbatch").read_text()
    directives = re.findall(r"^#SBATCH --([a-z-]+)=\S+$", script, re.M)
    assert len(directives) == script.count("\n#SBATCH ")
    assert set(directives) <= SLURM_OPTIONS
    environment = {"SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_ID": "123456", "SLURM_NNODES": "2"}
    words = started(script, tmp_path, "--data", "a b.jsonl", **environment, SLURM_NODEID="1")
    flags = settings(words)
    assert (flags.data, flags.nproc, flags.nnodes, flags.node_rank) == (["a b.jsonl"], "auto", 2, 1)
    assert flags.rendezvous == "node-a:23456"


def test_skypilot_tells_each_machine_its_place(tmp_path: Path) -> None:
    (task,) = documents("skypilot.yaml")
    assert task["resources"]["accelerators"].endswith(":8")
    given = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    words = started(task["run"], tmp_path, **task["envs"], **given, SKYPILOT_NUM_GPUS_PER_NODE="8")
    flags = settings(words)
    assert (flags.nproc, flags.nnodes, flags.node_rank, flags.rendezvous) == ("8", 2, 1, "10.0.0.1:29500")


def test_kubernetes_job_finds_its_first_pod() -> None:
    service, job = documents("kubernetes-job.yaml")
    name, spec = job["metadata"]["name"], job["spec"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert spec["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    found = container(spec["template"])
    (variable,) = found["env"]
    words = [word.replace(f"$({variable['name']})", "1") for word in [*found["command"], *found["args"]]]
    assert words.pop(0) == "hymba-tune"
    flags = settings(words)
    assert flags.nnodes == spec["completions"] == spec["parallelism"]
    assert flags.nproc == str(found["resources"]["limits"]["nvidia.com/gpu"])
    assert (flags.node_rank, flags.rendezvous) == (1, f"{name}-0.{service['metadata']['name']}:29500")


def test_pytorchjob_starts_torchrun_in_each_pod() -> None:
    (job,) = documents("kubernetes-pytorchjob.yaml")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert replicas["Master"]["template"] == replicas["Worker"]["template"]
    found = container(replicas["Master"]["template"])
    assert job["spec"]["nprocPerNode"] == str(found["resources"]["limits"]["nvidia.com/gpu"])
    assert found["command"][:3] == ["torchrun", "-m", "hymba_tune.cli"]
    settings([*found["command"][3:], *found["args"]])


def test_ray_runs_the_command_of_its_docstring() -> None:
    source = (FOLDER / "ray_train.py").read_text(encoding="utf-8")
    compile(source, "ray_train.py", "exec")
    line = re.search(r"python ray_train\.py --workers \d+ -- (.+)", source)
    assert line
    settings(["sft", *shlex.split(line[1])])


@pytest.mark.parametrize("name", ["torchrun.sh", "slurm.sbatch"])
def test_scripts_stop_at_the_first_error(name: str) -> None:
    assert "set -euo pipefail" in (FOLDER / name).read_text()
