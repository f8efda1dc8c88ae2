"""What all training verbs share: reading settings, showing the run, its result and the next commands."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from rich.text import Text

from hymba_tune.cli.processes import if_restarted, settings_if_worker, train_in_processes
from hymba_tune.cli.screen import RichScreen, console, visible
from hymba_tune.cli.settings import check_first, combine
from hymba_tune.config import TrainingConfig, Verb
from hymba_tune.distributed.environment import is_main
from hymba_tune.errors import command
from hymba_tune.files import read_json

if TYPE_CHECKING:
    from hymba_tune.train.run import Run
    from hymba_tune.train.screen import Screen

C = TypeVar("C", bound=TrainingConfig)


def read_settings(recipe: str | None, flags: C) -> C:
    """Return the settings of a run: a recipe's, overridden by flags, or those of the run that ``--resume`` names.

    They are checked as far as possible without a download and without importing torch. Where several processes are
    asked for, those are started then, and this function does not return.

    Args:
        recipe: A YAML file, or the name of a packaged recipe.
        flags: The verb's flags.

    Raises:
        HymbaTuneError: If a setting, a file or the machine must be changed first, or one of several processes has died.
        SystemExit: If the run was done by several processes.
    """
    if (started := settings_if_worker(flags)) is not None:
        return if_restarted(started)
    settings = combine(recipe, flags)
    if settings.resume:
        from hymba_tune.train.resuming import resume_config

        settings = resume_config(settings)
    check_first(settings)
    if settings.track:
        from hymba_tune.train.tracking import check_trackers

        check_trackers(settings.track)
    return train_in_processes(settings)


def run_verb(settings: C, train: Callable[[C, Screen], Run | None]) -> None:
    """Train, and show the result.

    Args:
        settings: The settings from `read_settings`.
        train: The function that trains.
    """
    from transformers.utils.logging import disable_progress_bar

    from hymba_tune.train.screen import Screen

    disable_progress_bar()  # the run's log gets the libraries' messages
    try:
        run = train(settings, RichScreen() if is_main() else Screen())
    except KeyboardInterrupt as interrupt:
        if interrupt.args:
            resume = command(settings.verb, "--resume", interrupt.args[0])
            console.print(f"\n stopped and saved; to resume: {resume}", markup=False, soft_wrap=True)
            console.print(f" report so far: {interrupt.args[0]}/report.html", markup=False, soft_wrap=True)
        raise
    if not is_main():
        return
    if run is None:
        console.print(" dry run: nothing was trained or written; leave --dry-run out to train", markup=False)
    else:
        _show_result(run, settings.verb)


def _show_result(run: Run, verb: Verb) -> None:
    from hymba_tune.report import RunRecord, judge

    evaluations = list(run.evaluations())
    console.print()
    rewards = [row.more["eval_reward"] for row in evaluations if "eval_reward" in row.more]
    verdict = judge(RunRecord.read(run.path))
    tested = f", {verdict.tested}" if verdict.tested else ""
    if len(rewards) > 1:
        console.print(f" held-out reward  {rewards[0]:.3f} → {rewards[-1]:.3f}{tested}", markup=False)
    elif len(evaluations) > 1:
        final = run.facts()["kept"]
        best = min(evaluations[1:], key=lambda row: row.eval_loss or 0.0)
        where = f"step {final['step']}, the {final['why']} weights"
        change = f"{evaluations[0].eval_loss:.3f} → {final['eval_loss']:.3f}"
        console.print(f" held-out loss  {change} ({where}){tested}", markup=False)
        ended = next((row for row in evaluations if row.step == final["step"]), best)
        for name, loss in evaluations[0].source_losses.items():
            if name in ended.source_losses:
                console.print(f"   {visible(name)}  {loss:.3f} → {ended.source_losses[name]:.3f}", markup=False)
        if best.eval_loss < final["eval_loss"]:
            console.print(
                f" it was {best.eval_loss:.3f} at step {best.step}: --keep best ends with those weights", markup=False
            )
        if ended.eval_accuracy is not None and verb.accuracy is not None:
            label = f"held-out {verb.accuracy.subject} {verb.accuracy.verdict}"
            console.print(f" {label}: {ended.eval_accuracy:.0%}", markup=False)
    if "before" in (answers := run.facts().get("answers", {})):
        counts = f"{answers['before']:,} → {answers['after']:,} of {answers['questions']:,}"
        outcome = f", {verdict.answers.word}" if verdict.answers else ""
        console.print(f" right answers {counts}{outcome}", markup=False)
    _show_samples(run)
    for note in verdict.notes:
        console.print(f"\n {note}", markup=False)
    console.print("\n " + "\n ".join(_next_steps(run, verb)), markup=False, soft_wrap=True)


def _next_steps(run: Run, verb: Verb) -> list[str]:
    lines = [f"run directory        {run.path}", f"report               {run.path}/report.html"]
    if verb.scores:
        return [*lines, f"score texts with it  {run.path}/README.md"]
    lines.append(f"chat with it         {command('chat', run.path)}")
    if run.adapter.is_dir():
        lines.append(f"merge into one model {command('merge', run.path, '--out', f'{run.name}-merged')}")
    return lines


def _show_samples(run: Run) -> None:
    for sample in read_json(run.path / "samples.json", list) or []:
        console.print()
        for label, style in (("prompt", "dim"), ("before", "dim"), ("after", "")):
            if label not in sample:  # a crash has torn the file before the run was resumed
                continue
            reward = f" [reward {sample[f'reward {label}']}]" if f"reward {label}" in sample else ""
            console.print(Text.assemble((f" {label:<8}", "dim"), (f"{sample[label]}{reward}", style)))
