"""The folder of a run: one process at a time works in it, and a failed or dry run leaves it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

from hymba_tune.adapters import folders_of
from hymba_tune.config import TrainingConfig
from hymba_tune.data.mixes import local_files
from hymba_tune.distributed.processes import from_main
from hymba_tune.files import LOCK, RUN, check_folder, locked, make_folders, remove_empty, replacing, write_errors
from hymba_tune.registry import ModelSource
from hymba_tune.train.run import Run


@contextmanager
def claimed(run: Run, config: TrainingConfig, source: ModelSource) -> Iterator[None]:
    """Create a run's folder and lock it while the run is in progress; of several processes the first one does so.

    A new run that fails before its first checkpoint leaves no folder behind, and a run that it was to replace is
    restored. A dry run writes nothing, and leaves the folder as it was.

    Args:
        run: The run. Its path changes if another process has taken its default name.
        config: The run's settings.
        source: The model that training starts from.

    Raises:
        ConfigError: If another process works in the folder, or if it must not or cannot be written.
    """
    with ExitStack() as stack:

        def claim() -> Path:
            stack.enter_context(_claimed(run, config, source))
            return run.path

        run.path = from_main(claim, "taking the run's folder")
        yield


@contextmanager
def _claimed(run: Run, config: TrainingConfig, source: ModelSource) -> Iterator[None]:
    if config.resume:
        with locked(run.path / LOCK, f"--resume {run.path}"):
            yield
        return
    folders = [path for name in config.inputs if name and (path := Path(name).expanduser()).is_dir()]
    with write_errors("--out", run.path):
        created = _make(run, named=config.out is not None)
    try:
        with locked(run.path / LOCK, f"--out {run.path}"):
            inputs = [*folders_of(source), *folders, *local_files(config.inputs)]
            check_folder(run.path, RUN, overwrite=config.overwrite, inputs=inputs)
            with nullcontext() if config.dry_run else replacing(run.path, RUN, run.has_checkpoint):
                yield
    finally:
        remove_empty(created)


def _make(run: Run, *, named: bool) -> list[Path]:
    """Create the folder of a run, under the next free name where the user has named none; see `make_folders`."""
    if named:
        return make_folders(run.path)
    first = run.path
    parents = make_folders(first.parent)
    number = 1
    while True:
        try:
            run.path.mkdir()
            return [run.path, *parents]
        except FileExistsError:  # a run that was started in the same second
            number += 1
            run.path = first.with_name(f"{first.name}-{number}")
