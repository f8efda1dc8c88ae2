"""Diagnosis of a machine: libraries, device, and the kernels that Hymba would use."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import huggingface_hub
import torch

from hymba_tune.checkpoint import choose_device, choose_dtype, choose_kernels
from hymba_tune.config import DoctorConfig
from hymba_tune.memory import machine_memory
from hymba_tune.model import HymbaConfig
from hymba_tune.model.backends import Choice

LIBRARIES = (
    *("hymba-tune", "torch", "transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes"),
    *("triton", "mamba-ssm", "causal-conv1d", "flash-attn", "kernels"),
)
PLATFORMS = {
    "CPU": f"works: tested with every release{'' if sys.platform == 'linux' else ', but never on this system'}",
    "NVIDIA": "unknown: kernels compile for sm_80 to sm_120; each is used after its self-test on your GPU",
    "ROCm (AMD)": "unknown: kernels compile for gfx942 and gfx1100; each is used after its self-test on your GPU",
    "mps (Apple)": "refused: nothing has been tried there; --device cpu works",
}
"""What is known of the kernels on each kind of device: works, refused, or unknown because none was at hand."""
BUILT = {"mamba": ("mamba-ssm", "causal-conv1d"), "flash": ("flash-attn",)}
"""The packages of kernels that are built for a card, by extra of hymba-tune."""


@dataclass(frozen=True)
class Diagnosis:
    """The result of `examine`.

    Attributes:
        python: The Python version.
        platform: Operating system and processor type.
        versions: Version of each library; None if it is not installed.
        device: The device, such as "cuda:0".
        name: The device's product name.
        memory_bytes: Memory of the device, or of the whole machine for a CPU.
        details: Other facts that decide which kernels are used.
        dtype: The dtype that the kernels were chosen for.
        kernels: The chosen kernel and the reasons against others, by operation.
        builds: The command that builds the missing packages of an extra for this card, by extra; none without a GPU.
        platforms: What is known of the kernels on each kind of device.
        hub: Whether models can be pulled from and pushed to the Hub.
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
    builds: dict[str, str]
    platforms: dict[str, str]
    hub: str


def examine(config: DoctorConfig) -> Diagnosis:
    """Examine this machine as a training run would.

    Raises:
        ConfigError: If the device does not exist or does not support the dtype.
    """
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    name, memory, details = _describe_cuda(device) if device.type == "cuda" else _describe_cpu()
    # The metadata of a wheel from PyPI leave out which CUDA it was built for.
    versions = {library: _version(library) for library in LIBRARIES} | {"torch": torch.__version__}
    missing = [extra for extra, packages in BUILT.items() if not all(versions[package] for package in packages)]
    return Diagnosis(
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        versions=versions,
        device=str(device),
        name=name,
        memory_bytes=memory,
        details=details,
        dtype=str(dtype).removeprefix("torch."),
        kernels=choose_kernels({}, HymbaConfig(), device, dtype),
        builds={extra: build_command(extra, details[0]) for extra in missing} if device.type == "cuda" else {},
        platforms=PLATFORMS,
        hub=_hub(),
    )


def build_command(extra: str, architecture: str) -> str:
    """Return the command that builds the packages of an extra for a card.

    The variables are those that the packages' setup files read. mamba-ssm and causal-conv1d are built for every NVIDIA
    card; flash-attn has one build for all cards of compute capability 8.

    Args:
        extra: A key of `BUILT`.
        architecture: The architecture of the card, such as "sm_90" or "gfx942".
    """
    install = f"pip install --no-build-isolation 'hymba-tune[{extra}]'"
    cuda = architecture.startswith("sm_")
    if extra == "flash":
        archs = f"FLASH_ATTN_CUDA_ARCHS={architecture[3:-1]}0" if cuda else f"GPU_ARCHS={architecture}"
        return f"MAX_JOBS=4 {archs} {install}"
    return f"MAMBA_KEEP_CUDA_BUILD=TRUE {install}" if cuda else f"HIP_ARCHITECTURES={architecture} {install}"


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def _describe_cuda(device: torch.device) -> tuple[str, int, list[str]]:
    facts = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return facts.name, facts.total_memory, [facts.gcnArchName.partition(":")[0], f"ROCm {torch.version.hip}"]
    return facts.name, facts.total_memory, [f"sm_{facts.major}{facts.minor}", f"CUDA {torch.version.cuda}"]


def _describe_cpu() -> tuple[str, int, list[str]]:
    details = [f"{torch.get_num_threads()} threads", torch.backends.cpu.get_cpu_capability()]
    return _cpu_name(), machine_memory(), details


def _cpu_name() -> str:
    """The processor's name from the Linux kernel if available; `platform` knows only the architecture there."""
    if (info := Path("/proc/cpuinfo")).is_file():
        lines = [
            line
            for line in info.read_text(encoding="utf-8", errors="replace").splitlines()
            if line.startswith("model name")
        ]
        if lines:
            return lines[0].partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _hub() -> str:
    """The login state; sends a request to the Hub only if a token is stored."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return "offline (HF_HUB_OFFLINE): only models on this machine can be used"
    if huggingface_hub.get_token() is None:
        return "not logged in: public models can be pulled (to push: hf auth login)"
    try:
        return f"logged in as {huggingface_hub.whoami()['name']}: models can be pulled and pushed"
    except Exception as error:  # no error of the network or the Hub may prevent the rest of the diagnosis
        return f"a token is stored, but the Hub did not confirm it: {type(error).__name__}"
