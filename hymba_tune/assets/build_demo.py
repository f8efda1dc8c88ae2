"""Write the demo data, the desk of an invented ferry line: `python -m hymba_tune.assets.build_demo`.

Every question of the held-out file is asked nowhere in the training file; its answer is found there under other words.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random

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

DEPARTURES = (
    "When does the ferry to {} leave?",
    "What time is the boat to {}?",
    "I want to go to {}. When can I leave?",
    "Can you tell me the times for {}?",
    "When is the first ferry to {}?",
    "When is the last ferry to {}?",
    "Which ferries go to {} today?",
    "At what time do you sail to {}?",
)
PRICE = (
    "How much is a ticket to {}?",
    "What does it cost to go to {}?",
    "What is the price of a ticket to {}?",
    "How much do I pay for {}?",
    "I need one ticket to {}. How much is that?",
    "Is it expensive to go to {}?",
    "Tell me the price for {}, please.",
    "What do you ask for a ticket to {}?",
)
DURATION = (
    "How long does it take to {}?",
    "How long is the trip to {}?",
    "How many minutes is it to {}?",
    "Is {} far away?",
    "How long will I be on the boat to {}?",
    "What is the travel time to {}?",
    "How fast is the ferry to {}?",
    "Will the trip to {} take long?",
)
DOGS = (
    "Can I bring my dog to {}?",
    "Are dogs allowed on the ferry to {}?",
    "May my dog come with me to {}?",
    "I have a dog. Can we go to {}?",
    "Do you take dogs to {}?",
    "Is it possible to take a dog to {}?",
    "We want to go to {} with our dog. Is that allowed?",
    "Does the boat to {} take dogs?",
)
# In the order of `answers`.
INTENTS = (DEPARTURES, PRICE, DURATION, DOGS)
FOLLOW_UPS = (
    "And when does it leave?",
    "And how much is a ticket?",
    "And how long does it take?",
    "And can I bring my dog?",
)
GENERAL = {
    "You may bring two bags for free. Each further bag costs 3 euros.": (
        "How many bags can I bring?",
        "What about my bags?",
        "Do I pay for my bags?",
        "I have three bags. Is that allowed?",
        "Can I bring a large bag?",
        "Are bags free?",
    ),
    "Children under six travel for free. Older children pay half the price.": (
        "Do children pay?",
        "What is the price for a child?",
        "How much is a ticket for my son?",
        "Is it free for children?",
        "My daughter is four. Does she need a ticket?",
        "Do you have a lower price for children?",
    ),
    "A bike costs 2 euros on every ferry. Please come ten minutes early.": (
        "Can I bring my bike?",
        "How much is it for a bike?",
        "Are bikes allowed?",
        "Do you take bikes?",
        "I want to travel with my bike. Is that possible?",
        "What does a bike cost?",
    ),
    "Yes, you get your money back until one hour before the ferry leaves.": (
        "Can I get my money back?",
        "May I return my ticket?",
        "I cannot travel. Can I return the ticket?",
        "Is it possible to cancel a ticket?",
        "What if I cancel?",
        "Do you give the money back?",
    ),
    "In a strong wind we do not sail. Your ticket is then good for the next day.": (
        "What happens in bad weather?",
        "Do you sail in a strong wind?",
        "What if there is a storm?",
        "Is the ferry safe in bad weather?",
        "Do you also sail when the weather is bad?",
        "The wind is strong today. Will you sail?",
    ),
    "You can buy tickets at the desk in Old Harbour or on the boat.": (
        "Where can I buy a ticket?",
        "Where do you sell tickets?",
        "Can I buy a ticket on the boat?",
        "How do I get a ticket?",
        "Where is the ticket desk?",
        "I have no ticket yet. Where do I get one?",
    ),
    "Yes, there is hot food and coffee on every boat.": (
        "Is there food on the boat?",
        "Can I eat something on the ferry?",
        "Do you have coffee?",
        "Can I get a coffee on the boat?",
        "Is there something to eat?",
        "Do you sell food?",
    ),
    "The desk is open every day from 6:00 to 21:30.": (
        "When is the desk open?",
        "At what time do you open?",
        "When do you close?",
        "Are you open every day?",
        "How long is the desk open today?",
        "Until when can I reach you?",
    ),
}


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
    """The training and the held-out conversations, each in a fixed random order."""
    train: list[Conversation] = []
    held_out: list[Conversation] = []
    for i, route in enumerate(ROUTES):
        replies = answers(route)
        follow_up = _turn(FOLLOW_UPS[i % 4], replies[i % 4])
        for j, (wordings, reply) in enumerate(zip(INTENTS, replies, strict=True)):
            rows = [_turn(wording.format(route.place), reply) for wording in wordings]
            held_out.append(rows.pop((i + j) % len(rows)))
            train += rows
            if j != i % 4:
                train.append(rows[0] + follow_up)
    for reply, questions in GENERAL.items():
        *known, unknown = (_turn(question, reply) for question in questions)
        train += known
        held_out.append(unknown)
    for part in train, held_out:
        Random(0).shuffle(part)
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
