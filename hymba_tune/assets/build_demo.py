"""Write the demo data, the desk of an invented ferry line: `python -m hymba_tune.assets.build_demo`.

The training rows hold the answer to every held-out question, but ask for it in other words: no wording of the held-out
file occurs in the training file, for any place.
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
class Wordings:
    """Ways to ask for one thing.

    Attributes:
        trained: The ways that the training rows ask.
        topics: What the training rows ask about in the words of `FRAMES`.
        held_out: The ways that the held-out rows ask, none of which is in ``trained``.
    """

    trained: tuple[str, ...]
    topics: tuple[str, ...]
    held_out: tuple[str, ...]


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

DEPARTURES = Wordings(
    trained=(
        "When does the ferry to {} leave?",
        "What time is the boat to {}?",
        "I want to go to {}. When can I leave?",
        "Can you tell me the times for {}?",
        "When is the first ferry to {}?",
        "When is the last ferry to {}?",
        "Which ferries go to {} today?",
        "At what time do you sail to {}?",
        "What is the timetable for {}?",
        "When do the boats to {} leave?",
        "How early can I leave for {}?",
        "How late can I go to {}?",
        "Please tell me when the boat to {} leaves.",
        "When are the ferries to {} tomorrow?",
        "I need the times of the boats to {}.",
        "At what times can I go to {}?",
    ),
    topics=("the times", "the timetable", "when it leaves", "the first ferry"),
    held_out=(
        "What time does the ferry to {} leave?",
        "When can I take a boat to {}?",
        "Can you tell me when you sail to {}?",
        "What are the times of the ferries to {}?",
    ),
)
PRICE = Wordings(
    trained=(
        "How much is a ticket to {}?",
        "What does it cost to go to {}?",
        "What is the price of a ticket to {}?",
        "How much do I pay for {}?",
        "I need one ticket to {}. How much is that?",
        "Is it expensive to go to {}?",
        "Tell me the price for {}, please.",
        "What do you ask for a ticket to {}?",
        "How many euros is a ticket to {}?",
        "How many euros does the trip to {} cost?",
        "How much money do I need to go to {}?",
        "How much is the trip to {}?",
        "I want to go to {}. What is the price?",
        "What does the boat to {} cost?",
        "What is the price of the boat to {}?",
        "I want to go to {}. How much is a ticket?",
    ),
    topics=("the price", "the cost", "how much it is", "how many euros it is"),
    held_out=(
        "How much does a ticket to {} cost?",
        "What is the price of the ferry to {}?",
        "What do I pay for a ticket to {}?",
        "How many euros do I pay for the trip to {}?",
    ),
)
DURATION = Wordings(
    trained=(
        "How long does it take to {}?",
        "How long is the trip to {}?",
        "How many minutes is it to {}?",
        "Is {} far away?",
        "How long will I be on the boat to {}?",
        "What is the travel time to {}?",
        "How fast is the ferry to {}?",
        "Will the trip to {} take long?",
        "How much time do I need to get to {}?",
        "How many minutes will I travel to {}?",
        "How many minutes is the trip to {}?",
        "How many minutes does it take to {}?",
        "How many minutes does the boat to {} take?",
        "Does the boat to {} take long?",
        "Does it take a long time to {}?",
        "I want to go to {}. Is it far?",
        "Is it a long trip to {}?",
    ),
    topics=("the travel time", "how long it takes", "how many minutes it is", "how far it is"),
    held_out=(
        "How long does the ferry to {} take?",
        "How many minutes does the trip to {} take?",
        "How long will I travel to {}?",
        "Does it take long to go to {}?",
    ),
)
DOGS = Wordings(
    trained=(
        "Can I bring my dog to {}?",
        "Are dogs allowed on the ferry to {}?",
        "May my dog come with me to {}?",
        "I have a dog. Can we go to {}?",
        "Do you take dogs to {}?",
        "Is it possible to take a dog to {}?",
        "We want to go to {} with our dog. Is that allowed?",
        "Does the boat to {} take dogs?",
        "May dogs travel to {}?",
        "Can my dog get on the boat to {}?",
        "Can we bring our dog to {}?",
        "I want to go to {}. Is my dog allowed?",
        "Is a dog allowed on the trip to {}?",
        "I want to go to {} with a dog. May I?",
    ),
    topics=("dogs", "my dog", "our dog", "a dog"),
    held_out=(
        "May I bring a dog to {}?",
        "Are dogs allowed on the boat to {}?",
        "Can we take our dog to {}?",
        "I want to go to {} with my dog. Is that possible?",
    ),
)
# In the order of `answers`.
INTENTS = (DEPARTURES, PRICE, DURATION, DOGS)
ROUTE_FRAMES = (
    "I want to go to {}. What about {}?",
    "I travel to {} today. Please tell me about {}.",
    "We go to {}. Can you tell me something about {}?",
    "About the boat to {}: I have a question about {}.",
)
FRAMES = (
    "What about {}?",
    "Please tell me about {}.",
    "Can you tell me something about {}?",
    "I have a question about {}.",
    "What do I need to know about {}?",
    "Do you know something about {}?",
)
FOLLOW_UPS = (
    "And when does it leave?",
    "And how much is a ticket?",
    "And how long does it take?",
    "And can I bring my dog?",
)
GENERAL = {
    "You may bring two bags for free. Each further bag costs 3 euros.": Wordings(
        trained=(
            "How many bags can I bring?",
            "What about my bags?",
            "Do I pay for my bags?",
            "I have three bags. Is that allowed?",
            "Can I bring a large bag?",
            "What does a bag cost?",
            "May I bring four bags?",
            "How much is one more bag?",
            "Can I take my bags with me?",
            "I have a bag. Is it free?",
            "Which bags are free?",
            "Are two bags free?",
            "We have many bags. Can we bring them?",
            "Is there a price for bags?",
            "Must I pay for two bags?",
            "How many bags are allowed?",
            "Do you have room for my bags?",
        ),
        topics=("bags", "my bags", "a large bag", "our three bags"),
        held_out=("Are bags free?",),
    ),
    "Children under six travel for free. Older children pay half the price.": Wordings(
        trained=(
            "Do children pay?",
            "What is the price for a child?",
            "How much is a ticket for my son?",
            "Is it free for children?",
            "My daughter is four. Does she need a ticket?",
            "How much do children pay?",
            "Do I need a ticket for my child?",
            "We have two children. What do they pay?",
            "My son is eight. How much is his ticket?",
            "Can children travel for free?",
            "Is there a price for children?",
            "Is the price lower for a child?",
            "Are children free?",
            "Is the ticket of my daughter free?",
            "Does my son pay the full price?",
            "Do you have tickets for children?",
            "Do you have another price for children?",
            "Do you have prices for children?",
            "Do you have a ticket for a child?",
            "Is there a lower price for my son?",
        ),
        topics=("children", "a child", "my son", "our daughter"),
        held_out=("Do you have a lower price for children?",),
    ),
    "A bike costs 2 euros on every ferry. Please come ten minutes early.": Wordings(
        trained=(
            "Can I bring my bike?",
            "How much is it for a bike?",
            "Are bikes allowed?",
            "Do you take bikes?",
            "I want to travel with my bike. Is that possible?",
            "Can we bring our bikes?",
            "Is my bike free?",
            "May I take a bike on the ferry?",
            "I have a bike. What do I pay?",
            "Is there a price for bikes?",
            "How much does my bike cost?",
            "What does it cost to bring a bike?",
            "Does a bike need a ticket?",
            "Can a bike travel on the boat?",
            "We have two bikes. What do they cost?",
            "Do I pay for a bike?",
            "Do you have room for a bike?",
        ),
        topics=("bikes", "a bike", "my bike", "our bikes"),
        held_out=("What does a bike cost?",),
    ),
    "Yes, you get your money back until one hour before the ferry leaves.": Wordings(
        trained=(
            "Can I get my money back?",
            "May I return my ticket?",
            "I cannot travel. Can I return the ticket?",
            "Is it possible to cancel a ticket?",
            "What if I cancel?",
            "Can I cancel my trip?",
            "I want to cancel. Do I get money back?",
            "Do you take tickets back?",
            "When do I get my money back?",
            "I do not need my ticket. Do you take it back?",
            "Will you give my money back?",
            "Can I still cancel?",
            "How do I cancel my ticket?",
            "May I give my ticket back?",
            "Is my money lost if I cancel?",
            "Until when can I cancel?",
            "Do you give me my money back?",
        ),
        topics=("my money back", "money for a ticket that I return", "a trip that I cancel", "tickets that we cancel"),
        held_out=("Do you give the money back?",),
    ),
    "In a strong wind we do not sail. Your ticket is then good for the next day.": Wordings(
        trained=(
            "What happens in bad weather?",
            "Do you sail in a strong wind?",
            "What if there is a storm?",
            "Is the ferry safe in bad weather?",
            "Do you also sail when the weather is bad?",
            "What do you do in a storm?",
            "Will you sail in this weather?",
            "There is a lot of wind. Do you sail?",
            "The weather is bad today. What about my ticket?",
            "Does a storm stop the ferry?",
            "Is there a ferry when the wind is strong?",
            "The wind is bad. Is there a boat today?",
            "Will there be a ferry in this wind?",
            "Can you sail in the wind?",
            "Do you stop in a storm?",
            "There is a storm today. Will the boat leave?",
            "The wind is strong. What do you do?",
            "Is the wind too strong today?",
        ),
        topics=("the wind", "a strong wind", "bad weather", "a storm"),
        held_out=("The wind is strong today. Will you sail?",),
    ),
    "You can buy tickets at the desk in Old Harbour or on the boat.": Wordings(
        trained=(
            "Where can I buy a ticket?",
            "Where do you sell tickets?",
            "Can I buy a ticket on the boat?",
            "How do I get a ticket?",
            "Where is the ticket desk?",
            "Do you sell tickets on the boat?",
            "I need a ticket. Where do I buy it?",
            "Where are the tickets?",
            "How can I buy tickets?",
            "I have no ticket. What can I do?",
            "Who sells tickets?",
            "Where can we get tickets?",
            "I do not have a ticket. Where can I buy one?",
            "Can I get a ticket at the desk?",
            "Is it possible to buy a ticket on the ferry?",
            "Where do I find a ticket?",
            "Do you have tickets?",
        ),
        topics=(
            "where to buy a ticket",
            "how to get tickets",
            "the place where you sell tickets",
            "how I get a ticket",
        ),
        held_out=("I have no ticket yet. Where do I get one?",),
    ),
    "Yes, there is hot food and coffee on every boat.": Wordings(
        trained=(
            "Is there food on the boat?",
            "Can I eat something on the ferry?",
            "Do you have coffee?",
            "Can I get a coffee on the boat?",
            "Is there something to eat?",
            "Can we eat on the boat?",
            "Is there hot food?",
            "Do you sell coffee?",
            "I want to eat. Do you have food?",
            "Do you have something to eat on the ferry?",
            "What food do you sell?",
            "Can I buy food on the boat?",
            "Is there coffee on the ferry?",
            "Do you sell something hot?",
            "Where can I eat?",
            "Is there food on every boat?",
            "Do you have food?",
        ),
        topics=("food", "coffee", "something to eat", "hot food"),
        held_out=("Do you sell food?",),
    ),
    "The desk is open every day from 6:00 to 21:30.": Wordings(
        trained=(
            "When is the desk open?",
            "At what time do you open?",
            "When do you close?",
            "Are you open every day?",
            "How long is the desk open today?",
            "When can I come to the desk?",
            "Is the desk open now?",
            "What time does the desk close?",
            "When do you open tomorrow?",
            "Are you still open?",
            "Until when are you open?",
            "When can I reach the desk?",
            "Until what time is the desk open?",
            "From when are you open?",
            "How early can I reach you?",
            "When does the desk open and close?",
            "Do you open early?",
        ),
        topics=("when you open", "when you close", "when the desk is open", "the hours of the desk"),
        held_out=("How late is the desk open?",),
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
