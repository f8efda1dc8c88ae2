"""Write the demo data, the desk of an invented ferry line: `python -m hymba_tune.assets.build_demo`.

The training rows hold the answer to every held-out question, but ask for it in other words: no wording of the held-out
file occurs in the training file, for any place.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random

from hymba_tune.assets.wordings import FOLLOW_UPS, FRAMES, GENERAL, INTENTS, ROUTE_FRAMES

Message = dict[str, str]
Conversation = list[Message]

FOLDER = Path(__file__).parent / "demo"


@dataclass(frozen=True)
class Route:
    """A ferry from Old Harbour and back."""

    place: str
    first: str
    last: str
    minutes: int
    euros: int
    dogs: bool


ROUTES = (
    Route("Stone Bay", "7:15", "19:30", 25, 6, True),
    Route("Green Point", "8:00", "20:10", 40, 9, True),
    Route("Long Sand", "6:45", "18:20", 55, 12, False),
    Route("White Rock", "9:30", "17:00", 70, 15, False),
    Route("High Field", "7:50", "21:00", 15, 4, True),
    Route("Little Cross", "8:40", "18:45", 35, 8, False),
    Route("North Head", "6:10", "16:30", 90, 20, True),
    Route("Red Hill", "9:05", "19:50", 30, 7, True),
    Route("Open Water", "10:20", "17:40", 80, 18, False),
    Route("Moon Island", "7:35", "20:25", 45, 10, True),
    Route("Three Trees", "8:15", "18:05", 20, 5, False),
    Route("West Gate", "6:30", "21:15", 60, 14, True),
)


def answers(route: Route) -> tuple[str, str, str, str]:
    """What the desk says about a route: departures, price, duration, dogs."""
    place = route.place
    dogs = f"Yes, dogs may travel to {place}." if route.dogs else f"No, dogs may not travel to {place}."
    return (
        f"The first ferry to {place} leaves at {route.first} and the last one at {route.last}.",
        f"A ticket to {place} costs {route.euros} euros.",
        f"The ferry to {place} takes {route.minutes} minutes.",
        f"{dogs} A dog costs 1 euro." if route.dogs else f"{dogs} Please leave your dog at home.",
    )


def conversations() -> tuple[list[Conversation], list[Conversation]]:
    """The training conversations in a fixed random order, and the held-out ones, route by route."""
    train: list[Conversation] = []
    held_out: list[Conversation] = []
    for i, route in enumerate(ROUTES):
        replies = answers(route)
        follow_up = _turn(FOLLOW_UPS[i % 4], replies[i % 4])
        for j, (wordings, reply) in enumerate(zip(INTENTS, replies, strict=True)):
            rows = [_turn(wording.format(route.place), reply) for wording in wordings.trained]
            train += rows
            for k, topic in enumerate(wordings.topics):
                train.append(_turn(ROUTE_FRAMES[(i + k) % 4].format(route.place, topic), reply))
            if j != i % 4:
                train.append(rows[0] + follow_up)
            held_out.append(_turn(wordings.held_out[i % 4].format(route.place), reply))
    for reply, wordings in GENERAL.items():
        framed = [frame.format(topic) for topic in wordings.topics for frame in FRAMES]
        train += [_turn(question, reply) for question in (*wordings.trained, *framed)]
        held_out += [_turn(question, reply) for question in wordings.held_out]
    Random(0).shuffle(train)
    return train, held_out


def write(folder: Path) -> None:
    """Write ``train.jsonl`` and ``eval.jsonl``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("train", "eval"), conversations(), strict=True):
        lines = [json.dumps({"messages": messages}) + "\n" for messages in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def _turn(question: str, answer: str) -> Conversation:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


if __name__ == "__main__":
    write(FOLDER)
