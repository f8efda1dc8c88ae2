"""`hymba-tune serve`."""

from __future__ import annotations

import importlib.util
from contextlib import suppress
from typing import Annotated

from cyclopts import Parameter

from hymba_tune.cli.screen import RichScreen, console, loading, print_chosen_gpu, quiet_libraries
from hymba_tune.cli.settings import check_first
from hymba_tune.config import ServeConfig
from hymba_tune.errors import ConfigError

NEEDED = ("starlette", "uvicorn", "llguidance", "prometheus_client")
"""The packages of the extra "serve"."""


def serve(
    model: Annotated[str, Parameter(name="MODEL")],
    /,
    *,
    flags: Annotated[ServeConfig, Parameter(name="*")] = ServeConfig(),  # noqa: B008 (cyclopts reads the default)
) -> None:
    """Serve a model over OpenAI's HTTP API: chat and text completions, several at once. Ctrl-C stops the server.

    Example: hymba-tune serve runs/my-run --port 8000

    Parameters
    ----------
    model
        A run directory, or any model that --model accepts.
    """
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"serve needs {missing[0]}, which is not installed.", fix="pip install 'hymba-tune[serve]'")
    flags.model = model
    check_first(flags)
    with loading():
        from hymba_tune.serve import Server

    quiet_libraries()
    print_chosen_gpu(flags.device)
    server = Server(flags, RichScreen().working)
    console.print(f" {server.name} at {server.url}", markup=False, soft_wrap=True)
    if server.note:
        console.print(f" {server.note}", style="dim", markup=False, soft_wrap=True)
    if not server.local and flags.api_key is None:
        console.print(" no --api-key: anyone who can reach this port can use the model", style="yellow")
    with suppress(KeyboardInterrupt):  # the documented way to stop it
        server.run()
