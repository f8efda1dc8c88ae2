"""Values that no setting takes: each is refused in a short message, whichever setting it is given to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hymba_tune.cli.settings import explain
from hymba_tune.config import Config, DistillConfig, DoctorConfig, DPOConfig, EvalConfig, QuantizeConfig, SFTConfig

CONFIGS: list[type[Config]] = [SFTConfig, DPOConfig, DistillConfig, EvalConfig, QuantizeConfig, DoctorConfig]
SETTINGS = [(config, name) for config in CONFIGS for name in config.model_fields]
HOSTILE = (
    st.sampled_from([float("inf"), float("nan"), -1e308, 1e308, 10**400, -(10**30), "9" * 5000, "1e400", "x" * 10**5])
    | st.sampled_from(["n" * 300, "\0", "\ud800", "", " ", "mps", None, b"\xff", object(), {1: {2: [3]}}, [[[]]]])
    | st.lists(st.sampled_from(["x" * 10**4, 1e308, float("nan"), None, "a=b", "=", "\0"]), max_size=3)
)


@given(st.sampled_from(SETTINGS), HOSTILE)
def test_hostile_value_is_taken_or_refused_in_a_short_message(setting: tuple[type[Config], str], value: Any) -> None:
    config, name = setting
    try:
        taken = getattr(config(**{name: value}), name)
    except ValidationError as error:
        message = explain(error)
        assert message.startswith(f"--{name.replace('_', '-')}") or value in ([], "", None)
        assert len(message) < 1000
    else:
        numbers = [one for one in (taken if isinstance(taken, list) else [taken]) if isinstance(one, int | float)]
        assert all(abs(number) < 2**32 for number in numbers)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": float("inf")}, "--epochs inf: must be a finite number."),
        ({"epochs": 1e308}, "--epochs 1e+308: must be at most 1e+06."),
        ({"weights": [1e308]}, "--weights 1e+308: must be at most 1000."),
        ({"weights": [float("nan")]}, "--weights nan: must be a finite number."),
        ({"steps": 10**30}, f"--steps {10**30}: must be at most 4,294,967,295."),
        ({"lr": 1e300}, "--lr 1e+300: must be at most 4,294,967,295."),
        (
            {"device": "mps"},
            "--device mps: must be auto, cpu, cuda or cuda:1; other kinds of devices are not supported.",
        ),
        ({"out": Path("n" * 300)}, "must be a name of at most 255 bytes; it has 300."),
        ({"out": Path("ü" * 200)}, "must be a name of at most 255 bytes; it has 400."),
        ({"out": Path("a\0b")}, "--out a\0b: must be a name without NUL characters."),
        ({"model": 3}, '--model 3: must be text, in "quotes".'),
    ],
)
def test_value_that_cannot_be_used_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as refused:
        SFTConfig(**values)
    assert explain(refused.value).endswith(message)
