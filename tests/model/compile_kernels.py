"""Compile the Triton kernels of the model at the released shape, without a GPU, and print what each one needs.

    python -m tests.model.compile_kernels sm_90|gfx942|... first|every [MODULE ...]

For each kernel and the first or every one of the configurations that autotune tries, one line of JSON: the registers of
a thread, the bytes that are spilled and the bytes of shared memory. ptxas gives them for NVIDIA, the assembly for AMD.
Nothing is launched.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import sys
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # read when Triton is imported

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.autotuner import Autotuner

from tests.model.kernel_launches import LAUNCHES

NVIDIA = {"registers": r"Used (\d+) registers", "spilled": r"(\d+) bytes spill stores"}
AMD = {"registers": r"\.vgpr_count: +(\d+)", "spilled": r"\.private_segment_fixed_size: +(\d+)"}


def target_of(name: str) -> GPUTarget:
    """Return the target with a name like sm_90 or gfx942; the threads of a warp differ between AMD's generations."""
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    return GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)


def compile_instead_of_launching(target: GPUTarget, configs: str = "every") -> None:
    """From now on, a launch compiles its kernel, in these configurations of autotune, and prints what it needs."""
    gpu = {"get_current_device": lambda: 0, "get_current_stream": lambda _: 0, "get_current_target": lambda: target}
    triton.runtime.driver.set_active(SimpleNamespace(**gpu))
    knobs.compilation.always_compile = True  # a kept binary has no log
    knobs.nvidia.dump_ptxas_log = True
    compiled = set()
    run = triton.JITFunction.run

    def compile_only(kernel: Any, *arguments: Any, **options: Any) -> Any:
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            binary = run(kernel, *arguments, **options | {"warmup": True})
        if binary in compiled:
            return binary
        compiled.add(binary)
        report, patterns = (log.getvalue(), NVIDIA) if target.backend == "cuda" else (binary.asm["amdgcn"], AMD)
        needs = {name: max(map(int, re.findall(pattern, report))) for name, pattern in patterns.items()}
        config = {name: size for name, size in options.items() if name.isupper() or name.startswith("num_")}
        row = {"kernel": kernel.__name__, "module": kernel.__module__, **needs, "shared": binary.metadata.shared}
        sys.stdout.write(json.dumps(row | {"config": config}) + "\n")
        return binary

    def compile_all(kernel: Any, *arguments: Any, **options: Any) -> Any:
        options.pop("warmup")
        kernel.configs = kernel.configs[:1] if configs == "first" else kernel.configs
        return kernel.warmup(*arguments, **options)

    triton.JITFunction.run = compile_only
    Autotuner.run = compile_all


def main(target: str, configs: str, modules: list[str]) -> None:
    """Compile the kernels of some modules, by default of all registered ones."""
    compile_instead_of_launching(target_of(target), configs)
    for module in modules or LAUNCHES:
        importlib.import_module(f"hymba_tune.model.{module}")
        LAUNCHES[module]()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
