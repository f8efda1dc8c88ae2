"""A worker that `launch` starts in tests: it does what its settings name, and imports no more than that needs."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import NoReturn

from hymba_tune.distributed import watch
from hymba_tune.distributed.environment import rank
from hymba_tune.distributed.launch import INTERRUPTED, has_final_ending, restarts, settings_of_parent


def wait() -> NoReturn:
    """Wait for what the test waits for; longer than any of them."""
    threading.Event().wait(60)
    sys.exit(99)


def end(code: int, message: str) -> NoReturn:
    watch.tell(code, message)
    sys.exit(0 if has_final_ending() else code)


def meet() -> None:
    import torch

    from hymba_tune.distributed.processes import join

    join(torch.device("cpu"), start_timeout=60, step_timeout=3)


def main(what: str) -> None:
    if what == "fail" and rank() == 1:
        end(2, "--rank 0: must be at least 1.")
    if what == "crash" and rank() == 1:
        end(1, "Internal error: KeyError")
    if what == "killed" and rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "exit" and rank() == 1:
        os._exit(3)
    if what == "killed once":
        if restarts():
            return
        if rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    if what == "stopped":
        meet()
        if rank() == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
    if what == "interrupted" and rank() == 0:
        os.kill(os.getppid(), signal.SIGINT)
    if what != "done":
        try:
            wait()
        except KeyboardInterrupt:
            end(INTERRUPTED, "")


if __name__ == "__main__":
    started = settings_of_parent()
    watch.GRACE_SECONDS = 0.0
    watch.start()
    main(os.environ["TEST_WORKER"])
