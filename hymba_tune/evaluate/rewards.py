"""Rewards of answers: by comparison with a reference, by form, by length, or by a function of the user's."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hymba_tune.config import GRPOConfig, RewardChoice
from hymba_tune.errors import ConfigError, DataError, TrainingError
from hymba_tune.evaluate.questions import NUMBER, Extraction

THINKING = r"(?s)\s*<think>.*?</think>.*\S.*"
"""The default of the reward ``format``."""


@dataclass(frozen=True)
class RewardedAnswer:
    """An answer whose reward is wanted.

    Attributes:
        prompt: The user's last message.
        text: The answer, without special tokens.
        tokens: The answer's number of tokens.
        reference: The reference answer.
    """

    prompt: str
    text: str
    tokens: int
    reference: str


@dataclass(frozen=True)
class Reward:
    """A reward.

    Attributes:
        label: Its name in the metrics.
        weight: Its factor in the sum.
        score: Returns the reward of each answer; None where it does not apply.
    """

    label: str
    weight: float
    score: Callable[[Sequence[RewardedAnswer]], list[float | None]]


class Agreement:
    """1 where an answer agrees with its reference, else 0.

    Args:
        way: A key of `hymba_tune.evaluate.questions.PATTERNS`; None for ``pattern``.
        pattern: A regular expression.
    """

    def __init__(self, way: str | None, pattern: str | None = None) -> None:
        self.extract = Extraction(way, pattern)
        self._whole = Extraction("exact", None)
        # References are often the bare result: "42" instead of "… #### 42".
        self._bare = re.compile(NUMBER if way else r"(?s).*")

    def expected(self, reference: str) -> str | None:
        """The part of a reference that answers are compared with; None if it has none."""
        found = self.extract(reference)
        return self._whole(reference) if found is None and self._bare.fullmatch(reference.strip()) else found

    def __call__(self, answers: Sequence[RewardedAnswer]) -> list[float | None]:
        """The reward of each answer."""
        parts = [(self.extract(answer.text), self.expected(answer.reference)) for answer in answers]
        return [float(found is not None and found == expected) for found, expected in parts]


@dataclass(frozen=True)
class Form:
    """1 where a pattern matches a whole answer, else 0."""

    pattern: str

    def __call__(self, answers: Sequence[RewardedAnswer]) -> list[float | None]:
        """The reward of each answer."""
        return [float(re.fullmatch(self.pattern, answer.text) is not None) for answer in answers]


@dataclass(frozen=True)
class Shortness:
    """1 for answers of at most ``free`` tokens, falling linearly to 0 at ``most``."""

    free: int
    most: int

    def __call__(self, answers: Sequence[RewardedAnswer]) -> list[float | None]:
        """The reward of each answer."""
        return [min(1.0, (self.most - answer.tokens) / (self.most - self.free)) for answer in answers]


@dataclass(frozen=True)
class UserFunction:
    """A function of the user's: ``name(prompts, completions, references, **others)`` returns a number for each answer.

    Attributes:
        choice: The reward as it was chosen, for messages.
        function: The function.
    """

    choice: RewardChoice
    function: Callable[..., Any]

    def __call__(self, answers: Sequence[RewardedAnswer]) -> list[float | None]:
        """The reward of each answer.

        Raises:
            TrainingError: If the function fails, or returns anything but a finite number or None for each answer.
        """
        try:
            returned = list(
                self.function(
                    prompts=[answer.prompt for answer in answers],
                    completions=[answer.text for answer in answers],
                    references=[answer.reference for answer in answers],
                    tokens=[answer.tokens for answer in answers],
                )
            )
        except Exception as error:
            raise TrainingError(
                f"--reward {self.choice.text} failed: {_failure(error)}.",
                expected=f"{self.choice.name}(prompts, completions, references, **others), which returns a number for "
                "each answer",
                fix="correct it",
            ) from error
        rewards = [_number(value) for value in returned]
        if len(rewards) != len(answers) or any(reward is None for reward in rewards):
            wrong = next((value for value, reward in zip(returned, rewards, strict=True) if reward is None), None)
            what = f"{wrong!r:.80}" if len(rewards) == len(answers) else f"{len(rewards):,} values"
            raise TrainingError(
                f"--reward {self.choice.text} returned {what} for {len(answers):,} answers.",
                expected="a list with a finite number, or None where it does not apply, for each answer",
                fix="correct it",
            )
        return [None if value is None else reward for value, reward in zip(returned, rewards, strict=True)]


def _number(value: Any) -> float | None:
    """Return a reward as a number: 0 for None, which does not apply, and None for what is no finite number."""
    if value is None:
        return 0.0
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _failure(error: Exception) -> str:
    """Return an error and the last line of the user's file in its traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__}: {error} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"


class Rewards:
    """The rewards of a run.

    Args:
        config: The run's settings. The code of a Python file that they name is run.

    Raises:
        ConfigError: If the file cannot be run, or has no such function.
    """

    def __init__(self, config: GRPOConfig) -> None:
        weights = config.reward_weights or [1.0] * len(config.reward)
        self._digests: list[str] = []
        self.parts: list[Reward] = []
        for choice, weight in zip(config.rewards, weights, strict=True):
            same = sum(part.label.partition(" ")[0] == choice.name for part in self.parts)
            label = f"{choice.name} {same + 1}" if same else choice.name
            self.parts.append(Reward(label, weight, self._score(choice, config.max_new_tokens)))

    def _score(self, choice: RewardChoice, most: int) -> Callable[[Sequence[RewardedAnswer]], list[float | None]]:
        if choice.runs_code:
            path = Path(choice.argument).expanduser()
            function = read_function(choice, path)
            self._digests.append(hashlib.sha256(path.read_bytes()).hexdigest()[:12])
            return UserFunction(choice, function)
        match choice.name:
            case "format":
                return Form(choice.argument or THINKING)
            case "length":
                return Shortness(int(choice.argument or 0), most)
            case "regex":
                return Agreement(None, choice.argument)
        return Agreement(choice.name)

    @property
    def best(self) -> float | None:
        """The highest sum of rewards that an answer can have; None where a function of the user's takes part."""
        if any(isinstance(part.score, UserFunction) for part in self.parts):
            return None
        return sum(max(0.0, part.weight) for part in self.parts)

    def describe(self) -> str:
        """The rewards with their weights, in words."""
        words = []
        digests = iter(self._digests)
        for part in self.parts:
            weight = "" if part.weight == 1 else f"{part.weight:g} × "
            code = isinstance(part.score, UserFunction) and part.score.choice.text
            words.append(weight + (f"{code} (runs its code, SHA-256 {next(digests)}…)" if code else part.label))
        return " + ".join(words)

    def check(self, references: Sequence[str], names: str) -> None:
        """Check that the rewards can be computed, before any weights are loaded.

        Args:
            references: The reference answers.
            names: The names of the data.

        Raises:
            DataError: If no reference has what a reward compares.
            TrainingError: If a function of the user's fails on the first reference.
        """
        for part in self.parts:
            if isinstance(part.score, UserFunction):
                part.score([RewardedAnswer("", references[0], 1, references[0])])
            if isinstance(part.score, Agreement) and all(part.score.expected(one) is None for one in references):
                raise DataError(
                    f"No reference answer in {names} contains what the reward {part.label} compares. The first is "
                    f"{references[0][:200]!r}.",
                    expected=f"a match of {part.score.extract.pattern}",
                    fix="--reward exact, or regex=PATTERN",
                )

    def scores(self, answers: Sequence[RewardedAnswer]) -> list[list[float]]:
        """The rewards ``(answers, parts)``, without weights; NaN where one does not apply.

        Raises:
            TrainingError: If a function of the user's fails.
        """
        columns = [part.score(answers) for part in self.parts]
        return [[math.nan if value is None else value for value in row] for row in zip(*columns, strict=True)]

    def total(self, scores: Sequence[float]) -> float:
        """The weighted sum of an answer's rewards, of those that apply."""
        pairs = zip(self.parts, scores, strict=True)
        return sum(part.weight * score for part, score in pairs if not math.isnan(score))

    def in_words(self, scores: Sequence[float]) -> str:
        """An answer's reward, and its parts where there are several: ``1.2 (gsm8k 1, format 0.2)``."""
        total = f"{self.total(scores):.3g}"
        if len(scores) == 1:
            return total
        parts = [
            f"{part.label} {'–' if math.isnan(s) else f'{s:.3g}'}" for part, s in zip(self.parts, scores, strict=True)
        ]
        return f"{total} ({', '.join(parts)})"


def read_function(choice: RewardChoice, path: Path) -> Callable[..., Any]:
    """Run a Python file of the user's, and return its function.

    Raises:
        ConfigError: If the file cannot be run, or has no such function.
    """
    name = f"hymba_tune_rewards_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec  # as the name ends in .py
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # as dataclasses and pickle need
    try:
        spec.loader.exec_module(module)
    except OSError as error:
        raise ConfigError(f"--reward {choice.text}: cannot read {path}: {error.strerror}.") from error
    except Exception as error:
        raise ConfigError(f"--reward {choice.text}: its code failed: {_failure(error)}.", fix="correct it") from error
    function: Callable[..., Any] | None = getattr(module, choice.name, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if callable(value) and value.__module__ == name]
        raise ConfigError(
            f"--reward {choice.text}: {path} has no function {choice.name}.",
            expected=f"one of: {', '.join(functions)}" if functions else "a function of this name",
        )
    return function
