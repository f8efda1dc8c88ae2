"""The trainer arguments that all kinds of training share."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import Trainer

from hymba_tune.config import DPOConfig, GRPOConfig, KTOConfig, TrainingConfig
from hymba_tune.distributed.environment import world_size
from hymba_tune.distributed.strategies import strategy_arguments
from hymba_tune.train.by_size import default_epochs, default_rate
from hymba_tune.train.optimizers import Rates, optimizer_name, schedule
from hymba_tune.train.setup import Setup
from hymba_tune.train.tracking import tracker_arguments

EVALUATIONS = 5
"""The default number of evaluations, and of checkpoints, in a run."""
EVALUATED_BATCHES = 20
"""The least number of held-out batches, where there are as many rows."""
OF_BATCH = ("aot", "aot_unpaired", "bco_pair")
"""The DPO losses that depend on which pairs are in a batch together."""
LOG_EVERY = 10
"""The default for the most steps between two rows of the metrics."""


def shared_arguments(setup: Setup, *, held_out: int) -> dict[str, Any]:
    """Return the arguments by their names in TRL's configurations.

    Args:
        setup: The run's setup.
        held_out: The number of held-out rows.
    """
    config, device = setup.config, setup.device
    evaluate = held_out > 0
    return {
        "output_dir": str(setup.run.checkpoints),
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": evaluation_batch(config, held_out),
        "gradient_accumulation_steps": config.grad_accum,
        "learning_rate": learning_rates(setup).base,
        "warmup_steps": config.warmup,
        "optim": optimizer_name(config.optimizer, device.type),
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "neftune_noise_alpha": config.neftune_alpha,
        "activation_checkpointing": config.gradient_checkpointing,
        "activation_offloading": config.activation_offload,
        "bf16": setup.dtype is torch.bfloat16,
        "fp16": setup.dtype is torch.float16,
        "use_cpu": device.type == "cpu",
        # Every trained parameter has a gradient, and a search for others starts at the outputs of the forward: it would
        # miss those of a loss that is computed from something else.
        "ddp_find_unused_parameters": False,
        "seed": config.seed,
        "data_seed": config.seed,
        "max_length": config.max_length,
        "eval_strategy": "steps" if evaluate else "no",
        "eval_on_start": evaluate and config.resume is None,
        "save_strategy": "steps",
        "metric_for_best_model": "eval_loss" if config.keeps_best else None,
        "greater_is_better": False,
        "include_num_input_tokens_seen": "non_padding",
        # `LossGuard` ends a run at a loss that is not finite; the filter would wait for every batch's loss.
        "logging_nan_inf_filter": False,
        "accelerator_config": {"non_blocking": device.type != "cpu"},
        **tracker_arguments(setup.run, config.track),
        **strategy_arguments(config.strategy, offload=config.offload),
        "disable_tqdm": True,
    }


def learning_rates(setup: Setup) -> Rates:
    """Return the peak learning rates of a run."""
    config = setup.config
    base = config.lr or default_rate(config, setup.parameters)
    return Rates(base, meta=config.lr_meta, ssm=config.lr_ssm, loraplus=config.loraplus_ratio)


def evaluation_batch(config: TrainingConfig, rows: int) -> int:
    """Return the rows of a held-out batch: few rows make several batches, as a test compares their losses.

    Args:
        config: The run's settings.
        rows: The number of held-out rows.
    """
    of_batch = isinstance(config, DPOConfig) and config.loss in OF_BATCH
    if of_batch or isinstance(config, KTOConfig | GRPOConfig):  # of these two, the losses of rows are known
        return config.batch_size
    return max(1, min(config.batch_size, rows // EVALUATED_BATCHES))


def global_batch(config: TrainingConfig) -> int:
    """Return the number of rows in an optimizer step, over all processes."""
    return config.batch_size * config.grad_accum * world_size()


def run_epochs(setup: Setup, rows: int) -> float:
    """Return the number of epochs of a run, which counts where it sets no steps.

    Args:
        setup: The run's setup.
        rows: The number of rows that the trainer draws batches from; packed rows if it packs them.
    """
    return setup.config.epochs or default_epochs(setup.config, setup.parameters, _steps_per_epoch(setup.config, rows))


def run_steps(setup: Setup, rows: int) -> int:
    """Return the number of optimizer steps of a run; the arguments are those of `run_epochs`."""
    config = setup.config
    return config.steps or max(1, math.ceil(run_epochs(setup, rows) * _steps_per_epoch(config, rows)))


def by_size(setup: Setup, rows: int) -> dict[str, float]:
    """Return the settings that the run leaves to the defaults that depend on the size of the model, by name."""
    config = setup.config
    rate = {"lr": learning_rates(setup).base} if config.lr is None else {}
    return rate | ({"epochs": run_epochs(setup, rows)} if config.epochs is None and config.steps is None else {})


def _steps_per_epoch(config: TrainingConfig, rows: int) -> int:
    texts = rows * config.answers_per_row
    return math.ceil(math.ceil(texts / (config.batch_size * world_size())) / config.grad_accum)


def set_length(trainer: Trainer, setup: Setup) -> None:
    """Set the number of steps and the intervals of a run. They depend on the trainer's rows, which may be packed."""
    config = setup.config
    steps = run_steps(setup, len(trainer.train_dataset))
    every = max(1, steps // EVALUATIONS)
    trainer.args.max_steps = steps
    trainer.args.lr_scheduler_type, trainer.args.lr_scheduler_kwargs = schedule(
        config.lr_schedule, steps=steps, warmup=config.warmup, decay=config.lr_decay, floor=config.lr_min
    )
    trainer.args.logging_steps = config.log_every or min(LOG_EVERY, every)
    trainer.args.eval_steps = config.eval_every or every
    trainer.args.save_steps = config.save_every or config.eval_every or every
