"""Write what the teacher has read, what is left to train a student with, and held-out questions to data/."""

import json
import random
from pathlib import Path

from hymba_tune.assets.build_demo import ROUTES, answers
from hymba_tune.assets.wordings import INTENTS

LABELED = 16


def main() -> None:
    """Write four files on four routes of the packaged ferry line; no wording of a held-out question is trained on."""
    train, held_out = [], []
    for route in ROUTES[:4]:
        for wordings, reply in zip(INTENTS, answers(route), strict=True):
            train += [(question.format(route.place), reply) for question in wordings.trained]
            held_out += [(question.format(route.place), reply) for question in wordings.held_out]
    random.Random(0).shuffle(train)

    def as_row(question: str, *reply: str) -> dict[str, list[dict[str, str]]]:
        texts = zip(("user", "assistant"), (question, *reply), strict=False)
        return {"messages": [{"role": role, "content": text} for role, text in texts]}

    files = {
        "teacher": [as_row(*pair) for pair in train],
        "labeled": [as_row(*pair) for pair in train[:LABELED]],
        "prompts": [as_row(question) for question, _ in train],
        "eval": [as_row(*pair) for pair in held_out],
    }
    Path("data").mkdir(exist_ok=True)
    for name, rows in files.items():
        path = Path("data", f"{name}.jsonl")
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()
