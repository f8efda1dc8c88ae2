"""`generate` with a cache gives, in any batch, the tokens that the uncached model gives for each prompt alone."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from hymba_tune.model import HymbaCache, HymbaForCausalLM
from hymba_tune.model.cache import CACHE_NAME
from tests.tiny import random_texts, tiny_model

PROMPTS = random_texts([9, 1, 14, 4])
NEW = 10
SAMPLING: dict[str, Any] = {"do_sample": True, "top_k": 20, "temperature": 1.5}
MODELS: dict[str, dict[str, Any]] = {
    "as_released": {},
    "no_meta_tokens": {"num_memory_tokens": 0},
    "dynamic_ntk": {"rope_type": "dynamic_ntk"},
}


@functools.cache
def expected_rows(name: str = "as_released") -> list[list[int]]:
    """Return the greedy continuation of each prompt alone, without a cache."""
    model = generator(**MODELS[name])
    return [greedy(model, prompt) for prompt in PROMPTS]


def generator(**overrides: Any) -> HymbaForCausalLM:
    """Return a model without a tied head, so that it does not repeat itself, and without an end-of-text token."""
    return tiny_model(torch.float64, tie_word_embeddings=False, eos_token_id=None, **overrides)


def greedy(model: HymbaForCausalLM, prompt: Tensor, new: int = NEW) -> list[int]:
    """Return the most likely tokens after a prompt ``(L,)``, each from a pass over the whole text."""
    ids = prompt
    with torch.no_grad():
        for _ in range(new):
            ids = torch.cat([ids, model(ids[None]).logits[0, -1:].argmax(-1)])
    return ids[len(prompt) :].tolist()


def padded(prompts: list[Tensor], *, left: bool) -> dict[str, Tensor]:
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), 7)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        place = slice(longest - len(prompt), None) if left else slice(0, len(prompt))
        ids[row, place] = prompt
        mask[row, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


def new_tokens(model: HymbaForCausalLM, inputs: dict[str, Tensor], **options: Any) -> list[list[int]]:
    """Return the new tokens of each row."""
    options = {"max_new_tokens": NEW, "do_sample": False} | options
    ids = model.generate(**inputs, **options)
    return ids[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("left", [True, False], ids=["padded_left", "padded_right"])
@pytest.mark.parametrize("name", MODELS)
def test_a_batch_gives_the_tokens_of_each_prompt_alone(name: str, left: bool, use_cache: bool) -> None:
    model = generator(**MODELS[name])
    assert new_tokens(model, padded(PROMPTS, left=left), use_cache=use_cache) == expected_rows(name)


def test_expected_tokens_are_diverse() -> None:
    """A repeated token would hide mistakes from the other tests."""
    assert len({token for row in expected_rows() for token in row}) > 15


@pytest.mark.parametrize("left", [True, False], ids=["padded_left", "padded_right"])
def test_embeddings_give_the_tokens_of_their_ids(left: bool) -> None:
    model = generator()
    inputs = padded(PROMPTS, left=left)
    embeds = model.model.embed_tokens(inputs["input_ids"])
    ids = model.generate(
        inputs_embeds=embeds, attention_mask=inputs["attention_mask"], max_new_tokens=NEW, do_sample=False
    )
    assert ids.tolist() == new_tokens(model, inputs)


def test_a_finished_row_is_padded() -> None:
    model = generator()
    rows = expected_rows()
    end = rows[0][4]
    expected = [row[: row.index(end) + 1] if end in row else row for row in rows]
    longest = max(map(len, expected))
    actual = new_tokens(model, padded(PROMPTS, left=True), eos_token_id=end, pad_token_id=0)
    assert actual == [row + [0] * (longest - len(row)) for row in expected]


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
        {"num_beams": 2, **SAMPLING},
        SAMPLING,
        {"num_return_sequences": 3, **SAMPLING},
        {"repetition_penalty": 1.3},
    ],
    ids=["beams", "beams_returned", "beams_sampled", "sampling", "samples_returned", "repetition_penalty"],
)
@pytest.mark.parametrize("left", [True, False], ids=["padded_left", "padded_right"])
def test_cache_changes_nothing(options: dict[str, Any], left: bool) -> None:
    model = generator()
    inputs = padded(PROMPTS, left=left)
    torch.manual_seed(3)
    expected = new_tokens(model, inputs, use_cache=False, **options)
    torch.manual_seed(3)
    assert new_tokens(model, inputs, use_cache=True, **options) == expected


def test_beams_of_a_batch_are_those_of_each_prompt_alone() -> None:
    model = generator()
    expected = [new_tokens(model, {"input_ids": prompt[None]}, num_beams=3)[0] for prompt in PROMPTS]
    assert new_tokens(model, padded(PROMPTS, left=True), num_beams=3) == expected
    assert expected != expected_rows()


def test_a_returned_cache_can_be_continued() -> None:
    model = generator()
    prompt = PROMPTS[0]
    first = model.generate(prompt[None], max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    assert isinstance(first[CACHE_NAME], HymbaCache)
    ids = model.generate(first.sequences, **{CACHE_NAME: first[CACHE_NAME]}, max_new_tokens=NEW - 5, do_sample=False)
    assert ids[0, len(prompt) :].tolist() == expected_rows()[0]


def test_a_cache_can_contain_an_earlier_turn() -> None:
    model = generator()
    first, second = PROMPTS[2], PROMPTS[0]
    cache = model(first[None], use_cache=True)[CACHE_NAME]
    both = torch.cat([first, second])
    ids = model.generate(both[None], **{CACHE_NAME: cache}, max_new_tokens=NEW, do_sample=False)
    assert ids[0, len(both) :].tolist() == greedy(model, both)
    assert cache.get_seq_length() == len(both) + NEW - 1


def test_prefill_in_chunks_changes_nothing() -> None:
    model = generator()
    inputs = {"input_ids": torch.stack(random_texts([14, 14]))}
    assert new_tokens(model, inputs, prefill_chunk_size=4) == new_tokens(model, inputs)


@pytest.mark.parametrize("size", [3, 4, 8])
def test_prefill_in_chunks_of_a_padded_batch_changes_nothing(size: int) -> None:
    """The first chunks of the short prompts are all padding."""
    assert new_tokens(generator(), padded(PROMPTS, left=True), prefill_chunk_size=size) == expected_rows()


def test_the_released_generation_config_gives_the_same_tokens() -> None:
    model = generator()
    expected = expected_rows()
    model.generation_config = GenerationConfig(
        **{"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "use_cache": False}
    )
    actual = new_tokens(model, padded(PROMPTS, left=True))
    for row, expected_row in zip(actual, expected, strict=True):
        end = expected_row.index(2) + 1 if 2 in expected_row else NEW
        assert row[:end] == expected_row[:end]
        assert not any(row[end:])


def test_uses_a_cache_by_default() -> None:
    model = generator()
    output = model.generate(PROMPTS[0][None], max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert output[CACHE_NAME].get_seq_length() == len(PROMPTS[0]) + 2


@pytest.mark.parametrize("kind", ["static", "offloaded", "quantized"])
def test_other_types_of_cache_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=f"cache_implementation is '{kind}'; Hymba has its own cache"):
        generator().generate(PROMPTS[0][None], max_new_tokens=2, cache_implementation=kind)


def test_the_dynamic_type_of_cache_is_a_hymba_cache() -> None:
    model = generator()
    inputs = {"input_ids": PROMPTS[0][None]}
    assert new_tokens(model, inputs, cache_implementation="dynamic") == new_tokens(model, inputs)


@pytest.mark.parametrize("by", ["model", "prompt_lookup"])
def test_assisted_decoding_is_refused(by: str) -> None:
    model = generator()
    options = {"assistant_model": generator()} if by == "model" else {"prompt_lookup_num_tokens": 2}
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models, such as Hymba"):
        model.generate(PROMPTS[0][None], max_new_tokens=4, do_sample=False, **options)
