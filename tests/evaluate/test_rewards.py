"""Rewards of answers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from hymba_tune.config import GRPOConfig
from hymba_tune.errors import ConfigError, DataError, TrainingError
from hymba_tune.evaluate.rewards import RewardedAnswer, Rewards
from hymba_tune.inputs import check_inputs


def of(reward: str, text: str, reference: str = "", tokens: int = 1) -> float:
    """The reward of one answer."""
    rewards = Rewards(GRPOConfig(reward=[reward], max_new_tokens=100))
    return rewards.scores([RewardedAnswer("", text, tokens, reference)])[0][0]


@pytest.mark.parametrize(
    ("reward", "text", "reference", "expected"),
    [
        ("exact", " 1,000 ", "1000", 1),
        ("exact", "It is 4", "4", 0),
        ("number", "It is 4, or $1,200.0", "so 1200", 1),
        ("number", "no idea", "4", 0),
        ("gsm8k", "6 * 7 = 42\n#### 42", "so #### 42", 1),
        ("gsm8k", "#### 42", "42", 1),
        ("gsm8k", "42", "#### 42", 0),
        ("choice", "The answer is (B).", "B", 1),
        ("choice", "A dog is no cat. I think it is C because of that.", "(C) Paris", 1),
        ("choice", "A", "B", 0),
        (r"regex=answer is (\w+)", "the answer is Paris!", "Paris", 1),
        (r"regex=answer is (\w+)", "the answer is Paris!", "So the answer is Paris.", 1),
        (r"regex=answer is (\w+)", "Paris", "Paris", 0),
        ("format", "<think>hm\nhm</think>\nParis", "", 1),
        ("format", "<think>hm</think>", "", 0),
        (r"format=\w+\.", "Paris.", "", 1),
        (r"format=\w+\.", "In Paris.", "", 0),
    ],
)
def test_named_rewards_compare_and_match(reward: str, text: str, reference: str, expected: float) -> None:
    assert of(reward, text, reference) == expected


@pytest.mark.parametrize(
    ("reward", "tokens", "expected"), [("length", 25, 0.75), ("length=20", 20, 1), ("length=20", 60, 0.5)]
)
def test_short_answers_have_a_higher_reward(reward: str, tokens: int, expected: float) -> None:
    assert of(reward, "", tokens=tokens) == expected


def test_rewards_are_weighted_and_named_apart() -> None:
    config = GRPOConfig(reward=["exact", "regex=a", "regex=b"], reward_weights=[1, 0.5, -2])
    rewards = Rewards(config)
    assert [part.label for part in rewards.parts] == ["exact", "regex", "regex 2"]
    assert rewards.describe() == "exact + 0.5 × regex + -2 × regex 2"
    assert rewards.best == 1.5
    assert rewards.total([1, 1, 1]) == -0.5
    assert rewards.in_words([1, 0, math.nan]) == "1 (exact 1, regex 0, regex 2 –)"


def users(folder: Path, code: str, name: str = "score") -> Rewards:
    """The reward of a function of the user's."""
    (folder / "mine.py").write_text(code)
    return Rewards(GRPOConfig(reward=[f"{folder / 'mine.py'}:{name}"]))


ANSWERS = [RewardedAnswer("Capital of France?", "Paris", 2, "Paris"), RewardedAnswer("2 + 2?", "5", 1, "4")]


def test_functions_of_the_user_read_prompts_answers_and_references(tmp_path: Path) -> None:
    code = (
        "def score(prompts, completions, references, tokens):\n"
        "    rows = zip(prompts, completions, references, tokens)\n"
        "    return [None if '+' in p else (c == r) + n for p, c, r, n in rows]\n"
    )
    rewards = users(tmp_path, code)
    (first,), (second,) = rewards.scores(ANSWERS)
    assert first == 3
    assert math.isnan(second)
    assert rewards.best is None
    rewards.check(["Paris"], "data")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1]", r"mine.py:score returned 1 values for 2 answers"),
        ("return ['good', 1]", "returned 'good' for 2 answers"),
        ("return [float('nan'), 1]", "returned nan for 2 answers"),
        ("return 1", r"failed: TypeError"),
        ("return [1 / 0, 1]", r"failed: ZeroDivisionError: division by zero \(mine.py, line 2\)"),
    ],
)
def test_function_that_returns_no_rewards_is_named(body: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=message):
        users(tmp_path, f"def score(**_):\n    {body}\n").scores(ANSWERS)


def test_file_without_the_function_or_with_an_error_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no function score.\n.*one of: other"):
        users(tmp_path, "def other(): ...\n")
    with pytest.raises(ConfigError, match=r"its code failed: NameError.*mine.py, line 1"):
        users(tmp_path, "oops\n")
    with pytest.raises(ConfigError, match=r"cannot read .*gone.py: No such file"):
        Rewards(GRPOConfig(reward=[f"{tmp_path / 'gone.py'}:score"]))


def test_references_that_a_reward_cannot_compare_are_refused() -> None:
    rewards = Rewards(GRPOConfig(reward=["gsm8k"]))
    rewards.check(["about four", "#### 4"], "data")
    with pytest.raises(
        DataError, match=r"No reference answer in data contains what the reward gsm8k compares.*'about four'"
    ):
        rewards.check(["about four"], "data")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reward": ["exakt"]}, "'exakt' is no reward; did you mean exact"),
        ({"reward": ["judge"]}, "'judge' is no reward; use one of exact, number"),
        ({"reward": ["exact=4"]}, "exact takes no argument"),
        ({"reward": ["regex"]}, "regex needs a pattern"),
        ({"reward": ["regex=("]}, r"regex=\( is no regular expression"),
        ({"reward": ["length=few"]}, "length=few: expected a number of tokens"),
        ({"reward": ["length=300"]}, "length=300 rewards every answer"),
        ({"reward": ["exact"], "reward_weights": [1, 2]}, "there are 2 weights for 1 rewards"),
        ({"reward": ["exact"], "reward_weights": [0]}, "a reward of weight 0 has no effect"),
        ({"group_size": 6}, "8 × 4 answers, which are no whole groups of 6"),
        ({"max_length": 260}, "--max-length 260 leaves a prompt no room; use --max-length 512"),
        ({"nproc": "2"}, "hymba-tune grpo trains in a single process"),
        ({"global_batch": 64}, "by --batch-size and --grad-accum"),
        ({"packing": True}, "groups of answers cannot be packed"),
        ({"activation_offload": True}, "TRL's GRPO trainer keeps activations on the GPU"),
        ({"loss": "luspo"}, "use --importance sequence"),
        ({"loss": "vespo", "importance": "sequence"}, "use --importance token"),
        ({"loss": "sapo", "epsilon_high": 0.3}, "the sapo loss has no bounds"),
        ({"beta": 0.1, "method": "full"}, "--method full has no adapter to switch off"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GRPOConfig(**settings)


def test_reward_and_its_file_are_missed_before_torch_is_imported(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(ConfigError, match="--reward is missing"):
        check_inputs(GRPOConfig(model="hymba-nano", data=[str(data)]))
    with pytest.raises(ConfigError, match=r"there is no file gone.py"):
        check_inputs(GRPOConfig(model="hymba-nano", data=[str(data)], reward=["gone.py:score"]))
