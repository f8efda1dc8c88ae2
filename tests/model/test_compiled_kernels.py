"""Every Triton kernel of the model compiles for every target at the released shape, and fits its registers."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hymba_tune.model
from hymba_tune.model.scan_triton_kernels import INSTALLED
from tests.conftest import ROOT

FOLDER = Path(hymba_tune.model.__file__).parent
TARGETS = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100"]
CASES = [
    ("sm_90", "first"),
    ("gfx1100", "first"),
    *(pytest.param(target, "every", marks=pytest.mark.slow) for target in TARGETS),
]
"""Two targets by default, in the first configuration that autotune tries: every target takes some ten seconds."""

REGISTERS = {"sm": 168, "gfx": 256}
"""168 registers leave room for 12 warps a multiprocessor; 256 are all that a wavefront of AMD can address."""
SHARED = 48 * 1024
"""The bytes of shared memory that every card gives to a program without being asked."""


def kernels() -> dict[str, set[str]]:
    """Return the kernels of each module: the functions compiled by Triton that no other one calls."""
    functions = {
        (path.stem, node.name): {
            call.func.id for call in ast.walk(node) if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
        }
        for path in FOLDER.glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
        and any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    }
    called = set[str]().union(*functions.values())
    found: dict[str, set[str]] = {}
    for module, name in functions:
        if name not in called:
            found.setdefault(module, set()).add(name)
    return found


@pytest.mark.skipif(not INSTALLED, reason="triton is not installed")
@pytest.mark.parametrize(("target", "configs"), CASES)
def test_every_kernel_compiles_and_fits(target: str, configs: str, tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    # Triton 3.7 itself makes trees that Python 3.14 warns of.
    warnings = ["-W", "error", "-W", "ignore:AnnAssign.__init__:DeprecationWarning"]
    command = [sys.executable, *warnings, "-m", "tests.model.compile_kernels", target, configs]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]

    compiled: dict[str, set[str]] = {}
    for row in rows:
        compiled.setdefault(row["module"].rpartition(".")[2], set()).add(row["kernel"])
    assert compiled == kernels(), "a kernel is not launched by tests/model/kernel_launches.py"

    ceiling = REGISTERS[target.rstrip("_0123456789")]
    for row in rows:
        assert row["registers"] <= ceiling, row
        assert row["spilled"] == 0, row
        assert row["shared"] <= SHARED, row
