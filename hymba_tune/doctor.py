"""What this machine has, and how Hymba would compute on it."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import huggingface_hub
import torch

from hymba_tune.checkpoint import choose_device, choose_dtype, choose_kernels
from hymba_tune.config import DoctorConfig
from hymba_tune.model import HymbaConfig
from hymba_tune.model.backends import Choice

LIBRARIES = (
    *("hymba-tune", "torch", "transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes"),
    *("triton", "mamba-ssm", "causal-conv1d", "flash-attn", "kernels"),
)


@dataclass(frozen=True)
class Diagnosis:
    """What `examine` finds.

    Attributes:
        python: Its version.
        platform: Operating system and processor type.
        versions: By library; None where it is not installed.
        device: Such as "cuda:0".
        name: Of the device.
        memory_bytes: Of the device; of the whole machine for a CPU.
        details: What else decides how it computes.
        dtype: The number format that was asked about.
        kernels: What is taken and why not another, by operation.
        hub: Whether models can be pulled and pushed.
    """

    python: str
    platform: str
    versions: dict[str, str | None]
    device: str
    name: str
    memory_bytes: int
    details: list[str]
    dtype: str
    kernels: dict[str, Choice]
    hub: str


def examine(config: DoctorConfig) -> Diagnosis:
    """Look at this machine, as a training run on it would.

    Raises:
        ConfigError: If there is no such device, or it does not compute in the number format.
    """
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    name, memory, details = _describe_cuda(device) if device.type == "cuda" else _describe_cpu()
    return Diagnosis(
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        versions={library: _version(library) for library in LIBRARIES},
        device=str(device),
        name=name,
        memory_bytes=memory,
        details=details,
        dtype=str(dtype).removeprefix("torch."),
        kernels=choose_kernels({}, HymbaConfig(), device, dtype),
        hub=_hub(),
    )


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def _describe_cuda(device: torch.device) -> tuple[str, int, list[str]]:
    facts = torch.cuda.get_device_properties(device)
    details = [f"sm_{facts.major}{facts.minor}", f"CUDA {torch.version.cuda}"]
    return facts.name, facts.total_memory, details


def _describe_cpu() -> tuple[str, int, list[str]]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    details = [f"{torch.get_num_threads()} threads", torch.backends.cpu.get_cpu_capability()]
    return _cpu_name(), memory, details


def _cpu_name() -> str:
    """As the kernel calls it, where that can be read; `platform` knows only the kind of processor there."""
    if (info := Path("/proc/cpuinfo")).is_file():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        if lines:
            return lines[0].partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _hub() -> str:
    """Asks the Hub only where there is a token to ask about."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return "offline (HF_HUB_OFFLINE): only models already here can be used"
    if huggingface_hub.get_token() is None:
        return "not logged in: public models can be pulled (to push: hf auth login)"
    try:
        return f"logged in as {huggingface_hub.whoami()['name']}: models can be pulled and pushed"
    except Exception as error:  # whatever the network or the Hub answers, the rest of the diagnosis stands
        return f"a token is stored, but the Hub did not confirm it: {type(error).__name__}"
