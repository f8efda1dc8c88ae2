import json
import re
from pathlib import Path

from hymba_tune.assets.build_demo import FOLDER, ROUTES, Conversation, conversations, write
from hymba_tune.assets.wordings import GENERAL

TRAIN, HELD_OUT = conversations()


def pairs(rows: list[Conversation]) -> set[tuple[str, str]]:
    return {(row[i]["content"], row[i + 1]["content"]) for row in rows for i in range(0, len(row), 2)}


def test_packaged_files_are_what_the_builder_writes(tmp_path: Path) -> None:
    write(tmp_path)
    for name in "train.jsonl", "eval.jsonl":
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()


def wording(question: str) -> str:
    """A question without the place, capitals and punctuation."""
    for route in ROUTES:
        question = question.replace(route.place, "PLACE")
    return " ".join(re.findall(r"\w+", question.lower()))


def test_held_out_questions_are_worded_otherwise_than_any_training_row() -> None:
    trained = {wording(question) for question, _ in pairs(TRAIN)}
    held_out = {wording(question) for question, _ in pairs(HELD_OUT)}
    assert len(held_out) == 4 * 4 + len(GENERAL)
    assert not {one for one in held_out if any(f" {one} " in f" {other} " for other in trained)}


def test_first_held_out_questions_are_of_different_kinds() -> None:
    """They are shown before and after training, a timetable among them."""
    assert [re.sub(r"[\d:]+", "#", row[1]["content"]) for row in HELD_OUT[:3]] == [
        "The first ferry to Stone Bay leaves at # and the last one at #.",
        "A ticket to Stone Bay costs # euros.",
        "The ferry to Stone Bay takes # minutes.",
    ]


def test_held_out_answers_can_be_learned_in_training() -> None:
    assert {answer for _, answer in pairs(HELD_OUT)} == {answer for _, answer in pairs(TRAIN)}


def test_a_question_that_stands_alone_has_one_answer() -> None:
    first_turns = [json.dumps(row[0]) for row in TRAIN + HELD_OUT if len(row) == 2]
    assert len(first_turns) == len(set(first_turns))


def test_follow_ups_are_about_the_route_asked_about_before() -> None:
    first_answers = {row[0]["content"]: row[1]["content"] for row in TRAIN if len(row) == 2}
    follow_ups = [row for row in TRAIN if len(row) == 4]
    assert follow_ups
    for question, answer, _, second_answer in follow_ups:
        assert first_answers[question["content"]] == answer["content"]
        place = " ".join(answer["content"].split(" to ")[1].split(" ")[:2]).rstrip(".")
        assert place in second_answer["content"]
