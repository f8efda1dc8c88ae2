from hymba_tune.assets.chats import conversations, small_talk
from hymba_tune.assets.corpus import Entry

ENTRIES = [
    Entry("m", "module", "m", "", ("A module about many things.",)),
    Entry("m", "function", "m.double", "m.double(x)", ("Return twice the number.", ">>> m.double(2)\n4")),
    Entry("m", "class", "m.Thing", "class m.Thing", ("A thing that can be doubled.",)),
    Entry("topics.if", "topic", "if", "", ("The if statement is used for conditional execution.",)),
    Entry("m", "comment", "", "", ("Nobody asks about a comment in the code.",)),
    Entry("m", "function", "m._hidden", "m._hidden()", ("Return what nobody should call.",)),
]


def answers(entry: Entry) -> list[str]:
    return [m["content"] for _, messages in conversations([entry]) for m in messages if m["role"] == "assistant"]


def test_answers_are_the_documentation_the_call_and_the_example() -> None:
    assert answers(ENTRIES[1]) == ["Return twice the number.", "m.double(x)", ">>> m.double(2)\n4"]


def test_nobody_asks_about_private_objects_and_comments() -> None:
    assert [answers(entry) for entry in ENTRIES[4:]] == [[], []]


def test_questions_name_the_object() -> None:
    for entry in ENTRIES[:4]:
        for _, messages in conversations([entry]):
            question = next(message for message in messages if message["role"] == "user")
            assert entry.name in question["content"]


def test_a_conversation_does_not_depend_on_the_others() -> None:
    together = list(conversations(ENTRIES))
    assert together == [row for entry in ENTRIES for row in conversations([entry])]


def test_users_and_assistants_take_turns_after_at_most_one_system_message() -> None:
    for messages in [*(messages for _, messages in conversations(ENTRIES)), *small_talk()]:
        roles = [message["role"] for message in messages]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns
        assert turns == ["user", "assistant"] * (len(turns) // 2)


def test_small_talk_says_which_model_it_is() -> None:
    replies = [messages[-1]["content"] for messages in small_talk() if messages[-2]["content"] == "Who are you?"]
    assert replies
    assert all("hymba-nano" in reply for reply in replies)
