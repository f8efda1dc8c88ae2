from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from hymba_tune.config import DistillConfig
from hymba_tune.config.distill import Stage

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown loss": ({"loss": ["klx"]}, r"unknown loss 'klx' \(did you mean kl\?\); use auto, kl"),
    "weight that is not a number": ({"loss": ["alm=much"]}, r"'much' is not a number; for example --loss alm=0\.5"),
    "weight of zero": ({"loss": ["alm=0"]}, "weight of alm is 0; it must be more than 0"),
    "auto with another loss": ({"loss": ["auto", "alm"]}, "auto combines only with seq"),
    "no loss": ({"loss": []}, "the list is empty; use auto"),
    "whole vocabularies from a cache": ({"loss": ["jsd"]}, "which no cache holds; add --online"),
    "whole vocabularies in a stage": ({"stages": ["0.5", "0.5:loss=uld"]}, "uld needs the whole vocabulary"),
    "packed answers of the student": ({"on_policy": 0.5, "packing": True}, "cannot be packed in advance"),
    "server with --online": ({"teacher": "http://x", "online": True}, "most likely tokens, and --online needs all"),
    "server that scores rollouts": ({"teacher": "http://x", "on_policy": 1.0}, "and --on-policy needs all"),
    "password in an address": (
        {"teacher": "http://me:secret@x"},
        "^(?!(.|\n)*secret)(.|\n)*a user, a password or parameters",
    ),
    "key in an address": (
        {"teacher": "https://x?key=secret#m"},
        "key into the environment variable HYMBA_TUNE_TEACHER_KEY",
    ),
    "server's hidden states": ({"teacher": "https://x", "match_hidden": "mse"}, "and --match-hidden needs all"),
    "teacher's answers in one stage only": ({"stages": ["0.5", "0.5:loss=seq"]}, "use it in every stage or in none"),
    "stages of too few steps": ({"stages": ["0.5", "0.4"]}, r"sum to 0\.9, not 1"),
    "stage without a share": ({"stages": ["half"]}, "'half' is not a stage"),
    "stage of no steps": ({"stages": ["0", "1"]}, r"a share of 0 is out of range"),
    "stage with a setting of the run": ({"stages": ["1:lr=1"]}, "a stage has no setting 'lr'"),
    "alpha above 1 in a stage": ({"stages": ["1:alpha=2"]}, "alpha is 2; it must be 0 to 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_invalid_settings_are_refused_with_a_valid_alternative(name: str) -> None:
    changes, message = BAD[name]
    with pytest.raises(ValidationError, match=message):
        DistillConfig(**changes)


def test_stages_change_only_the_settings_that_they_name() -> None:
    stages = ["0.6", "0.4:on-policy=1,loss=reverse-kl+alm=0.5,alpha=1"]
    first, second = DistillConfig(loss=["projection"], stages=stages).parts
    assert first == Stage(0.6, {"projection": 1.0}, 0.7, 0.0)
    assert second == Stage(0.4, {"reverse-kl": 1.0, "alm": 0.5}, 1.0, 1.0)


def test_recipes_may_write_stages_as_mappings() -> None:
    stages: list[Any] = [{"share": 0.6}, {"share": 0.4, "on_policy": 1, "loss": {"kl": 1, "alm": 0.5}}]
    config = DistillConfig(stages=stages)
    assert config.parts == DistillConfig(stages=["0.6", "0.4:on-policy=1,loss=kl+alm=0.5"]).parts
    assert DistillConfig.model_validate(config.model_dump(mode="json")).parts == config.parts


@pytest.mark.parametrize(
    ("changes", "in_memory"),
    [
        ({}, False),
        ({"online": True}, True),
        ({"stages": ["0.9", "0.1:on-policy=1"]}, True),
    ],
)
def test_teacher_stays_in_memory_only_if_a_setting_needs_it(changes: dict[str, Any], in_memory: bool) -> None:
    assert DistillConfig(**changes).keeps_teacher is in_memory
