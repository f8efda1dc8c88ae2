"""Training of any kind, from settings to a finished run directory."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, set_seed

from hymba_tune.adapters import (
    FACT,
    add_adapter,
    base_digest,
    base_of,
    count_parameters,
    describe_difference,
    files_of,
    folders_of,
    load_adapter,
    open_model,
    restrict_rows,
    widen_vocabulary,
)
from hymba_tune.config import Method, TrainingConfig
from hymba_tune.data import DataReport
from hymba_tune.distributed.environment import is_main, world_size
from hymba_tune.distributed.processes import agree, from_main, gathered, leave, reach
from hymba_tune.distributed.strategies import check_strategy
from hymba_tune.errors import ConfigError, DataError
from hymba_tune.files import atomic_folder
from hymba_tune.files.checkpoints import step_of
from hymba_tune.memory import keep_freed_memory
from hymba_tune.model import HymbaForSequenceClassification
from hymba_tune.registry import ModelSource, loadable_name
from hymba_tune.train.arguments import global_batch, learning_rates, set_length, shared_arguments
from hymba_tune.train.banner import describe_memory, describe_run
from hymba_tune.train.base import RunTrainer, quantization_unseen
from hymba_tune.train.callbacks import Account, FirstStep, HeldOutParts, Interrupt, Metrics
from hymba_tune.train.card import write_card
from hymba_tune.train.claim import claimed
from hymba_tune.train.ending import reported, whole_model
from hymba_tune.train.guard import LossGuard
from hymba_tune.train.limits import kept_checkpoints, limits_explained
from hymba_tune.train.memory_estimate import MemoryEstimate, bytes_needed_with, estimate_memory
from hymba_tune.train.outline import Outline, outline_of, outline_without_weights
from hymba_tune.train.rows import places_of
from hymba_tune.train.run import Run
from hymba_tune.train.samples import answer_samples
from hymba_tune.train.screen import Screen
from hymba_tune.train.setup import Data, Setup, adapter_config, check
from hymba_tune.train.stopping import BestCheckpoint, Stopping
from hymba_tune.train.task import TrainerBuilder, TrainingTask
from hymba_tune.train.tracking import tracking


def train(task: TrainingTask[TrainingConfig], screen: Screen) -> Run | None:
    """Train a model.

    Args:
        task: The kind of training, with all settings; `resume_config` returns those of a resumed run.
        screen: Shows the progress.

    Returns:
        The finished run; None for a dry run, which leaves nothing behind.

    Raises:
        HymbaTuneError: If a setting, a file or the machine must be changed first; nothing is left behind.
        KeyboardInterrupt: If Ctrl-C ended the run; with the run's path if its checkpoint is written.
    """
    config = task.config
    try:
        setup = check(config)
        with claimed(setup.run, config, setup.source):
            return _train_claimed(setup, task, screen)
    finally:
        leave()


def _train_claimed(setup: Setup, task: TrainingTask[TrainingConfig], screen: Screen) -> Run | None:
    """Train in a folder that the first process has locked."""
    config, run = setup.config, setup.run
    resuming = config.resume is not None
    checkpoint = from_main(run.last_checkpoint, "finding the last checkpoint") if resuming else None

    task_with_data = task.read_data(setup, screen)
    data = task_with_data.data
    agree({"the data": data.report.fingerprint})
    if data.held_out is None and (config.keeps_best or config.early_stopping):
        raise ConfigError(
            f"--{'early-stopping' if config.early_stopping else 'keep best'} needs the held-out loss, and no data is "
            "held out.",
            fix="--eval-data FILE, or an --eval-split above 0",
        )
    if resuming:
        _check_same_data(run, data.report, screen)

    extra_bytes = task_with_data.extra_bytes
    with screen.working("estimating the memory"):
        memory_estimate = estimate_memory(setup, data, extra_bytes)
    if not (memory_estimate.fits or config.dry_run):
        screen.note(describe_memory(setup, memory_estimate))  # before preparation, which may take hours
    builder = task_with_data.prepare(screen)
    described = builder.describe()
    if config.dry_run:
        screen.banner(describe_run(setup, data, outline_without_weights(setup, data), memory_estimate) | described)
        return None

    if resuming:
        run.forget_leftovers()
    else:
        run.create(config)
    reach("the run's folder")
    needs = partial(bytes_needed_with, setup, data, extra_bytes)
    with run.capturing_logs(), limits_explained(run, config, setup.device, needs), tracking(run, config.track):
        set_seed(config.seed)
        with screen.working("loading the weights"):
            model = _open(setup)
        digest = from_main(partial(_base_digest, setup, screen), "reading the base model")
        trainer = _trainer(setup, data, builder, model, screen)
        outline = outline_of(setup, trainer)
        screen.banner(describe_run(setup, data, outline, memory_estimate) | described)
        _record_begin(setup, data, outline, memory_estimate, described, digest)
        if not resuming:
            if is_main():
                data.report.write_dropped(run.path / "dropped.jsonl")
            answer = partial(answer_samples, setup, data, model, "before", screen)
            from_main(answer, "answering prompts")

        with reported(setup, trainer, screen), limits_explained(run, config, setup.device, needs):
            return _train(setup, data, trainer, checkpoint, screen)


def _record_begin(
    setup: Setup,
    data: Data,
    outline: Outline,
    memory_estimate: MemoryEstimate,
    described: dict[str, str],
    digest: dict[str, Any],
) -> None:
    """Record what is known about a run before its first step."""
    # A resumed run has the same defaults, whatever the next version's are.
    config = setup.config
    if outline.by_size and not config.resume:
        config = config.model_copy(update=outline.by_size)
        setup.run.write_config(config)
    settings = config.model_dump(mode="json", exclude={"out", "resume"})
    # Another number of processes may have divided a step otherwise; these settings are compared with config.yaml.
    first = setup.run.facts().get("settings", {}) if config.resume else {}
    settings |= {name: first[name] for name in ("batch_size", "grad_accum") if name in first}
    setup.run.record(
        verb=config.verb.name,
        model=setup.base,
        settings=settings,
        data=data.report.counts(),
        held_out=_held_out_facts(data),
        vocabulary=setup.model_config.vocab_size,
        described=described,
        device=str(setup.device),
        dtype=str(setup.dtype),
        processes=world_size(),
        global_batch=global_batch(config),
        quantized=setup.scheme,
        kernels={name: asdict(choice) for name, choice in setup.kernels.items()},
        **({} if config.resume else {"by_size": sorted(outline.by_size)}),
        memory={"predicted_bytes": memory_estimate.peak, "parts": asdict(memory_estimate.step)},
        optimizer={"name": config.optimizer, "groups": outline.groups},
        packed_share=outline.packed_share,
        **{FACT: digest},
    )


def _held_out_facts(data: Data) -> dict[str, Any]:
    """Return the number of held-out rows, and a digest of their tokens, by which runs can be compared."""
    if data.held_out is None:
        return {"rows": 0}
    digest = hashlib.sha256()
    for name in sorted(data.held_out.column_names):
        if name.endswith(("ids", "label", "labels")):
            digest.update(json.dumps([name, data.held_out[name][:]]).encode())
    return {"rows": len(data.held_out), "fingerprint": digest.hexdigest()}


def _check_same_data(run: Run, report: DataReport, screen: Screen) -> None:
    before = run.facts().get("data", {}).get("fingerprint")
    if before is None:
        screen.note(f"{run.path}/run.json has no record of the data, so it is not known whether the data has changed")
    elif before != report.fingerprint:
        raise DataError(
            f"The data of {run.path} has changed since the run was started.",
            expected="the same rows, so that the run can resume where it stopped",
            fix="restore the data, or start a new run with --model RUN",
        )


def _base_digest(setup: Setup, screen: Screen) -> dict[str, Any]:
    """Return the digest of the base that a run was started with; show a note if it is another one on resuming."""
    now = base_digest(files_of(folders_of(_base(setup))))
    started = setup.run.facts().get(FACT) if setup.config.resume else None
    if not isinstance(started, dict):
        return now
    if (difference := describe_difference(started, now)) is not None:
        screen.note(
            f"the base model, {setup.base}, has changed since the run was started ({difference}): its adapter was "
            "trained on other weights; restore them, or start a new run"
        )
    return started


def _whole_digest(setup: Setup) -> dict[str, Any]:
    """Return the digest of all bytes of a run's base at its end, unless the base has changed since its beginning."""
    started = setup.run.facts()[FACT]
    now = base_digest(files_of(folders_of(_base(setup))), whole=True)
    return now if describe_difference(started, now) is None else started


def _base(setup: Setup) -> ModelSource:
    """Return the model that the trained adapter belongs to."""
    return base_of(setup.source) if setup.continues else setup.source


def _open(setup: Setup) -> PreTrainedModel:
    config = setup.config
    source = _base(setup)
    quantization = setup.quantization.while_loading if setup.quantization else None
    model = open_model(source, dtype=setup.weights_dtype, device=setup.device, quantization=quantization)
    if setup.added_tokens:
        widen_vocabulary(model, setup.model_config.vocab_size)
    if config.verb.scores:
        model = HymbaForSequenceClassification.on_layers_of(model, num_labels=1)
    model.name_or_path, revision = loadable_name(setup.base)  # PEFT records it with the adapter
    if setup.continues and setup.source.adapter:
        adapted = load_adapter(model, setup.source.adapter, trainable=True)
        restrict_rows(adapted, config.targets)
        return _naming_base(adapted, model.name_or_path, revision)
    if config.method is Method.full:
        return model.requires_grad_(True)  # merging a run's adapter has frozen all of it
    adapted = add_adapter(model, adapter_config(config, model, setup.added_tokens), config.targets)
    return _naming_base(adapted, model.name_or_path, revision)


def _naming_base(adapted: PeftModel, name: str, revision: str | None) -> PeftModel:
    """Record the base model of an adapter in its configuration, by the name by which other libraries find it."""
    for config in adapted.peft_config.values():
        config.base_model_name_or_path, config.revision = name, revision
    return adapted


def _trainer(setup: Setup, data: Data, builder: TrainerBuilder, model: PreTrainedModel, screen: Screen) -> RunTrainer:
    config = setup.config
    callbacks: list[Any] = [Metrics(setup.run, screen)]
    if config.method is not Method.full:
        callbacks.append(FirstStep())
    arguments = shared_arguments(setup, held_out=len(data.held_out or ()))
    with screen.working("handing the data to the trainer"), quantization_unseen(model):
        trainer = builder.make_trainer(model, arguments, callbacks)
    check_strategy(config.strategy, trainer.accelerator)
    trainer.rates = learning_rates(setup)
    trainer.held_out_sources = data.held_out_sources
    trainer.kept_checkpoints = kept_checkpoints(config)
    trainer.args.load_best_model_at_end = config.keeps_best
    if config.method is not Method.full:
        trainer.restrict = partial(restrict_rows, targets=config.targets)
    places = partial(places_of, rows=data.train)
    vocabulary = setup.model_config.vocab_size if config.verb.loss_unit else None
    guard = LossGuard(trainer, setup.run, max_spike=config.max_loss_spike, vocabulary=vocabulary, places=places)
    trainer.add_callback(guard)
    trainer.add_callback(HeldOutParts(trainer, setup.run))
    for noisy in list(trainer.callback_handler.callbacks):
        if type(noisy).__name__ in ("PrinterCallback", "ProgressCallback"):
            trainer.remove_callback(noisy)
    set_length(trainer, setup)
    return trainer


def _train(setup: Setup, data: Data, trainer: RunTrainer, checkpoint: Path | None, screen: Screen) -> Run:
    run, config = setup.run, setup.config
    if checkpoint is not None:
        run.forget_after(step_of(checkpoint))
        if step_of(checkpoint) >= trainer.args.max_steps:
            screen.note(f"all {trainer.args.max_steps:,} steps are done; to train longer, increase --steps or --epochs")
    interrupt = Interrupt(trainer)
    account = Account()
    stopping = Stopping(keep_best=config.keeps_best, patience=config.early_stopping)
    for callback in (interrupt, account, stopping):
        trainer.add_callback(callback)
    if setup.device.type == "cpu":
        keep_freed_memory()  # after the weights are loaded, so that loading's own memory returns to the system
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        interrupt.release()
    if trainer.stop_agreed:
        raise KeyboardInterrupt(str(run.path))

    final = stopping.final_checkpoint(trainer.state)
    if final.ended or config.keeps_best:
        screen.note(final.described())
    trained = whole_model(setup, trainer)
    from_main(partial(answer_samples, setup, data, trained, "after", screen), "answering prompts")
    memory = gathered(account.peak_memory_bytes)
    from_main(partial(_write_result, setup, data, trainer, trained, account, final, memory), "writing the result")
    return run


def _write_result(
    setup: Setup,
    data: Data,
    trainer: RunTrainer,
    trained: PreTrainedModel,
    account: Account,
    final: BestCheckpoint,
    memory: list[int],
) -> None:
    """Save what was trained, and record how the run ended.

    Args:
        setup: The run's setup.
        data: Its data.
        trainer: Its trainer, at the end.
        trained: Its model, with all weights.
        account: Its time.
        final: The weights that it ended with.
        memory: The peak memory of each process.
    """
    run = setup.run
    _save(setup, trained)
    trainable, total = count_parameters(trained)
    of_ranks = {"measured_bytes_by_rank": memory} if len(memory) > 1 else {}
    run.record(
        steps=trainer.state.global_step,
        kept=asdict(final),
        tokens_seen=trainer.state.num_input_tokens_seen,
        seconds=round(account.seconds, 1),
        tokens_per_s=round(trainer.state.num_input_tokens_seen / max(account.step_seconds, 1e-6), 1),
        peak_memory_bytes=max(memory),
        memory={**run.facts()["memory"], "measured_bytes": max(memory), **of_ranks},
        parameters={"trainable": trainable, "total": total},
        **{FACT: _whole_digest(setup)},
    )
    write_card(run, setup.config, data.summary)


def _save(setup: Setup, trained: PreTrainedModel) -> None:
    """Write what was trained to a temporary folder and move it into place: a folder that exists is complete."""
    run = setup.run
    full = setup.config.method is Method.full
    if full:
        trained.to(setup.dtype)
    with atomic_folder(run.model if full else run.adapter) as folder:
        trained.save_pretrained(folder)
        # PEFT's card is an empty template; the run has its own card.
        (folder / "README.md").unlink(missing_ok=True)
        setup.tokenizer.save_pretrained(folder)
