"""The base class of all settings, and the types of their values."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from cyclopts import Group, Parameter
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

MAX_NUMBER = 2**32 - 1
"""The largest number that any setting takes; seeds go so far."""
MAX_WEIGHT = 1000
"""The most that rows of a source are repeated."""
MAX_NAME_BYTES = 255
"""The longest name of a file that file systems take."""
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
LIST = Parameter(negative="", consume_multiple=True, show_default=False)
Names = Annotated[list[str], LIST]
Origins = Annotated[list[Annotated[str, Field(pattern=r"^(\*|https?://[^/\s]+)$")]], LIST]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$")]
Weights = Annotated[list[Annotated[float, Field(gt=0, le=MAX_WEIGHT)]], LIST]
Counts = Annotated[list[Annotated[int, Field(ge=1)]], LIST]


def _written_as_pairs(value: Any) -> Any:
    """Turn a mapping, which a recipe may hold, into a list of pairs."""
    return [f"{name}={choice}" for name, choice in value.items()] if isinstance(value, dict) else value


def _checked_pairs(value: list[str]) -> list[str]:
    if wrong := [pair for pair in value if not all(pair.partition("="))]:
        raise ValueError(f"{reprlib.repr(wrong[0])} is not a pair such as name=value")
    return value


Comparison = Literal["gsm8k", "number", "exact"]
"""How an answer is compared with the known one: by what follows ####, by the last number, or as a whole."""
Pair = Annotated[str, Field(pattern=r"^[^=]+=[\s\S]+$")]
Pairs = Annotated[
    Names,
    BeforeValidator(_written_as_pairs, json_schema_input_type=list[Pair] | dict[str, str | int | float]),
    AfterValidator(_checked_pairs),
]


class Method(StrEnum):
    """How the weights are trained."""

    lora = "lora"
    dora = "dora"
    full = "full"


class Scheme(StrEnum):
    """How weights are stored in fewer bits."""

    nf4 = "nf4"
    fp4 = "fp4"
    int8 = "int8"


class Onto(StrEnum):
    """Which weights to merge an adapter into that was trained on quantized weights."""

    original = "original"
    dequantized = "dequantized"


class MetaTokens(StrEnum):
    """How the meta tokens are trained when an adapter is."""

    lora = "lora"
    full = "full"
    frozen = "frozen"


class OnBadRow(StrEnum):
    """What to do with a row that cannot be used."""

    stop = "stop"
    skip = "skip"


class Learn(StrEnum):
    """Which answers of a conversation the loss covers."""

    all = "all"
    last = "last"


class Keep(StrEnum):
    """Which weights a run ends with."""

    best = "best"
    last = "last"


class Tracker(StrEnum):
    """Service that a run logs to live."""

    tensorboard = "tensorboard"
    trackio = "trackio"
    wandb = "wandb"
    mlflow = "mlflow"


class Start(StrEnum):
    """What to do with the adapter of the run that training starts from."""

    merge = "merge"
    continue_ = "continue"


class ReferenceSource(StrEnum):
    """Where a reference model's log-probabilities come from."""

    auto = "auto"
    adapter_off = "adapter-off"
    precompute = "precompute"


def as_mapping(pairs: Pairs) -> dict[str, str]:
    """Turn pairs such as ``prompt=question`` into a mapping."""
    return dict(pair.split("=", 1) for pair in pairs)


@dataclass(frozen=True)
class Accuracy:
    """How the accuracy of a kind of preference training is worded.

    Attributes:
        subject: The things that are counted, in the plural: ``pairs``.
        verdict: The property of those that count: ``ranked correctly``.
        chance: The accuracy of guessing; `None` if it depends on the data.
    """

    subject: str
    verdict: str
    chance: float | None


@dataclass(frozen=True)
class Verb:
    """What the plan, the table, the report and the model card need to know of a verb that trains.

    No field has a default, so that a verb cannot be declared in part.

    Attributes:
        name: The command. The config.yaml of a run holds it, and a recipe may.
        title: The title of its reports.
        loss_unit: The unit of its loss; empty where the loss is in no common unit.
        paired: Whether a row is a pair of texts that are trained on together.
        logit_copies: The float32 copies of the logits of a whole batch that a step holds at its peak; 0 where the loss
            is computed in chunks of tokens.
        accuracy: Words for its accuracy; `None` if it measures none.
        scores: Whether its model scores texts instead of writing them.
        figures: The held-out measures that a report shows with the losses: their columns without ``eval_``.
    """

    name: str
    title: str
    loss_unit: str
    paired: bool
    logit_copies: int
    accuracy: Accuracy | None
    scores: bool
    figures: tuple[str, ...]

    def __str__(self) -> str:
        return self.name

    @property
    def texts_per_row(self) -> int:
        """Texts of a row that are trained on together."""
        return 2 if self.paired else 1


NATS_PER_TOKEN = "nats a token"


class Config(BaseModel):
    """Base class of all settings. Unknown keys are errors, and values are also validated on assignment."""

    group: ClassVar[Group]
    """The `--help` group of the settings that a class adds. A redefined setting keeps its first group, and its
    description if it gets no other."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        for name in cls.__annotations__.keys() & cls.model_fields.keys():
            bases = (base for base in reversed(cls.__mro__) if issubclass(base, Config))
            first = next(base for base in bases if name in base.__annotations__)
            field = cls.model_fields[name]
            field.description = field.description or first.model_fields[name].description
            tags = [tag for tag in field.metadata if isinstance(tag, Group)]
            # The source's line breaks would show in --help.
            text = " ".join((field.description or "").split())
            field.metadata.append(Parameter(group=(first.group, *tags), help=text))

    @classmethod
    def kinds(cls) -> Iterator[type[Config]]:
        """Yield every class of settings."""
        for kind in cls.__subclasses__():
            yield kind
            yield from kind.kinds()

    def given(self) -> dict[str, Any]:
        """Return the settings that were given, without those left at their defaults."""
        return {name: getattr(self, name) for name in self.model_fields_set}

    model_config = ConfigDict(
        extra="forbid",
        allow_inf_nan=False,
        hide_input_in_errors=True,  # it may be huge, or hold a password
        validate_assignment=True,
        use_attribute_docstrings=True,
        defer_build=True,  # of the schemas: a command needs that of its verb only
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_truth(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false as a number: YAML reads ``yes`` and ``on`` as true, which pydantic would read as 1."""
        types = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and bool not in (types, *get_args(types)):
            raise ValueError(f"{str(value).lower()} is neither a number nor a text")
        return value

    @field_validator("*")
    @classmethod
    def _check_size(cls, value: Any) -> Any:
        """Refuse numbers that no computation can use, and names that no file can have."""
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, int | float) and abs(one) > MAX_NUMBER:
                raise ValueError(f"must be at most {MAX_NUMBER:,}")
            if isinstance(one, Path):
                _check_name(one)
        return value


def _check_name(path: Path) -> None:
    if "\0" in str(path):
        raise ValueError("must be a name without NUL characters")
    longest = max((len(part.encode(errors="surrogatepass")) for part in path.parts), default=0)
    if longest > MAX_NAME_BYTES:
        raise ValueError(f"must be a name of at most {MAX_NAME_BYTES} bytes; it has {longest}")
