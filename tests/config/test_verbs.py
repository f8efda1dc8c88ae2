from __future__ import annotations

from typing import Any, ClassVar

import pytest

from hymba_tune.config import DPOConfig, TrainingConfig, Verb


def test_a_verb_cannot_be_declared_in_part() -> None:
    given: dict[str, Any] = {"name": "trial", "title": "A trial", "paired": True}
    with pytest.raises(TypeError, match=r"loss_unit.*logit_copies.*accuracy.*figures"):
        Verb(**given)


def test_settings_that_declare_no_verb_are_planned_and_reported_as_those_they_extend() -> None:
    class Changed(DPOConfig):
        """DPO with another default."""

        label_smoothing: float = 0.0

    assert Changed.verb is DPOConfig.verb
    assert TrainingConfig.of("dpo") is DPOConfig


def test_a_new_verb_is_found_by_its_name() -> None:
    class Trial(DPOConfig):
        """Settings of a verb that is not part of the kit."""

        verb: ClassVar[Verb] = Verb(
            "trial", "A trial", "", paired=True, logit_copies=0, accuracy=None, scores=False, figures=()
        )

    try:
        assert TrainingConfig.of("trial") is Trial
        assert Trial.verb.texts_per_row == 2
    finally:
        del Trial.verb  # the class lives on among the subclasses of its base


def test_an_unknown_verb_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="verb is 'orp', expected one of sft, dpo, kto"):
        TrainingConfig.of("orp")
