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
from hymba_tune.errors import CheckpointError, ConfigError
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


class ScriptedModel:
    """A model whose answer is a fixed list of tokens."""

    device, training = torch.device("cpu"), False

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    def eval(self) -> None: ...
    def train(self, mode: bool) -> None: ...

    def generate(self, *, input_ids: torch.Tensor, streamer: Any, **_: Any) -> torch.Tensor:
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
def test_streamed_parts_join_to_the_answer_and_keep_all_generated_text(text: str, tokenizer: Any) -> None:
    """Also the spaces at the beginning of a line, which TextStreamer loses."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    parts: list[str] = []
    output = answer(
        ScriptedModel([*ids, tokenizer.eos_token_id]),
        tokenizer,
        QUESTION,
        max_new_tokens=99,
        temperature=0,
        on_text=parts.append,
    )
    assert output == text.strip()
    assert "".join(parts) == output
    assert all(parts)
    assert "\ufffd" not in "".join(parts)


def test_parts_are_streamed_during_generation(tokenizer: Any) -> None:
    ids = tokenizer("one two three four", add_special_tokens=False)["input_ids"]
    parts: list[str] = []
    answer(ScriptedModel(ids), tokenizer, QUESTION, max_new_tokens=9, temperature=0, on_text=parts.append)
    assert len(parts) > 3


def test_bytes_of_an_incomplete_character_are_sent_at_the_end(tokenizer: Any) -> None:
    ids = [*tokenizer("ok", add_special_tokens=False)["input_ids"], tokenizer.convert_tokens_to_ids("<0xE2>")]
    parts: list[str] = []
    output = answer(ScriptedModel(ids), tokenizer, QUESTION, max_new_tokens=9, temperature=0, on_text=parts.append)
    assert output == "".join(parts) == "ok\ufffd"


def test_greedy_answers_are_the_likeliest_tokens(model: Any, tokenizer: Any) -> None:
    ids = encode_prompt(QUESTION, tokenizer)
    start = len(ids)
    for _ in range(8):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    output = answer(model, tokenizer, QUESTION, max_new_tokens=8, temperature=0)
    assert output == tokenizer.decode(ids[start:], skip_special_tokens=True).strip()
    assert output


def test_answers_by_cuda_graphs_are_those_without(model: Any, tokenizer: Any, graphs: list[Any]) -> None:
    limits: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0}
    parts: list[str] = []
    model.train()
    output = answer(model, tokenizer, QUESTION, **limits, cuda_graphs=True, on_text=parts.append)
    assert model.training
    assert graphs
    assert output == "".join(parts) == answer(model, tokenizer, QUESTION, **limits)
    assert len(parts) > 3


def test_a_chat_with_cuda_graphs_is_seeded(chat: Callable[..., Chat], graphs: list[Any]) -> None:
    replies = {chat(cuda_graphs=True, temperature=5.0, seed=seed).reply("Hello") for seed in (1, 1, 2)}
    assert graphs
    assert len(replies) == 2


def test_an_error_of_an_answer_by_cuda_graphs_is_raised(model: Any, tokenizer: Any, graphs: list[Any]) -> None:
    broken = copy.deepcopy(model)
    broken.model.final_layernorm.weight.data.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="logits are NaN or infinite"):
        answer(broken, tokenizer, QUESTION, max_new_tokens=8, temperature=0, cuda_graphs=True)
    assert not graphs


def test_model_keeps_its_training_or_evaluation_mode(model: Any, tokenizer: Any) -> None:
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


def test_sampling_uses_the_whole_vocabulary(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only the 50 likeliest tokens, which is the default of transformers."""
    ids = encode_prompt(QUESTION, tokenizer)
    ranks = model.eval()(torch.tensor([ids])).logits[0, -1].argsort(descending=True).tolist()
    generate = model.generate
    outputs: list[torch.Tensor] = []
    monkeypatch.setattr(model, "generate", lambda **options: outputs.append(generate(**options)) or outputs[-1])
    for _ in range(8):
        answer(model, tokenizer, QUESTION, max_new_tokens=1, temperature=100.0)
    assert max(ranks.index(int(row[0, len(ids)])) for row in outputs) > 50


def test_chat_passes_the_whole_conversation_to_the_model(
    chat: Callable[..., Chat], monkeypatch: pytest.MonkeyPatch
) -> None:
    conversations: list[list[tuple[str, str]]] = []

    def record(_: Any, __: Any, conversation: Conversation, **___: Any) -> str:
        conversations.append([(message.role, message.content) for message in conversation.messages])
        return f"answer {len(conversations)}"

    monkeypatch.setattr("hymba_tune.generate.chat.answer", record)
    session = chat(system="Be brief.")
    session.reply("one")
    session.reply("two")
    first = [("system", "Be brief."), ("user", "one")]
    assert conversations == [first, [*first, ("assistant", "answer 1"), ("user", "two")]]
    session.reset()
    session.reply("three")
    assert conversations[-1] == [("system", "Be brief."), ("user", "three")]


def test_interrupted_answer_leaves_the_conversation_as_it_was(chat: Callable[..., Chat]) -> None:
    session = chat(temperature=0)
    expected = chat(temperature=0).reply("two")

    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.reply("one", interrupt)
    assert session.reply("two") == expected


def test_chat_streams_its_answer(chat: Callable[..., Chat]) -> None:
    parts: list[str] = []
    assert chat(seed=1).reply("one", parts.append) == "".join(parts) != ""


def test_greedy_chat_repeats_itself(chat: Callable[..., Chat]) -> None:
    assert chat(temperature=0).reply("one") == chat(temperature=0).reply("one")


def test_seed_makes_sampled_answers_repeat(chat: Callable[..., Chat]) -> None:
    answers = [chat(seed=seed, temperature=2).reply("one") for seed in (3, 3, 4)]
    assert answers[0] == answers[1] != answers[2]


def test_chat_is_named_after_its_run(chat: Callable[..., Chat], finished_run: Path) -> None:
    assert chat(model=str(finished_run)).name == "finished"


def test_chat_uses_the_kernels_of_its_settings(chat: Callable[..., Chat]) -> None:
    assert chat(kernels=["scan=reference"], temperature=0).reply("Hello") == chat(temperature=0).reply("Hello")
    with pytest.raises(ConfigError, match="--kernels: the scan backend triton cannot be used"):
        chat(kernels=["scan=triton"])


def test_chat_warns_only_once_about_a_text_that_is_too_long(small_model: Path) -> None:
    notes: list[str] = []
    settings: dict[str, Any] = {"model": str(small_model), "dtype": "float32", "max_new_tokens": 1}
    session = Chat(ChatConfig(**settings), notes.append)
    session.reply("word")
    assert not notes
    session.reply("word " * 600)
    session.reply("word")
    assert len(notes) == 1
    assert "tokens exceed the model's context of 512; expect worse answers" in notes[0]


def test_strict_chat_rejects_an_answer_that_might_not_fit(chat: Callable[..., Chat]) -> None:
    session = chat(strict_length=True, max_new_tokens=500)
    with pytest.raises(ConfigError, match=r"--strict-length: 5\d\d tokens exceed the model's context of 512"):
        session.reply("Hello, how many legs have three cats, if all of them are here?")
    assert chat(strict_length=True).reply("Hello")


def test_batched_continuations_equal_those_of_each_prompt_alone(model: Any, tokenizer: Any) -> None:
    prompts = [tokenizer(text)["input_ids"] for text in ("I see", "What do you see here, if anything?", "Two cats")]
    settings: dict[str, Any] = {"max_new_tokens": 9, "temperature": 0.0}
    batched = write(model, prompts, ends=[tokenizer.eos_token_id], **settings)
    assert batched == [write(model, [prompt], ends=[tokenizer.eos_token_id], **settings)[0] for prompt in prompts]
    end = batched[0][3]
    for ends in ([end], [4095, end]):
        assert write(model, prompts[:1], ends=ends, **settings) == [batched[0][: batched[0].index(end) + 1]]
