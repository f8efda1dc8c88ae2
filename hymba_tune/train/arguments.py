"""What every kind of training tells its trainer."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import Trainer

from hymba_tune.train.setup import Setup

EVALUATIONS = 5
"""Evaluations, and checkpoints, a run gets unless told otherwise."""


def shared_arguments(setup: Setup, *, evaluate: bool) -> dict[str, Any]:
    """Arguments by the names that TRL's configurations give them.

    Args:
        setup: Whose settings they are.
        evaluate: Whether there is held-out data.
    """
    config, device = setup.config, setup.device
    return {
        "output_dir": str(setup.run.checkpoints),
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.grad_accum,
        "learning_rate": config.lr or config.learning_rates[config.method],
        "lr_scheduler_type": config.lr_schedule,
        "warmup_steps": config.warmup,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "activation_checkpointing": config.gradient_checkpointing,
        "bf16": setup.dtype is torch.bfloat16,
        "fp16": setup.dtype is torch.float16,
        "use_cpu": device.type == "cpu",
        "seed": config.seed,
        "data_seed": config.seed,
        "max_length": config.max_length,
        "logging_steps": config.log_every,
        "eval_strategy": "steps" if evaluate else "no",
        "eval_on_start": evaluate and config.resume is None,
        "save_strategy": "steps",
        "save_total_limit": 2,
        "include_num_input_tokens_seen": "non_padding",
        "report_to": "none",
        "disable_tqdm": True,
    }


def set_length(trainer: Trainer, setup: Setup) -> None:
    """Set the steps of a run and its intervals, which may depend on how many rows the trainer has made of the data."""
    config = setup.config
    per_epoch = math.ceil(len(trainer.get_train_dataloader()) / config.grad_accum)
    steps = config.steps or max(1, math.ceil(config.epochs * per_epoch))
    every = max(1, steps // EVALUATIONS)
    trainer.args.max_steps = steps
    trainer.args.eval_steps = config.eval_every or every
    trainer.args.save_steps = config.save_every or config.eval_every or every
