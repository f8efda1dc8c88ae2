"""Compiled kernels from the Hub, for users of the package `kernels`."""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType

logger = logging.getLogger(__name__)

VERSIONS = {"causal-conv1d": 1, "mamba-ssm": 4, "flash-attn2": 4}
"""The version of each kernel, by its name in the organization kernels-community."""


@cache
def hub_kernel(name: str) -> ModuleType | None:
    """Return a kernel by its name in `VERSIONS`, or None without the package or a build for this machine.

    By installing `kernels`, the user permits the download. It loads compiled code only from publishers that the Hub
    trusts, and with HF_HUB_OFFLINE only code that was downloaded before.
    """
    try:
        from kernels import get_kernel
    except ImportError:
        return None
    try:
        kernel: ModuleType = get_kernel(f"kernels-community/{name}", version=VERSIONS[name])
    except Exception as error:  # no network, no build for this machine, or an untrusted publisher
        logger.info("the kernel %s is not available from the Hub: %s", name, error)
        return None
    return kernel
