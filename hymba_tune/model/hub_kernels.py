"""Compiled kernels from the Hub, where the package `kernels` is installed."""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType

logger = logging.getLogger(__name__)

VERSIONS = {"causal-conv1d": 1, "mamba-ssm": 4, "flash-attn2": 4}
"""The kernels used here, by their names in the organization kernels-community."""


@cache
def hub_kernel(name: str) -> ModuleType | None:
    """A kernel by its name in `VERSIONS`, or None where there is no `kernels`, or it has none for this machine.

    Installing `kernels` is what allows the download: it takes compiled code of publishers only that the Hub trusts, and
    with HF_HUB_OFFLINE nothing but what was downloaded before.
    """
    try:
        from kernels import get_kernel
    except ImportError:
        return None
    try:
        kernel: ModuleType = get_kernel(f"kernels-community/{name}", version=VERSIONS[name])
    except Exception as error:  # no network, no build for this machine, a publisher that is not trusted
        logger.info("the kernel %s cannot be had from the Hub: %s", name, error)
        return None
    return kernel
