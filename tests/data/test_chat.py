from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from hymba_tune.config import Learn
from hymba_tune.data import (
    HYMBA_TEMPLATE,
    IGNORED,
    Conversation,
    Encoded,
    Message,
    Text,
    chat,
    encode,
    encode_prompt,
    render_prompt,
)
from hymba_tune.data.chat import render
from hymba_tune.errors import DataError
from tests.data.small_tokenizers import (
    CHATML,
    LLAMA3,
    MISTRAL,
    byte_level,
    sentencepiece_like,
    turns,
    without_markers,
)

ENOUGH = 100_000
TWO_ANSWERS = turns("What is 6 times 7?", "  The answer\n\nis 42. ", "Sure?", "Yes: <42>, 漢字 😀", system="Be brief.")
# ▁ is how SentencePiece spells a space, so it cannot come back; surrogates are no characters.
WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=40)
ANSWERS = WORDS.map(str.strip).filter(lambda text: bool(text) and not text.endswith(">"))
"""Answers that do not end with an end token of their own, which would not be doubled."""
CHATML_TOKENS = ["<|im_start|>", "<|im_end|>"]
STRIPS_THINKING = (Path(__file__).parent / "cases" / "strips_thinking.jinja").read_text()


def learned_runs(row: Encoded, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The text of each unbroken run of tokens with loss."""
    runs: list[list[int]] = [[]]
    for label in row.labels:
        if label != IGNORED:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


@settings(max_examples=40, deadline=None)
@given(questions=st.lists(WORDS, min_size=2, max_size=2), answers=st.lists(ANSWERS, min_size=2, max_size=2))
def test_loss_covers_the_answers_and_their_end_of_sequence(
    any_tokenizer: PreTrainedTokenizerFast, questions: list[str], answers: list[str]
) -> None:
    messages = turns(questions[0], answers[0], questions[1], answers[1])
    (row,) = encode(Conversation(messages), any_tokenizer, ENOUGH)
    expected = [answer + any_tokenizer.eos_token for answer in answers]
    assert [run.strip() for run in learned_runs(row, any_tokenizer)] == expected
    assert all(label in (IGNORED, token) for token, label in zip(row.input_ids, row.labels, strict=True))


@settings(max_examples=25, deadline=None)
@given(question=WORDS, answer=ANSWERS)
def test_loss_covers_the_answers_with_the_released_tokenizer(
    released: PreTrainedTokenizerFast, question: str, answer: str
) -> None:
    (row,) = encode(Conversation(turns(question, answer)), released, ENOUGH)
    assert learned_runs(row, released) == [answer + "</s>"]


def test_labels_equal_those_of_generation_markers(any_tokenizer: PreTrainedTokenizerFast) -> None:
    marked = any_tokenizer.apply_chat_template(
        [{"role": message.role, "content": message.content} for message in TWO_ANSWERS],
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    (row,) = encode(Conversation(TWO_ANSWERS), any_tokenizer, ENOUGH)
    assert row.input_ids == marked["input_ids"]
    assert [int(label != IGNORED) for label in row.labels] == marked["assistant_masks"]


def test_offsets_without_white_space_give_the_same_labels() -> None:
    trimmed, whole = (byte_level(CHATML, CHATML_TOKENS, "<|im_end|>", trim_offsets=trim) for trim in (True, False))
    assert encode(Conversation(TWO_ANSWERS), trimmed, ENOUGH) == encode(Conversation(TWO_ANSWERS), whole, ENOUGH)


@pytest.mark.parametrize("template", [CHATML, LLAMA3, MISTRAL, HYMBA_TEMPLATE])
def test_templates_without_generation_markers_work(template: str) -> None:
    conversation = Conversation(TWO_ANSWERS)
    plain = template.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    with_markers, without = sentencepiece_like(template), sentencepiece_like(without_markers(plain))
    assert "generation %}" not in without.chat_template
    assert encode(conversation, with_markers, ENOUGH) == encode(conversation, without, ENOUGH)


def test_end_of_sequence_is_added_if_the_template_has_none() -> None:
    # This template neither ends an answer nor has a generation prompt.
    template = "{% for message in messages %}{{ message.role + ': ' + message.content + '\n' }}{% endfor %}"
    tokenizer = sentencepiece_like(template)
    (row,) = encode(Conversation(turns("Hi", "Hello", "Bye", "So long")), tokenizer, ENOUGH)
    assert learned_runs(row, tokenizer) == ["Hello</s>", "So long</s>"]
    prompt = render_prompt(Conversation(turns("Hi", "Hello", "Bye")), tokenizer)
    assert prompt == "user: Hi\nassistant: Hello</s>\nuser: Bye\nassistant: "


def test_end_of_sequence_of_the_template_is_not_doubled() -> None:
    tokenizer = sentencepiece_like(MISTRAL.replace("| trim + eos_token", "| trim + ' ' + eos_token"))
    (row,) = encode(Conversation(turns("Hi", "Hello", "Bye", "So long")), tokenizer, ENOUGH)
    assert learned_runs(row, tokenizer) == ["Hello </s>", "So long </s>"]
    assert row.input_ids.count(tokenizer.eos_token_id) == 2


def test_end_of_sequence_in_the_data_is_not_doubled(any_tokenizer: PreTrainedTokenizerFast) -> None:
    eos = any_tokenizer.eos_token
    bare, ended = turns("Hi", "Hello", "Bye", "So long"), turns("Hi", f"Hello{eos}", "Bye", f"So long {eos}\n")
    assert encode(Conversation(ended), any_tokenizer, ENOUGH)[0].labels.count(any_tokenizer.eos_token_id) == 2
    assert render_prompt(Conversation(ended[:3]), any_tokenizer) == render_prompt(Conversation(bare[:3]), any_tokenizer)


def test_answers_that_repeat_other_text_are_located(any_tokenizer: PreTrainedTokenizerFast) -> None:
    messages = turns("user", "assistant", "assistant", "user", "a", "a")
    (row,) = encode(Conversation(messages), any_tokenizer, ENOUGH)
    eos = any_tokenizer.eos_token
    assert [run.strip() for run in learned_runs(row, any_tokenizer)] == [f"assistant{eos}", f"user{eos}", f"a{eos}"]


def test_answers_of_weight_zero_are_in_the_text_without_labels(
    any_tokenizer: PreTrainedTokenizerFast,
) -> None:
    messages = turns("Hi", "Hello", "Bye", "So long")
    read = (messages[0], replace(messages[1], weight=0.0), *messages[2:])
    (whole,) = encode(Conversation(messages), any_tokenizer, ENOUGH)
    (row,) = encode(Conversation(read), any_tokenizer, ENOUGH)
    assert row.input_ids == whole.input_ids
    assert [run.strip() for run in learned_runs(row, any_tokenizer)] == ["So long" + any_tokenizer.eos_token]


def test_loss_weight_of_a_token_is_that_of_its_answer(any_tokenizer: PreTrainedTokenizerFast) -> None:
    messages = turns("Hi", "Hello you", "Bye", "So long", "?", "!!")
    weighted = (messages[0], replace(messages[1], weight=0.25), *messages[2:5], replace(messages[5], weight=0.5))
    (plain,) = encode(Conversation(messages), any_tokenizer, ENOUGH)
    (row,) = encode(Conversation(weighted), any_tokenizer, ENOUGH)
    assert replace(row, loss_weights=None) == plain
    assert row.loss_weights is not None
    labels_of: dict[float, list[int]] = {}
    for weight, label in zip(row.loss_weights, row.labels, strict=True):
        if label != IGNORED:
            labels_of.setdefault(weight, []).append(label)
    texts = {weight: any_tokenizer.decode(ids).strip() for weight, ids in labels_of.items()}
    eos = any_tokenizer.eos_token
    assert texts == {0.25: f"Hello you{eos}", 1.0: f"So long{eos}", 0.5: f"!!{eos}"}
    (cut,) = encode(Conversation(weighted), any_tokenizer, len(row.labels) - 2)
    assert cut.loss_weights == row.loss_weights[:-2]


def test_learn_last_covers_only_the_last_answer(hymba: PreTrainedTokenizerFast) -> None:
    conversation = Conversation(turns("Hi", "Hello", "Bye", "So long", "?"))
    whole, last = (render(conversation, hymba, learn) for learn in (Learn.all, Learn.last))
    assert last == replace(whole, learned=whole.learned[-1:])
    assert [last.text[start:end] for start, end in last.learned] == ["So long</s>"]
    unlearned = replace(conversation, messages=(*conversation.messages, Message("assistant", "x", weight=0.0)))
    with pytest.raises(DataError, match=r"its last answer has weight 0(.|\n)*--learn all"):
        render(unlearned, hymba, Learn.last)


def test_messages_after_the_last_answer_have_no_loss(hymba: PreTrainedTokenizerFast) -> None:
    (row,) = encode(Conversation(turns("Hi", "Hello", "And this?")), hymba, ENOUGH)
    assert learned_runs(row, hymba) == ["Hello</s>"]


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("add_eos", [True, False])
@pytest.mark.parametrize("template", [HYMBA_TEMPLATE, HYMBA_TEMPLATE.replace("{{- bos_token -}}", "")])
def test_beginning_of_sequence_comes_once(template: str, *, add_bos: bool, add_eos: bool) -> None:
    tokenizer = sentencepiece_like(template, add_bos=add_bos, add_eos=add_eos)
    begins = int(add_bos or template is HYMBA_TEMPLATE)
    conversation = Conversation(turns("Hi", "Hello"))
    (row,) = encode(conversation, tokenizer, ENOUGH)
    prompt = encode_prompt(Conversation(turns("Hi")), tokenizer)
    for ids in (row.input_ids, prompt):
        assert ids.count(tokenizer.bos_token_id) == ids[:1].count(tokenizer.bos_token_id) == begins
    assert row.input_ids.count(tokenizer.eos_token_id) == 1
    assert prompt.count(tokenizer.eos_token_id) == 0


def test_prompt_equals_the_text_of_training(any_tokenizer: PreTrainedTokenizerFast) -> None:
    (row,) = encode(Conversation(TWO_ANSWERS), any_tokenizer, ENOUGH)
    first_learned = next(index for index, label in enumerate(row.labels) if label != IGNORED)
    assert encode_prompt(Conversation(TWO_ANSWERS[:2]), any_tokenizer) == row.input_ids[:first_learned]
    second = encode_prompt(Conversation(TWO_ANSWERS[:4]), any_tokenizer)
    assert second == row.input_ids[: len(second)]
    assert learned_runs(Encoded(row.input_ids[len(second) :], row.labels[len(second) :]), any_tokenizer)[0].strip() == (
        TWO_ANSWERS[4].content + any_tokenizer.eos_token
    )


TEMPLATES = [HYMBA_TEMPLATE, CHATML, CHATML.replace(" | trim", ""), MISTRAL, STRIPS_THINKING]
TURNS = st.sampled_from(["", "a", " a ", "<think>\nb\n</think>\n\na", "<|im_end|>", "assistant\n", "</s>"]) | WORDS


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(TURNS, min_size=3, max_size=7), template=st.sampled_from(TEMPLATES))
def test_prompt_in_one_rendering_equals_that_of_a_rendering_for_each_answer(texts: list[str], template: str) -> None:
    tokenizer = byte_level(template, CHATML_TOKENS, "<|im_end|>")
    prompt = Conversation(turns(*texts[: len(texts) // 2 * 2], "Sure?"))
    quick = render_prompt(prompt, tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat, "_find_context", lambda *_: None)
        assert quick == render_prompt(prompt, tokenizer)


def test_prompt_takes_as_many_renderings_for_many_messages_as_for_few(
    hymba: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    apply = chat._apply_template
    monkeypatch.setattr(chat, "_apply_template", lambda *args, **kwargs: calls.append(1) or apply(*args, **kwargs))
    counts = []
    for pairs in (1, 40):
        calls.clear()
        render_prompt(Conversation(turns(*["Hi", "Hello"] * pairs, "Bye")), hymba)
        counts.append(len(calls))
    assert counts[0] == counts[1]


def test_prompt_follows_a_template_that_opens_the_last_answer_differently() -> None:
    # As models that think do: the last answer has an empty thought before it, earlier ones have none.
    thought = "{% generation %}{{ '<think></think>' if loop.last else '' }}"
    template = CHATML.replace("{% generation %}", thought)
    tokenizer = byte_level(template, CHATML_TOKENS, "<|im_end|>")
    (row,) = encode(Conversation(turns("Hi", "Hello", "Bye", "So long")), tokenizer, ENOUGH)
    assert learned_runs(row, tokenizer) == ["Hello<|im_end|>", "So long<|im_end|>"]
    assert render_prompt(Conversation(turns("Hi")), tokenizer).endswith("<|im_start|>assistant\n<think></think>")


def test_template_that_changes_answers_is_refused() -> None:
    tokenizer = sentencepiece_like(MISTRAL.replace("message.content | trim", "message.content | upper"))
    with pytest.raises(DataError, match="rewrites the conversation around message 2, an answer") as refusal:
        encode(Conversation(turns("Hi", "Hello")), tokenizer, ENOUGH)
    assert "--chat-template hymba or alpaca (of a teacher: --teacher-chat-template)" in str(refusal.value)
    assert "--learn last" not in str(refusal.value)


def test_template_that_moves_messages_is_refused() -> None:
    reversed_history = "{% for message in messages | reverse %}{{ message.content + '\n' }}{% endfor %}"
    with pytest.raises(DataError, match="rewrites the conversation"):
        encode(Conversation(turns("Hi", "Hello", "Bye", "So long")), sentencepiece_like(reversed_history), ENOUGH)


def test_prompt_whose_question_the_template_leaves_out_is_refused() -> None:
    tokenizer = sentencepiece_like("{% for message in messages[:1] %}{{ message.content + '\\n' }}{% endfor %}")
    with pytest.raises(DataError, match="leaves out message 3, the question"):
        render_prompt(Conversation(turns("Hi", "Hello", "Bye")), tokenizer)


class TestTemplateThatStripsThinking:
    """As Qwen's: answers before the last question lose their reasoning."""

    conversation = Conversation(
        turns("2+0?", "<think>\nadd\n</think>\n\n2", "3+0?", "<think>\nadd again\n</think>\n\n3")
    )

    @pytest.fixture
    def tokenizer(self) -> PreTrainedTokenizerFast:
        template = (Path(__file__).parent / "cases" / "strips_thinking.jinja").read_text()
        return byte_level(template, CHATML_TOKENS, "<|im_end|>")

    def test_last_answer_is_learned_whole(self, tokenizer: PreTrainedTokenizerFast) -> None:
        last = render(self.conversation, tokenizer, Learn.last)
        assert [last.text[start:end] for start, end in last.learned] == ["<think>\nadd again\n</think>\n\n3<|im_end|>"]
        assert "<|im_start|>assistant\n2<|im_end|>" in last.text

    def test_all_answers_are_refused_with_what_to_do(self, tokenizer: PreTrainedTokenizerFast) -> None:
        with pytest.raises(DataError, match="rewrites the conversation around message 2") as refusal:
            render(self.conversation, tokenizer)
        assert "--learn last" in refusal.value.details["to fix"]
        assert "--teacher-chat-template" in refusal.value.details["to fix"]

    def test_prompt_is_the_text_before_the_last_answer(self, tokenizer: PreTrainedTokenizerFast) -> None:
        prompt = render_prompt(replace(self.conversation, messages=self.conversation.messages[:3]), tokenizer)
        assert prompt.startswith("<|im_start|>user\n2+0?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n")


def test_greeting_is_context(any_tokenizer: PreTrainedTokenizerFast) -> None:
    greeting = Message("assistant", "Welcome!", weight=0.0)
    (row,) = encode(Conversation((greeting, *turns("Hi", "Hello"))), any_tokenizer, ENOUGH)
    eos = any_tokenizer.eos_token
    assert [run.strip() for run in learned_runs(row, any_tokenizer)] == [f"Hello{eos}"]
    prompt = encode_prompt(Conversation((greeting, *turns("Hi"))), any_tokenizer)
    assert row.input_ids[: len(prompt)] == prompt
    assert f"Welcome!{eos}" in any_tokenizer.decode(prompt)


def test_error_of_the_template_is_part_of_the_message() -> None:
    messages = (Message("user", "Hi"), Message("tool", "{}"), Message("assistant", "Hello"))
    with pytest.raises(DataError, match=r"refuses the conversation \(Only user and assistant turns, please\)"):
        encode(Conversation(messages), sentencepiece_like(MISTRAL), ENOUGH)


def test_tokenizer_without_end_of_sequence_is_refused() -> None:
    tokenizer = sentencepiece_like(HYMBA_TEMPLATE)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-sequence token"):
        encode(Text("Hi"), tokenizer, ENOUGH)


def test_cut_conversation_keeps_its_beginning(hymba: PreTrainedTokenizerFast) -> None:
    conversation = Conversation(turns("Hi", "Hello " * 50))
    (whole,) = encode(conversation, hymba, ENOUGH)
    (cut,) = encode(conversation, hymba, len(whole.input_ids) - 20)
    assert cut.input_ids == whole.input_ids[:-20]
    assert cut.labels == whole.labels[:-20]
    assert hymba.eos_token_id not in cut.input_ids


def test_conversation_whose_answer_is_cut_off_gives_no_row(hymba: PreTrainedTokenizerFast) -> None:
    prompt = Conversation(turns("Hi " * 50))
    conversation = Conversation((*prompt.messages, Message("assistant", "Hello")))
    length = len(encode_prompt(prompt, hymba))
    assert encode(conversation, hymba, length) == []
    assert len(encode(conversation, hymba, length + 1)) == 1


@settings(max_examples=40, deadline=None)
@given(text=ANSWERS, max_length=st.integers(8, 20))
def test_long_text_loses_no_token(hymba: PreTrainedTokenizerFast, text: str, max_length: int) -> None:
    assume(not text.startswith(hymba.bos_token) and not text.endswith(hymba.eos_token))  # it then gets no second ones
    (whole,) = encode(Text(text), hymba, ENOUGH)
    rows = encode(Text(text), hymba, max_length)
    assert whole.input_ids == [*hymba(text).input_ids, hymba.eos_token_id]
    assert [token for row in rows for token in row.input_ids] == whole.input_ids
    for row in rows:
        assert 2 <= len(row.input_ids) <= max_length
        assert row.labels == [IGNORED, *row.input_ids[1:]]


def test_text_with_special_tokens_gets_no_second_ones(hymba: PreTrainedTokenizerFast) -> None:
    assert encode(Text("<s>Hello</s>"), hymba, ENOUGH) == encode(Text("Hello"), hymba, ENOUGH)


def test_prompts_of_gsm8k_equal_the_texts_of_training(shared: Path, released: PreTrainedTokenizerFast) -> None:
    lines = (shared / "data" / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()[:50]
    for row in map(json.loads, lines):
        prompt = encode_prompt(Conversation(turns(row["question"])), released)
        (whole,) = encode(Conversation(turns(row["question"], row["answer"])), released, ENOUGH)
        assert whole.input_ids[: len(prompt)] == prompt
        assert set(whole.labels[: len(prompt)]) == {IGNORED}
        assert whole.labels[len(prompt)] != IGNORED
