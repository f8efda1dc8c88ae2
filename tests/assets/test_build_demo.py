import json
from pathlib import Path

from hymba_tune.assets.build_demo import FOLDER, Conversation, conversations, write

TRAIN, HELD_OUT = conversations()


def pairs(rows: list[Conversation]) -> set[tuple[str, str]]:
    return {(row[i]["content"], row[i + 1]["content"]) for row in rows for i in range(0, len(row), 2)}


def test_packaged_files_are_what_the_builder_writes(tmp_path: Path) -> None:
    write(tmp_path)
    for name in "train.jsonl", "eval.jsonl":
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()


def test_held_out_questions_are_not_asked_in_training() -> None:
    assert not {question for question, _ in pairs(HELD_OUT)} & {question for question, _ in pairs(TRAIN)}


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
