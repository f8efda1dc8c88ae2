from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hymba_tune.checkpoint import load_tokenizer, load_weights
from hymba_tune.config import ChatConfig
from hymba_tune.data import Conversation, Message, encode_prompt
from hymba_tune.errors import ConfigError
from hymba_tune.generate import Chat, answer, write
from hymba_tune.registry import resolve_model

QUESTION = Conversation((Message("user", "I see two cats. What do I see?"),))


@pytest.fixture(scope="module")
def model(small_model: Path) -> Any:
    return load_weights(resolve_model(str(small_model)), dtype=torch.float32, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def tokenizer(small_model: Path) -> Any:
    return load_tokenizer(small_model)


@pytest.fixture
def chat(small_model: Path) -> Callable[..., Chat]:
    def make(**changes: Any) -> Chat:
        settings: dict[str, Any] = {"model": str(small_model), "dtype": "float32", "max_new_tokens": 12}
        return Chat(ChatConfig(**settings | changes))

    return make


class Scripted:
    """A model that answers with given tokens, and remembers what it was asked."""

    device, training = torch.device("cpu"), False

    def __init__(self, ids: list[int]) -> None:
        self.ids, self.asked = ids, {}

    def eval(self) -> None: ...
    def train(self, mode: bool) -> None: ...

    def generate(self, *, input_ids: torch.Tensor, streamer: Any, **asked: Any) -> torch.Tensor:
        self.asked = asked
        if streamer:
            streamer.put(input_ids)
            for token in self.ids:
                streamer.put(torch.tensor([token]))
            streamer.end()
        return torch.cat([input_ids[0], torch.tensor(self.ids, dtype=torch.long)])[None]


@pytest.mark.parametrize(
    "text",
    ["def f(x):\n    if x:\n        return 1\n", "  a  b ", "naïve ☃☃ 漢字", "one\n\n two", "", " ", "x\u00e9"],
)
def test_pieces_are_the_answer_and_the_answer_is_what_was_written(text: str, tokenizer: Any) -> None:
    """Also what TextStreamer loses: spaces that begin a line."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces: list[str] = []
    said = answer(
        Scripted([*ids, tokenizer.eos_token_id]),
        tokenizer,
        QUESTION,
        max_new_tokens=99,
        temperature=0,
        on_text=pieces.append,
    )
    assert said == text.strip()
    assert "".join(pieces) == said
    assert all(pieces)
    assert "\ufffd" not in "".join(pieces)


def test_pieces_come_while_the_answer_is_written(tokenizer: Any) -> None:
    ids = tokenizer("one two three four", add_special_tokens=False)["input_ids"]
    pieces: list[str] = []
    answer(Scripted(ids), tokenizer, QUESTION, max_new_tokens=9, temperature=0, on_text=pieces.append)
    assert len(pieces) > 3


def test_bytes_that_are_no_character_come_at_the_end(tokenizer: Any) -> None:
    ids = [*tokenizer("ok", add_special_tokens=False)["input_ids"], tokenizer.convert_tokens_to_ids("<0xE2>")]
    pieces: list[str] = []
    said = answer(Scripted(ids), tokenizer, QUESTION, max_new_tokens=9, temperature=0, on_text=pieces.append)
    assert said == "".join(pieces) == "ok\ufffd"


def test_greedy_answers_are_the_likeliest_tokens(model: Any, tokenizer: Any) -> None:
    ids = encode_prompt(QUESTION, tokenizer)
    start = len(ids)
    for _ in range(8):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    said = answer(model, tokenizer, QUESTION, max_new_tokens=8, temperature=0)
    assert said == tokenizer.decode(ids[start:], skip_special_tokens=True).strip()
    assert said


def test_model_is_left_in_its_mode(model: Any, tokenizer: Any) -> None:
    for mode in (True, False):
        model.train(mode)
        answer(model, tokenizer, QUESTION, max_new_tokens=1, temperature=0)
        assert model.training is mode


def test_answer_ends_with_the_end_token(model: Any, tokenizer: Any) -> None:
    ids = encode_prompt(QUESTION, tokenizer)
    likeliest = tokenizer.convert_ids_to_tokens(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    ending = copy.deepcopy(tokenizer)
    ending.eos_token = likeliest
    assert answer(model, ending, QUESTION, max_new_tokens=8, temperature=0) == likeliest


def test_sampling_takes_from_all_tokens(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not from the 50 likeliest, which transformers would do of itself."""
    ids = encode_prompt(QUESTION, tokenizer)
    ranks = model.eval()(torch.tensor([ids])).logits[0, -1].argsort(descending=True).tolist()
    generate, written = model.generate, []
    monkeypatch.setattr(model, "generate", lambda **options: written.append(generate(**options)) or written[-1])
    for _ in range(8):
        answer(model, tokenizer, QUESTION, max_new_tokens=1, temperature=100.0)
    assert max(ranks.index(int(row[0, len(ids)])) for row in written) > 50


def test_chat_keeps_what_was_said(chat: Callable[..., Chat], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[tuple[str, str]]] = []

    def record(*given: Any, **_: Any) -> str:
        seen.append([(message.role, message.content) for message in given[2].messages])
        return f"answer {len(seen)}"

    monkeypatch.setattr("hymba_tune.generate.chat.answer", record)
    talk = chat(system="Be brief.")
    talk.ask("one")
    talk.ask("two")
    first = [("system", "Be brief."), ("user", "one")]
    assert seen == [first, [*first, ("assistant", "answer 1"), ("user", "two")]]
    talk.reset()
    talk.ask("three")
    assert seen[-1] == [("system", "Be brief."), ("user", "three")]


def test_interrupted_answer_leaves_the_conversation_as_it_was(chat: Callable[..., Chat]) -> None:
    talk = chat(temperature=0)
    expected = chat(temperature=0).ask("two")

    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        talk.ask("one", interrupt)
    assert talk.ask("two") == expected


def test_chat_streams_its_answer(chat: Callable[..., Chat]) -> None:
    pieces: list[str] = []
    assert chat(seed=1).ask("one", pieces.append) == "".join(pieces) != ""


def test_greedy_chat_repeats_itself(chat: Callable[..., Chat]) -> None:
    assert chat(temperature=0).ask("one") == chat(temperature=0).ask("one")


def test_seed_makes_sampled_answers_repeat(chat: Callable[..., Chat]) -> None:
    answers = [chat(seed=seed, temperature=2).ask("one") for seed in (3, 3, 4)]
    assert answers[0] == answers[1] != answers[2]


def test_chat_is_called_by_its_run(chat: Callable[..., Chat], finished_run: Path) -> None:
    assert chat(model=str(finished_run)).name == "finished"


def test_chat_takes_the_kernels_it_is_told(chat: Callable[..., Chat]) -> None:
    assert chat(kernels=["scan=reference"], temperature=0).ask("Hello") == chat(temperature=0).ask("Hello")
    with pytest.raises(ConfigError, match="--kernels: the scan backend triton cannot be used"):
        chat(kernels=["scan=triton"])


def test_chat_says_once_that_a_text_is_too_long(small_model: Path) -> None:
    notes: list[str] = []
    settings: dict[str, Any] = {"model": str(small_model), "dtype": "float32", "max_new_tokens": 1}
    talk = Chat(ChatConfig(**settings), notes.append)
    talk.ask("word")
    assert not notes
    talk.ask("word " * 600)
    talk.ask("word")
    assert len(notes) == 1
    assert "more than the 512 the model was made for; expect worse answers" in notes[0]


def test_strict_chat_refuses_an_answer_that_might_not_fit(chat: Callable[..., Chat]) -> None:
    talk = chat(strict_length=True, max_new_tokens=500)
    with pytest.raises(ConfigError, match=r"--strict-length: 5\d\d tokens are more than the 512 the model"):
        talk.ask("Hello, how many legs have three cats, if all of them are here?")
    assert chat(strict_length=True).ask("Hello")


def test_several_prompts_are_gone_on_with_as_each_alone(model: Any, tokenizer: Any) -> None:
    prompts = [tokenizer(text)["input_ids"] for text in ("I see", "What do you see here, if anything?", "Two cats")]
    settings: dict[str, Any] = {"max_new_tokens": 9, "temperature": 0.0}
    together = write(model, prompts, ends=[tokenizer.eos_token_id], **settings)
    assert together == [write(model, [prompt], ends=[tokenizer.eos_token_id], **settings)[0] for prompt in prompts]
    end = together[0][3]
    for ends in ([end], [4095, end]):
        assert write(model, prompts[:1], ends=ends, **settings) == [together[0][: together[0].index(end) + 1]]
