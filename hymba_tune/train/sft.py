"""Supervised fine-tuning, from settings to a run directory."""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import torch
import trl
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed

from hymba_tune.adapters import add_adapter, count_parameters, lora_config, open_model, weights_of
from hymba_tune.checkpoint import (
    check_length,
    check_weights,
    choose_device,
    choose_dtype,
    choose_kernels,
    load_config,
    load_tokenizer,
)
from hymba_tune.config import Method, SFTConfig, as_mapping
from hymba_tune.data import (
    DataReport,
    Source,
    build_dataset,
    open_sources,
    sample_prompts,
    split_dataset,
    with_chat_template,
)
from hymba_tune.errors import ConfigError, DataError
from hymba_tune.generate import answer
from hymba_tune.registry import lasting_name, resolve_model
from hymba_tune.train.banner import describe_run
from hymba_tune.train.callbacks import FirstStep, Interrupt, Metrics
from hymba_tune.train.memory import keep_freed_memory, peak_memory
from hymba_tune.train.run import Run
from hymba_tune.train.screen import Screen
from hymba_tune.train.setup import Data, Setup
from hymba_tune.train.trainer import HymbaTrainer

SAMPLES = 2
"""Prompts that are answered before and after: the first of the evaluation data, or else of the data."""
SAMPLE_TOKENS = 96
EVALUATIONS = 5
"""Evaluations, and checkpoints, a run gets unless told otherwise."""
CHANGEABLE = {"epochs", "steps", "device", "kernels", "log_every", "eval_every", "save_every", "resume"}
"""Settings that a run may be gone on with differently."""
LEARNING_RATES = {Method.lora: 2e-4, Method.dora: 2e-4, Method.full: 2e-5}


def resume_config(given: SFTConfig) -> SFTConfig:
    """The settings of the run that ``--resume`` names, with those given now on top.

    Raises:
        CheckpointError: If it is not a run.
        ConfigError: If a setting is given that a run cannot be gone on with differently.
    """
    assert given.resume is not None
    saved = Run(given.resume).read_config()
    changed = {name: getattr(given, name) for name in given.model_fields_set}
    if fixed := [name for name in changed.keys() - CHANGEABLE if changed[name] != getattr(saved, name)]:
        raise ConfigError(
            f"--resume goes on with {given.resume} as it was started; {', '.join(sorted(fixed))} cannot change.",
            expected=f"at most: {', '.join(sorted(CHANGEABLE - {'resume'}))}",
            fix="leave it out, or start a new run with --model RUN",
        )
    return saved.model_copy(update=changed)


def run_sft(config: SFTConfig, screen: Screen) -> Run:
    """Fine-tune a model.

    Args:
        config: All settings; with ``resume``, as `resume_config` gives them.
        screen: Told what happens.

    Returns:
        The finished run.

    Raises:
        HymbaTuneError: If something is to be mended first; nothing is left behind.
        KeyboardInterrupt: If Ctrl-C ended the run, with the run's path once its checkpoint is written.
    """
    setup = _check(config)
    run, resuming = setup.run, config.resume is not None
    checkpoint = run.last_checkpoint() if resuming else None
    data = _read_data(setup, screen)
    if resuming:
        _check_same_data(run, data.report)
    else:
        run.create(config)
    try:
        with run.capturing_logs():
            set_seed(config.seed)
            with screen.working("loading the weights"):
                model = _open(setup)
            trainer = _trainer(setup, data, model, screen)
            screen.banner(describe_run(setup, data, trainer))
            run.record(
                model=lasting_name(config.model),
                data=data.report.counts(),
                device=str(setup.device),
                dtype=str(setup.dtype),
                kernels={name: asdict(choice) for name, choice in setup.kernels.items()},
            )
            if not resuming:
                data.report.write_dropped(run.path / "dropped.jsonl")
                _sample(setup, data, trainer, "before", screen)
            return _train(setup, data, trainer, checkpoint, screen)
    except BaseException:
        if not run.whole_checkpoints() and not resuming:
            shutil.rmtree(run.path, ignore_errors=True)
        raise


def _check(config: SFTConfig) -> Setup:
    if not config.data:
        raise ConfigError(
            "--data is missing.", expected="a file, a Hub dataset, or demo", fix="--data demo to try the kit"
        )
    run = Run(config.resume) if config.resume else Run.choose(config)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    source = resolve_model(config.model)
    tokenizer = with_chat_template(load_tokenizer(source.folder))
    weights = weights_of(source)
    model_config = load_config(weights)
    check_weights(weights.folder, model_config)
    if config.method is not Method.full:
        with torch.device("meta"):
            _adapter_config(config, AutoModelForCausalLM.from_config(model_config))
    kernels = choose_kernels(as_mapping(config.kernels), model_config, device, dtype)
    return Setup(run, config, source, tokenizer, device, dtype, model_config, kernels)


def _adapter_config(config: SFTConfig, model: PreTrainedModel) -> Any:
    return lora_config(
        model,
        targets=config.targets,
        method=config.method,
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.lora_dropout,
        rslora=config.rslora,
        meta_tokens=config.meta_tokens,
    )


def _read_data(setup: Setup, screen: Screen) -> Data:
    config = setup.config

    def encode(sources: list[Source], label: str) -> tuple[datasets.Dataset, DataReport]:
        with screen.working(label) as progress:
            return build_dataset(
                sources,
                setup.tokenizer,
                max_length=config.max_length,
                mapping=as_mapping(config.map),
                on_bad_row=config.on_bad_row,
                progress=progress,
            )

    sources = open_sources(config.data)
    # Some sources come with held-out data of their own.
    given = open_sources(config.eval_data) or [source.held_out for source in sources if source.held_out]
    train, report = encode(sources, "reading the data")
    held_out: datasets.Dataset | None
    if given:
        held_out, _ = encode(given, "reading the evaluation data")
        held_out = held_out.select(range(min(len(held_out), config.eval_max_rows)))
    else:
        train, held_out = split_dataset(train, config.eval_split, seed=config.seed, max_rows=config.eval_max_rows)
    prompts = sample_prompts(given or sources, SAMPLES, as_mapping(config.map))
    warning = check_length(report.longest, setup.model_config, strict=config.strict_length)
    return Data(train, held_out, report, prompts, warning)


def _check_same_data(run: Run, report: DataReport) -> None:
    before = run.facts().get("data", {}).get("fingerprint")
    if before != report.fingerprint:
        raise DataError(
            f"The data of {run.path} has changed since the run was started.",
            expected="the same rows, so that the run can go on where it was",
            fix="restore the data, or start a new run with --model RUN",
        )


def _open(setup: Setup) -> PreTrainedModel:
    config = setup.config
    model = open_model(setup.source, dtype=setup.weights_dtype, device=setup.device)
    model.name_or_path = lasting_name(config.model)
    if config.method is Method.full:
        return model
    return add_adapter(model, _adapter_config(config, model), config.targets)


def _trainer(setup: Setup, data: Data, model: PreTrainedModel, screen: Screen) -> HymbaTrainer:
    config = setup.config
    callbacks: list[Any] = [Metrics(setup.run, screen)]
    if config.method is not Method.full:
        callbacks.append(FirstStep())
    trainer = HymbaTrainer(
        model=model,
        args=_arguments(setup, evaluate=data.held_out is not None),
        train_dataset=data.train,
        eval_dataset=data.held_out,
        processing_class=setup.tokenizer,
        callbacks=callbacks,
    )
    for noisy in list(trainer.callback_handler.callbacks):
        if type(noisy).__name__ in ("PrinterCallback", "ProgressCallback"):
            trainer.remove_callback(noisy)
    # Steps are known only now: packing has decided how many rows there are.
    per_epoch = math.ceil(len(trainer.get_train_dataloader()) / config.grad_accum)
    steps = config.steps or max(1, math.ceil(config.epochs * per_epoch))
    every = max(1, steps // EVALUATIONS)
    trainer.args.max_steps = steps
    trainer.args.eval_steps = config.eval_every or every
    trainer.args.save_steps = config.save_every or config.eval_every or every
    return trainer


def _arguments(setup: Setup, *, evaluate: bool) -> trl.SFTConfig:
    config, device = setup.config, setup.device
    return trl.SFTConfig(
        output_dir=str(setup.run.checkpoints),
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.grad_accum,
        learning_rate=config.lr or LEARNING_RATES[config.method],
        lr_scheduler_type=config.lr_schedule,
        warmup_steps=config.warmup,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        activation_checkpointing=config.gradient_checkpointing,
        bf16=setup.dtype is torch.bfloat16,
        fp16=setup.dtype is torch.float16,
        use_cpu=device.type == "cpu",
        seed=config.seed,
        data_seed=config.seed,
        max_length=config.max_length,
        packing=config.packing,
        packing_strategy="bfd",
        eval_packing=False,
        # Rows come encoded and cut; only packing is left to do.
        dataset_kwargs={"skip_prepare_dataset": not config.packing},
        logging_steps=config.log_every,
        eval_strategy="steps" if evaluate else "no",
        eval_on_start=evaluate and config.resume is None,
        save_strategy="steps",
        save_total_limit=2,
        include_num_input_tokens_seen="non_padding",
        report_to="none",
        disable_tqdm=True,
    )


def _train(setup: Setup, data: Data, trainer: HymbaTrainer, checkpoint: Path | None, screen: Screen) -> Run:
    run, config = setup.run, setup.config
    if checkpoint is not None:
        run.forget_after(int(checkpoint.name.rpartition("-")[2]))
    interrupt = Interrupt()
    trainer.add_callback(interrupt)
    if setup.device.type == "cpu":
        keep_freed_memory()  # not before the weights are there: what loading them took may go back
    started = time.time()
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        interrupt.release()
    if interrupt.pressed:
        raise KeyboardInterrupt(str(run.path))
    if data.held_out is not None and not any(row.step == trainer.state.global_step for row in run.evaluations()):
        trainer.evaluate()
    _sample(setup, data, trainer, "after", screen)
    folder = run.model if config.method is Method.full else run.adapter
    trained = trainer.accelerator.unwrap_model(trainer.model)
    if config.method is Method.full:
        trained.to(setup.dtype)
    trained.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty form; the run's own card says what there is to say
    setup.tokenizer.save_pretrained(folder)
    trainable, total = count_parameters(trained)
    run.record(
        steps=trainer.state.global_step,
        tokens_seen=trainer.state.num_input_tokens_seen,
        seconds=round(run.facts().get("seconds", 0.0) + time.time() - started, 1),
        peak_memory_bytes=peak_memory(setup.device),
        parameters={"trainable": trainable, "total": total},
    )
    run.write_card(config)
    return run


def _sample(setup: Setup, data: Data, trainer: HymbaTrainer, when: str, screen: Screen) -> None:
    """Answer a few prompts, into ``samples.json``."""
    path = setup.run.path / "samples.json"
    samples = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    if not samples:
        samples = [
            {"prompt": prompt.messages[-1].content, "reference": reference} for prompt, reference in data.prompts
        ]
    with screen.working(f"answering {len(samples)} prompts, {when} training") as progress:
        for number, ((prompt, _), sample) in enumerate(zip(data.prompts, samples, strict=True), start=1):
            sample[when] = answer(trainer.model, setup.tokenizer, prompt, max_new_tokens=SAMPLE_TOKENS, temperature=0.0)
            progress(number)
    path.write_text(json.dumps(samples, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
