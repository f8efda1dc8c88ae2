"""`generate` writes, in any batch and by any strategy, what the uncached model would write for each prompt alone."""

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
    """What each prompt alone is gone on with, without a cache."""
    model = writer(**MODELS[name])
    return [greedy(model, prompt) for prompt in PROMPTS]


def writer(**overrides: Any) -> HymbaForCausalLM:
    """A model that does not repeat itself (its head is not its embedding) and writes no end."""
    return tiny_model(torch.float64, tie_word_embeddings=False, eos_token_id=None, **overrides)


def greedy(model: HymbaForCausalLM, prompt: Tensor, new: int = NEW) -> list[int]:
    """The likeliest tokens after a prompt ``(L,)``, by one whole pass for each."""
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
        ids[row, place], mask[row, place] = prompt, 1
    return {"input_ids": ids, "attention_mask": mask}


def written(model: HymbaForCausalLM, inputs: dict[str, Tensor], **options: Any) -> list[list[int]]:
    """The new tokens of each row."""
    options = {"max_new_tokens": NEW, "do_sample": False} | options
    ids = model.generate(**inputs, **options)
    return ids[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("left", [True, False], ids=["padded_left", "padded_right"])
@pytest.mark.parametrize("name", MODELS)
def test_batch_writes_what_each_prompt_alone_does(name: str, left: bool, use_cache: bool) -> None:
    model = writer(**MODELS[name])
    assert written(model, padded(PROMPTS, left=left), use_cache=use_cache) == expected_rows(name)


def test_prompts_are_gone_on_with_in_many_ways() -> None:
    """Else the other tests would say little."""
    assert len({token for row in expected_rows() for token in row}) > 15


@pytest.mark.parametrize("left", [True, False], ids=["padded_left", "padded_right"])
def test_embeddings_stand_for_ids(left: bool) -> None:
    model = writer()
    inputs = padded(PROMPTS, left=left)
    embeds = model.model.embed_tokens(inputs["input_ids"])
    ids = model.generate(
        inputs_embeds=embeds, attention_mask=inputs["attention_mask"], max_new_tokens=NEW, do_sample=False
    )
    assert ids.tolist() == written(model, inputs)


def test_row_that_ends_is_filled_with_padding() -> None:
    model = writer()
    rows = expected_rows()
    end = rows[0][4]
    expected = [row[: row.index(end) + 1] if end in row else row for row in rows]
    longest = max(map(len, expected))
    actual = written(model, padded(PROMPTS, left=True), eos_token_id=end, pad_token_id=0)
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
    model, inputs = writer(), padded(PROMPTS, left=left)
    torch.manual_seed(3)
    expected = written(model, inputs, use_cache=False, **options)
    torch.manual_seed(3)
    assert written(model, inputs, use_cache=True, **options) == expected


def test_beams_of_a_batch_are_those_of_each_prompt_alone() -> None:
    model = writer()
    expected = [written(model, {"input_ids": prompt[None]}, num_beams=3)[0] for prompt in PROMPTS]
    assert written(model, padded(PROMPTS, left=True), num_beams=3) == expected
    assert expected != expected_rows()


def test_returned_cache_goes_on() -> None:
    model, prompt = writer(), PROMPTS[0]
    first = model.generate(prompt[None], max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    assert isinstance(first[CACHE_NAME], HymbaCache)
    ids = model.generate(first.sequences, **{CACHE_NAME: first[CACHE_NAME]}, max_new_tokens=NEW - 5, do_sample=False)
    assert ids[0, len(prompt) :].tolist() == expected_rows()[0]


def test_given_cache_holds_an_earlier_turn() -> None:
    model = writer()
    first, second = PROMPTS[2], PROMPTS[0]
    cache = model(first[None], use_cache=True)[CACHE_NAME]
    both = torch.cat([first, second])
    ids = model.generate(both[None], **{CACHE_NAME: cache}, max_new_tokens=NEW, do_sample=False)
    assert ids[0, len(both) :].tolist() == greedy(model, both)
    assert cache.get_seq_length() == len(both) + NEW - 1


def test_prefill_in_chunks_changes_nothing() -> None:
    model = writer()
    inputs = {"input_ids": torch.stack(random_texts([14, 14]))}
    assert written(model, inputs, prefill_chunk_size=4) == written(model, inputs)


@pytest.mark.parametrize("size", [3, 4, 8])
def test_prefill_in_chunks_of_a_padded_batch_changes_nothing(size: int) -> None:
    """The first chunks of the short prompts are all padding."""
    assert written(writer(), padded(PROMPTS, left=True), prefill_chunk_size=size) == expected_rows()


def test_released_generation_config_writes_the_same() -> None:
    model, expected = writer(), expected_rows()
    model.generation_config = GenerationConfig(
        **{"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "use_cache": False}
    )
    actual = written(model, padded(PROMPTS, left=True))
    for row, own in zip(actual, expected, strict=True):
        end = own.index(2) + 1 if 2 in own else NEW
        assert row[:end] == own[:end]
        assert not any(row[end:])


def test_uses_a_cache_by_default() -> None:
    model = writer()
    output = model.generate(PROMPTS[0][None], max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert output[CACHE_NAME].get_seq_length() == len(PROMPTS[0]) + 2


@pytest.mark.parametrize("kind", ["static", "offloaded", "quantized"])
def test_foreign_kinds_of_cache_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=f"cache_implementation is '{kind}'; Hymba keeps a cache of its own"):
        writer().generate(PROMPTS[0][None], max_new_tokens=2, cache_implementation=kind)


def test_dynamic_kind_of_cache_is_ours() -> None:
    model = writer()
    inputs = {"input_ids": PROMPTS[0][None]}
    assert written(model, inputs, cache_implementation="dynamic") == written(model, inputs)


@pytest.mark.parametrize("by", ["model", "prompt_lookup"])
def test_assisted_decoding_is_refused(by: str) -> None:
    model = writer()
    options = {"assistant_model": writer()} if by == "model" else {"prompt_lookup_num_tokens": 2}
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models, such as Hymba"):
        model.generate(PROMPTS[0][None], max_new_tokens=4, do_sample=False, **options)
