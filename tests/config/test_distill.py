from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from hymba_tune.config import DistillConfig
from hymba_tune.config.distill import Stage

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown loss": ({"loss": ["klx"]}, r"there is no 'klx' \(did you mean kl\?\); use auto, kl"),
    "weight that is no number": ({"loss": ["alm=much"]}, r"'much' is no weight; --loss alm=0\.5"),
    "weight of nothing": ({"loss": ["alm=0"]}, "weight of alm is 0; it must be more than 0"),
    "auto beside another": ({"loss": ["auto", "alm"]}, "auto stands alone"),
    "no loss": ({"loss": []}, "none is given; use auto"),
    "whole vocabularies from a cache": ({"loss": ["jsd"]}, "which no cache holds; add --online"),
    "whole vocabularies in a stage": ({"stages": ["0.5", "0.5:loss=uld"]}, "uld compares whole vocabularies"),
    "packed answers of the student": ({"on_policy": 0.5, "packing": True}, "cannot be packed beforehand"),
    "server beside the student": ({"teacher": "http://x", "online": True}, "likeliest tokens, and --online needs all"),
    "server that scores": ({"teacher": "http://x", "on_policy": 1.0}, "and --on-policy needs all"),
    "server's hidden states": ({"teacher": "https://x", "match_hidden": "mse"}, "and --match-hidden needs all"),
    "stage whose teacher writes": ({"stages": ["0.5", "0.5:loss=seq"]}, "use it in every stage or in none"),
    "stages of too few steps": ({"stages": ["0.5", "0.4"]}, r"make 0\.9, not 1"),
    "stage that is none": ({"stages": ["half"]}, "'half' is no stage"),
    "stage of no steps": ({"stages": ["0", "1"]}, r"a share of 0 is none"),
    "stage with a setting that all share": ({"stages": ["1:lr=1"]}, "there is no 'lr' in a stage"),
    "stage with more than all": ({"stages": ["1:alpha=2"]}, "alpha is 2; it must be 0 to 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_refused_with_what_can(name: str) -> None:
    changes, message = BAD[name]
    with pytest.raises(ValidationError, match=message):
        DistillConfig(**changes)


def test_stages_differ_from_the_settings_only_in_what_they_say() -> None:
    stages = ["0.6", "0.4:on-policy=1,loss=reverse-kl+alm=0.5,alpha=1"]
    first, second = DistillConfig(loss=["projection"], stages=stages).parts
    assert first == Stage(0.6, {"projection": 1.0}, 0.7, 0.0)
    assert second == Stage(0.4, {"reverse-kl": 1.0, "alm": 0.5}, 1.0, 1.0)


def test_recipes_may_write_stages_as_mappings() -> None:
    written: list[Any] = [{"share": 0.6}, {"share": 0.4, "on_policy": 1, "loss": {"kl": 1, "alm": 0.5}}]
    config = DistillConfig(stages=written)
    assert config.parts == DistillConfig(stages=["0.6", "0.4:on-policy=1,loss=kl+alm=0.5"]).parts
    assert DistillConfig.model_validate(config.model_dump(mode="json")).parts == config.parts


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, False),
        ({"online": True}, True),
        ({"stages": ["0.9", "0.1:on-policy=1"]}, True),
    ],
)
def test_teacher_stays_in_memory_only_where_it_is_asked(changes: dict[str, Any], kept: bool) -> None:
    assert DistillConfig(**changes).keeps_teacher is kept
