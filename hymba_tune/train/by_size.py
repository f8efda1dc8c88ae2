"""The defaults that depend on the size of the model: the learning rate, and the epochs of few rows.

Hymba-1.5B has the defaults of the settings. A smaller model needs a higher learning rate, and more steps for what
a large one learns from a few rows in one epoch.
"""

from __future__ import annotations

import math

from hymba_tune.config import TrainingConfig

RELEASED = 1.5e9
"""Parameters of the smallest model whose defaults are those of the settings."""
MOST = 20.0
"""The most that a learning rate is multiplied by: that of hymba-nano."""
LEAST_STEPS = 10
"""The least steps of a run, for each time that the learning rate is multiplied by."""
MOST_EPOCHS = 50
"""The most epochs that few rows are repeated."""


def factor(parameters: int) -> float:
    """Return what the default learning rate of a model is multiplied by, from 1 to `MOST`.

    Args:
        parameters: The number of the model's parameters, without an adapter.
    """
    return min(MOST, max(1.0, math.sqrt(RELEASED / parameters)))


def default_rate(config: TrainingConfig, parameters: int) -> float:
    """Return the peak learning rate of a run that sets none; that of a run from before this rule does not change."""
    rate = config.learning_rates[config.method]
    times = 1.0 if config.resume else factor(parameters)
    return rate if times == 1 else float(f"{rate * times:.1e}")


def default_epochs(config: TrainingConfig, parameters: int, steps_per_epoch: float) -> float:
    """Return the epochs of a run that sets neither epochs nor steps.

    Preferences and rewards are trained on once, whatever their number: repeating them is no longer what was preferred.

    Args:
        config: The run's settings.
        parameters: The number of the model's parameters, without an adapter.
        steps_per_epoch: The optimizer steps of an epoch.
    """
    times = factor(parameters)
    if times == 1 or not config.verb.loss_unit:
        return 1.0
    return float(min(MOST_EPOCHS, max(1, math.ceil(LEAST_STEPS * times / steps_per_epoch))))
