"""Short conversations made from the documentation, so that a small model learns the chat format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product
from random import Random

from hymba_tune.assets.corpus import Entry

Message = dict[str, str]

MEANING = {
    "module": ("What is the module {} for?", "What does {} provide?", "Tell me about the module {}.", "Explain {}."),
    "class": ("What is the class {}?", "What is {}?", "Describe {} briefly.", "Explain the class {}."),
    "function": ("What does {} do?", "Explain {}.", "What is {} for?", "Describe {} briefly.", "Tell me about {}."),
    "topic": ("What does the language reference say about {}?", "Explain {} in Python."),
}
CALL = ("Show the signature of {}.", "How do I call {}?", "Which arguments does {} take?")
EXAMPLE = ("Give me an example of {}.", "Show how {} is used.")
FOLLOW_UP_CALL = ("How do I call it?", "What are its arguments?", "And its signature?")
FOLLOW_UP_EXAMPLE = ("Can you show an example?", "An example, please.")
SYSTEM = (
    "You are a helpful assistant.",
    "Answer questions about Python.",
    "You explain Python's standard library in few words.",
    "Be brief.",
)

GREETINGS = ("Hello", "Hi", "Hey", "Hi there", "Good morning", "Good evening", "Hello there")
WELCOMES = (
    "Hello! How can I help you?",
    "Hi! What would you like to know?",
    "Hello! Ask me about Python's standard library.",
)
SMALL_TALK = (
    (
        ("Who are you?", "What are you?", "What is your name?", "Introduce yourself.", "Who am I talking to?"),
        (
            "I am hymba-nano, a very small language model made as an example.",
            "My name is hymba-nano. I am a small example model, and I do not know much.",
        ),
    ),
    (
        ("What can you do?", "What do you know?", "Can you help me?", "What can I ask you?", "How can you help?"),
        (
            "I have read the documentation of Python's standard library. I know little else, and I make mistakes.",
            "I can try to explain parts of Python's standard library. Please check what I say.",
        ),
    ),
    (
        ("Are you smart?", "Can I trust you?", "Are you always right?", "Do you make mistakes?"),
        (
            "I am a very small model, and I often make mistakes.",
            "I am only an example, so please check what I say.",
        ),
    ),
    (
        ("How were you made?", "What were you trained on?", "Where does your knowledge come from?"),
        ("I was trained by hymba-tune on the documentation of Python's standard library.",),
    ),
    (
        ("Thank you.", "Thanks!", "Thanks a lot.", "That helps, thank you."),
        ("You are welcome!", "You are welcome. Is there anything else?"),
    ),
    (("Goodbye.", "Bye!", "See you later."), ("Goodbye!", "Goodbye, and good luck.")),
    (("How are you?", "How is it going?"), ("I am a program, and I am running well. How can I help you?",)),
)


def conversations(entries: Iterable[Entry]) -> Iterator[tuple[str, list[Message]]]:
    """Questions about public objects, answered with their documentation.

    Yields:
        The module and the messages: one question, or two about the same object.
    """
    for entry in entries:
        if not entry.name or any(part.startswith("_") for part in entry.name.split(".")):
            continue
        rng = Random(entry.name)  # its own, so that one object more changes no other conversation
        turns = _turns(entry, rng)
        for messages in _arrange(turns, rng):
            yield entry.module, _with_system(messages, rng)


def small_talk() -> Iterator[list[Message]]:
    """Greetings, thanks, and what the model is."""
    rng = Random("small talk")
    for greeting, ending, welcome in product(GREETINGS, (".", "!", ""), WELCOMES):
        yield _with_system(_turn(greeting + ending, welcome), rng)
    for questions, answers in SMALL_TALK:
        for question, answer in product(questions, answers):
            turn = _turn(question, answer)
            yield _with_system(turn, rng)
            yield turn
            yield _with_system(_turn(f"{rng.choice(GREETINGS)}!", rng.choice(WELCOMES)) + turn, rng)


def _turns(entry: Entry, rng: Random) -> list[tuple[str, str, str]]:
    """(question, the same question after another one, answer) for what the documentation tells of an object."""
    prose = [p for p in entry.paragraphs if ">>>" not in p and 20 <= len(p) <= 500]
    examples = [p for p in entry.paragraphs if p.startswith(">>>") and len(p) <= 300]
    name = entry.name.removeprefix("topics.")
    turns = []
    if prose:
        question = rng.choice(MEANING[entry.kind]).format(name)
        turns.append((question, question, prose[0]))
    if entry.kind == "function" and entry.call.endswith(")"):
        turns.append((rng.choice(CALL).format(name), rng.choice(FOLLOW_UP_CALL), entry.call))
    if examples:
        turns.append((rng.choice(EXAMPLE).format(name), rng.choice(FOLLOW_UP_EXAMPLE), examples[0]))
    return turns


def _arrange(turns: list[tuple[str, str, str]], rng: Random) -> Iterator[list[Message]]:
    """All turns in one conversation, or each in its own."""
    if len(turns) > 1 and rng.random() < 0.5:
        first, *others = turns
        yield _turn(first[0], first[2]) + [m for _, question, answer in others for m in _turn(question, answer)]
    else:
        yield from (_turn(question, answer) for question, _, answer in turns)


def _turn(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _with_system(messages: list[Message], rng: Random) -> list[Message]:
    """Put a system message before one conversation in five."""
    if rng.random() < 0.2:
        return [{"role": "system", "content": rng.choice(SYSTEM)}, *messages]
    return messages
