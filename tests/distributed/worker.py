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


def stop() -> None:
    import torch

    from hymba_tune.distributed.processes import join

    join(torch.device("cpu"), start_timeout=60, step_timeout=3)
    if rank() == 1:
        os.kill(os.getpid(), signal.SIGSTOP)


def kill_once() -> None:
    if restarts():
        sys.exit(0)
    if rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)


BY_RANK_1 = {
    "fail": lambda: end(2, "--rank 0: must be at least 1."),
    "crash": lambda: end(1, "Internal error: KeyError"),
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exit": lambda: os._exit(3),
    "interrupted": lambda: os.kill(os.getppid(), signal.SIGINT),
}
BY_BOTH = {"done": lambda: sys.exit(0), "stopped": stop, "killed once": kill_once}


def main(what: str) -> None:
    """Do it, and wait to be ended where it has not ended the process."""
    settings_of_parent()
    watch.GRACE_SECONDS = 0.0
    watch.start()
    try:
        BY_BOTH.get(what, lambda: None)()
        if rank() == 1:
            BY_RANK_1.get(what, lambda: None)()
        wait()
    except KeyboardInterrupt:
        end(INTERRUPTED, "")


if __name__ == "__main__":
    main(os.environ["TEST_WORKER"])
