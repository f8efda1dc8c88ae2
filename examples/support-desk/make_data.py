"""Write data/train.jsonl and data/eval.jsonl: the desk of an invented boat rental, asked in different words."""

import json
from itertools import permutations
from pathlib import Path

SYSTEM = "You work at the desk of Blue Heron, a boat rental. Answer in one sentence."

BOATS = {  # euros an hour, euros of deposit, people
    "canoe": (9, 40, 3),
    "kayak": (7, 30, 1),
    "pedal boat": (12, 25, 4),
    "rowing boat": (10, 35, 5),
    "motor boat": (45, 200, 6),
    "sailing boat": (30, 150, 2),
    "raft": (24, 60, 8),
    "house boat": (80, 500, 7),
}
ANSWERS = {
    "price": "A {boat} costs {} euros an hour.",
    "deposit": "The deposit for a {boat} is {} euros.",
    "people": "There is room for {} in a {boat}.",
}
TRAINED = {
    "price": (
        "How much is a {boat}?",
        "What does a {boat} cost?",
        "What is the price of a {boat}?",
        "How many euros is a {boat} an hour?",
        "What do I pay for a {boat}?",
        "I want a {boat}. How much is it?",
        "Tell me the price of a {boat}, please.",
        "Is a {boat} expensive?",
        "What do you ask for an hour in a {boat}?",
        "We need a {boat}. What does it cost?",
    ),
    "deposit": (
        "What is the deposit for a {boat}?",
        "How much deposit do you ask for a {boat}?",
        "Do I leave a deposit for a {boat}?",
        "How high is the deposit of a {boat}?",
        "I want a {boat}. What is the deposit?",
        "Tell me the deposit for a {boat}, please.",
        "Is there a deposit on a {boat}?",
        "We need a {boat}. Is there a deposit?",
        "How many euros of deposit is a {boat}?",
        "What deposit does a {boat} need?",
    ),
    "people": (
        "How many people fit in a {boat}?",
        "How many of us can go in a {boat}?",
        "For how many people is a {boat}?",
        "How large is a {boat}?",
        "I want a {boat}. How many people fit in?",
        "How many seats does a {boat} have?",
        "Is there room for us in a {boat}?",
        "We need a {boat}. How many can go in?",
        "How many people can use a {boat}?",
        "Is a {boat} large enough for us?",
    ),
}
HELD_OUT = {
    "price": ("How much does a {boat} cost?", "How many euros do I pay for a {boat}?"),
    "deposit": ("How much is the deposit for a {boat}?", "Do you ask for a deposit on a {boat}?"),
    "people": ("How many people can go in a {boat}?", "How many seats are in a {boat}?"),
}
FOLLOW_UPS = {  # trained; the last of each is held out
    "price": ("And the price?", "And what does it cost?", "How much is it?", "And how much does it cost?"),
    "deposit": ("And the deposit?", "Is there a deposit?", "What is the deposit?", "And how much is the deposit?"),
    "people": ("And how many people?", "How many fit in?", "For how many people?", "And how many people fit in?"),
}


def answer(boat: str, topic: str) -> str:
    """What the desk says about a boat."""
    number = BOATS[boat][list(ANSWERS).index(topic)]
    said = f"{number} people" if number > 1 else "one person"
    return ANSWERS[topic].format(said if topic == "people" else number, boat=boat)


def row(*turns: tuple[str, str]) -> dict[str, list[dict[str, str]]]:
    """A conversation, with the system message first."""
    messages = [{"role": "system", "content": SYSTEM}]
    for question, reply in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return {"messages": messages}


def main() -> None:
    """Write both files: no wording of a last question in the second one occurs in the first."""
    train, held_out = [], []
    for boat in BOATS:
        for topic in ANSWERS:
            reply = answer(boat, topic)
            train += [row((question.format(boat=boat), reply)) for question in TRAINED[topic]]
            held_out += [row((question.format(boat=boat), reply)) for question in HELD_OUT[topic]]
        for i, (first, second) in enumerate(permutations(ANSWERS, 2)):
            opening = TRAINED[first][i].format(boat=boat), answer(boat, first)
            *trained, last = FOLLOW_UPS[second]
            train += [row(opening, (question, answer(boat, second))) for question in trained]
            held_out.append(row(opening, (last, answer(boat, second))))

    Path("data").mkdir(exist_ok=True)
    for name, rows in ("train", train), ("eval", held_out):
        path = Path("data", f"{name}.jsonl")
        path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
        print(f"{path}: {len(rows)} conversations")


if __name__ == "__main__":
    main()
