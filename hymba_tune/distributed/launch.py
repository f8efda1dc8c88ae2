"""The process that starts the others: it relaunches its command, once a device, and has one message if that fails.

The workers find `ERRORS` in their environment, the name of a file in a temporary folder. Beside it lie the settings,
which the workers take over as they are, so that all of them and all restarts agree. A worker that ends by a mistake of
the user, or by Ctrl-C, writes why to that file and exits with 0: nothing is restarted for it. A worker that ends by any
other error writes it beside that file.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

from hymba_tune.config import LaunchOptions
from hymba_tune.distributed.devices import count_cores
from hymba_tune.distributed.environment import rank
from hymba_tune.errors import ConfigError, HymbaTuneError, TrainingError, command
from hymba_tune.files.checkpoints import CHECKPOINTS, newest_whole

ERRORS = "HYMBA_TUNE_ERROR_FILE"
"""The variable that names the file to which a worker writes how it ended."""
WORKER = ("-m", "hymba_tune.cli")
"""The arguments of Python that run a command."""
SETTINGS = "settings.pickle"
ENDED_BY_ANOTHER = 70
"""Exit code of a worker that has ended because another one has."""
INTERRUPTED = 130
FINAL = (HymbaTuneError.exit_code, INTERRUPTED)
"""Exit codes of commands that another try would not change."""
PREFIX, ENDED = "hymba-tune", "ended"
"""The prefix of all keys in the store, and the key under which the first process that ends by an error says so."""
READ_SECONDS = 3.0
"""The time in which every process of another machine has looked at the store."""


@dataclass(frozen=True)
class Ending:
    """How a worker ended.

    Attributes:
        code: The exit code that the command ends with.
        message: What to tell the user; empty after Ctrl-C.
        rank: The worker's rank.
    """

    code: int
    message: str
    rank: int


class RankError(TrainingError):
    """A process has died, or stopped answering.

    Args:
        cause: The process, its machine and what ended it.
        exit_code: The code with which the command exits.
        fix: What to do about it.
        more: What has become of the others, and of the run.

    Attributes:
        cause: As above, for the other machines.
    """

    def __init__(self, cause: str, *, exit_code: int, fix: str, more: str = ".") -> None:
        super().__init__(cause + more, fix=fix)
        self.cause = cause
        self.exit_code = exit_code


def error_file() -> Path | None:
    """Return the file to which this process writes how it ended, if it is a worker of `launch`."""
    name = os.environ.get(ERRORS)
    return Path(name) if name else None


def restarts() -> int:
    """Return how often the workers have been restarted."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)


def write_ending(code: int, message: str) -> None:
    """Write how this worker ended; the first one to do so is believed.

    Args:
        code: The exit code that the command ends with.
        message: What to tell the user.
    """
    path = error_file()
    if path is None:
        return
    if code not in FINAL:
        path = path.with_name(f"{path.name}.{restarts()}")
    part = path.with_name(f"part.{os.getpid()}")
    part.write_text(json.dumps(asdict(Ending(code, message, rank()))), encoding="utf-8")
    with suppress(FileExistsError):
        os.link(part, path)  # whole or not at all, and never over another one
    part.unlink()


def read_ending(errors: Path, attempt: int | None = None) -> Ending | None:
    """Return how the first worker ended, if one has written it.

    Args:
        errors: The file that `ERRORS` names.
        attempt: The restart in which it ended by an error that is not the user's; None for those that are, and Ctrl-C.
    """
    path = errors if attempt is None else errors.with_name(f"{errors.name}.{attempt}")
    return Ending(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def has_final_ending() -> bool:
    """Return whether this is a worker of `launch`, of which one has ended as a restart would not change."""
    path = error_file()
    return path is not None and path.exists()


def settings_of_parent() -> Any:
    """Return the settings with which `launch` has started this worker; None if it has not.

    Raises:
        SystemExit: If the workers were restarted, but need not have been.
    """
    path = error_file()
    if path is None:
        return None
    if path.exists():
        raise SystemExit(0)
    return pickle.loads(path.with_name(SETTINGS).read_bytes())


def launch(verb: str, settings: LaunchOptions, processes: int, *, run: Path | None = None) -> None:
    """Run a command in several processes, and wait for them.

    Args:
        verb: The command's name; each worker runs it with ``settings``.
        settings: The settings, with nothing left to be chosen.
        processes: The number of processes on this machine.
        run: The run directory, if the command trains.

    Raises:
        HymbaTuneError: If a worker has ended by a mistake of the user, or has died.
        KeyboardInterrupt: If Ctrl-C ended the workers.
    """
    if sys.platform == "win32":
        raise ConfigError(
            f"{verb}: several processes cannot work together on Windows: they need signals and sessions of Linux.",
            fix="leave out --nproc, --nnodes, --strategy and --max-restarts, or run it in WSL 2",
        )
    with tempfile.TemporaryDirectory(prefix="hymba-tune-processes-") as folder:
        errors = Path(folder, "error")
        (errors.parent / SETTINGS).write_bytes(pickle.dumps(settings))
        environment = {ERRORS: str(errors)}
        # Each process would otherwise start as many threads as there are cores.
        environment["OMP_NUM_THREADS"] = str(max(1, count_cores() // processes))
        for name, value in environment.items():
            os.environ.setdefault(name, value)
        try:
            with _interrupts(errors) as interrupts:
                _run_workers(verb, settings, processes, errors, run)
        finally:
            del os.environ[ERRORS]
        ending = read_ending(errors)
        if interrupts or (ending is not None and ending.code == INTERRUPTED):
            raise KeyboardInterrupt
        if ending is not None:
            raise HymbaTuneError(ending.message)


def _run_workers(verb: str, settings: LaunchOptions, processes: int, errors: Path, run: Path | None) -> None:
    # Imported here because that takes seconds.
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    worker = [*WORKER, *verb.split()]
    logging.disable(logging.CRITICAL)  # its messages are about itself
    try:
        elastic_launch(_launch_config(settings, processes), sys.executable)(*worker)
    except ChildFailedError as failed:
        if read_ending(errors) is None and not errors.with_name(f"{INTERRUPT}1").exists():
            error = _describe_failures(failed.failures, errors, verb, run)
            if settings.nnodes > 1:
                _tell_other_machines(settings, error)
            raise error from failed
    except SignalException as stopped:
        raise SystemExit(128 + stopped.sigval) from stopped
    except Exception as error:
        if not _is_unanswered(error):
            raise
        raise ConfigError(
            f"--rendezvous {settings.rendezvous}: not all of the {settings.nnodes} machines answered within "
            f"--start-timeout {settings.start_timeout} s.",
            expected="the same command on each machine, with its own --node-rank, and a port that no firewall closes",
            fix="start the missing machines, or increase --start-timeout",
        ) from error
    finally:
        logging.disable(logging.NOTSET)


def _is_unanswered(error: BaseException) -> bool:
    import torch.distributed as dist
    from torch.distributed.elastic.rendezvous import RendezvousError

    return isinstance(error, RendezvousError | dist.DistNetworkError | dist.DistStoreError)


def _launch_config(settings: LaunchOptions, processes: int) -> Any:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    alone = settings.nnodes == 1
    seconds = settings.start_timeout
    backend: dict[str, Any] = {"read_timeout": seconds, "join_timeout": seconds}
    if settings.node_rank is not None and not alone:
        backend = {"rank": settings.node_rank, "timeout": seconds}
    return LaunchConfig(
        min_nodes=settings.nnodes,
        max_nodes=settings.nnodes,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex if alone else "hymba-tune",
        rdzv_backend="static" if "rank" in backend else "c10d",
        rdzv_endpoint="localhost:0" if alone else str(settings.rendezvous),
        rdzv_configs=backend,
        local_addr="localhost" if alone else None,
        max_restarts=settings.max_restarts,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        signals_to_handle=",".join(STOPPING),
    )


STOPPING = ("SIGTERM", "SIGHUP", "SIGQUIT")
"""Signals at which the launcher stops the workers; Ctrl-C is left to `_interrupts`."""
INTERRUPT = "interrupt."
"""Beginning of the names of the files by which the workers learn that Ctrl-C was pressed."""


@contextmanager
def _interrupts(errors: Path) -> Iterator[list[int]]:
    """Pass each Ctrl-C on to the workers, and yield the list of those so far.

    The workers have sessions of their own, so that the terminal sends them none.
    """
    pressed: list[int] = []

    def press(number: int, frame: FrameType | None) -> None:
        del frame
        pressed.append(number)
        errors.with_name(f"{INTERRUPT}{len(pressed)}").touch()

    before = {number: signal.getsignal(getattr(signal, number)) for number in (*STOPPING, "SIGINT")}
    signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        for number, handler in before.items():
            signal.signal(getattr(signal, number), handler)


def _describe_failures(failures: dict[int, Any], errors: Path, verb: str, run: Path | None) -> RankError:
    """Return one error for the process that ended first, as far as that can be known."""
    # What the launcher has stopped itself, or killed later, and what died of another's death, are no causes.
    consequences = (-signal.SIGTERM, ENDED_BY_ANOTHER)
    began = min(failure.timestamp for failure in failures.values()) + 2
    number, failure = min(
        failures.items(),
        key=lambda item: (item[1].timestamp > began, item[1].exitcode in consequences, item[1].exitcode > 0),
    )
    code: int = failure.exitcode
    cause = f"rank {number} on {socket.gethostname()}"
    attempts = [int(path.suffix[1:]) for path in errors.parent.glob(f"{errors.name}.*")]
    ending = read_ending(errors, max(attempts, default=0))
    if code < 0 and code not in consequences:
        cause += f" was ended by {_signal_name(-code)}{_reason(-code)}"
    elif ending is None:
        cause += f" ended with exit code {code}"
    elif ending.code == ENDED_BY_ANOTHER:
        code, cause = ending.code, ending.message
    else:
        code, cause = ending.code, f"rank {ending.rank} on {socket.gethostname()}: {ending.message}"
    last, fix = _ways_on(verb, run)
    return RankError(
        cause, exit_code=code if code > 0 else 128 - code, fix=fix, more=f"; the other processes were stopped.{last}"
    )


def _tell_other_machines(settings: LaunchOptions, error: RankError) -> None:
    """Say in the store that all processes share why those of this machine have ended, and let the others read it."""
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    host, _, port = str(settings.rendezvous).rpartition(":")
    ending = Ending(ENDED_BY_ANOTHER, error.cause, -1)
    with suppress(RuntimeError):
        store = TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=5), wait_for_workers=False)
        shared = PrefixStore(f"{PREFIX}/{settings.max_restarts}", store)
        shared.compare_set(ENDED, "", json.dumps(asdict(ending)))
        time.sleep(READ_SECONDS)


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in signal.valid_signals() else f"signal {number}"


def _reason(number: int) -> str:
    return " (the system does that when memory is full)" if _signal_name(number) == "SIGKILL" else ""


def _ways_on(verb: str, run: Path | None) -> tuple[str, str]:
    """Say from which checkpoint a run can go on, and with which command."""
    if run is None:
        return "", "the same command, which goes on where it stopped"
    checkpoint = newest_whole(run / CHECKPOINTS)
    if checkpoint is None:
        return " There is no complete checkpoint yet.", "the same command again"
    return f" The last complete checkpoint is {checkpoint}.", command(verb, "--resume", run)
