"""Continuing from a cache equals one pass over the whole text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hymba_tune.model import HymbaCache, HymbaForCausalLM, HymbaModel
from hymba_tune.model.attention import ATTENTION
from hymba_tune.model.backends import Backend
from hymba_tune.model.cache import CACHE_NAME
from hymba_tune.model.scan import SCAN
from hymba_tune.model.scan_inputs import ScanInputs
from tests.tiny import CONFIG, RELEASED, random_texts, tiny_model
from tests.tolerances import BFLOAT16_MODEL, TWINS

TEXTS = random_texts([23, 4, 1, 12])
LONGEST = max(len(text) for text in TEXTS)
WINDOW = CONFIG["sliding_window"]
MODELS: dict[str, dict[str, Any]] = {
    "as_released": {},
    "no_meta_tokens": {"num_memory_tokens": 0},
    "one_meta_token": {"num_memory_tokens": 1},
    "no_window": {"sliding_window": None},
    "window_of_one": {"sliding_window": 1},
    "long_window": {"sliding_window": 100},
    "global_consumer_of_windowed_producer": {"kv_reuse_group": [[2, 3]]},
    "windowed_consumer_of_global_producer": {"kv_reuse_group": [[0, 1, 2]]},
    "normed_heads": {"kq_norm": "perhead-rms"},
    "no_rope": {"rope": False},
    "d_conv_1": {"mamba_d_conv": 1},
    "d_conv_7": {"mamba_d_conv": 7},
}


def whole(model: HymbaForCausalLM, text: Tensor) -> Tensor:
    """Return the logits ``(L, V)`` of one pass."""
    with torch.no_grad():
        logits: Tensor = model(text[None]).logits[0]
    return logits


def in_steps(model: HymbaForCausalLM, cuts: list[list[int]], *, left: bool = True) -> list[Tensor]:
    """Return the logits of each text in several passes: ``cuts[step][i]`` tokens of text i per pass, padded."""
    logits: list[list[Tensor]] = [[] for _ in TEXTS]
    done = [0] * len(TEXTS)
    whole_mask = torch.zeros(len(TEXTS), 0, dtype=torch.long)
    cache = None
    for lengths in cuts:
        ids = torch.full((len(TEXTS), max(lengths)), 7)
        mask = torch.zeros_like(ids)
        places = [slice(ids.shape[1] - n, None) if left else slice(0, n) for n in lengths]
        for i, (text, n, place) in enumerate(zip(TEXTS, lengths, places, strict=True)):
            ids[i, place] = text[done[i] : done[i] + n]
            mask[i, place] = 1
            done[i] += n
        whole_mask = torch.cat([whole_mask, mask], 1)
        with torch.no_grad():
            output = model(ids, attention_mask=whole_mask, cache=cache, use_cache=True)
        cache = output[CACHE_NAME]
        for logits_of_text, row, place in zip(logits, output.logits, places, strict=True):
            logits_of_text.append(row[place])
    return [torch.cat(parts) for parts in logits]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS.keys())
def test_token_by_token_equals_the_whole(overrides: dict[str, Any], dtype: torch.dtype) -> None:
    model = tiny_model(dtype, **overrides)
    text = TEXTS[0]
    cache = HymbaCache(model.config)
    logits = []
    with torch.no_grad():
        for token in text:
            logits.append(model(token.view(1, 1), cache=cache).logits[0])
    TWINS[dtype][0].check(torch.cat(logits), whole(model, text))


@pytest.mark.parametrize("left", [True, False], ids=["padded_left", "padded_right"])
@pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS.keys())
def test_steps_of_unequal_lengths_equal_the_whole(overrides: dict[str, Any], left: bool) -> None:
    model = tiny_model(torch.float64, **overrides)
    cuts = [[9, 2, 1, 3], [1, 1, 0, 1], [7, 0, 0, 1], [4, 1, 0, 7], [2, 0, 0, 0]]
    for i, (actual, text) in enumerate(zip(in_steps(model, cuts, left=left), TEXTS, strict=True)):
        TWINS[torch.float64][0].check(actual, whole(model, text), f"text {i}")


def test_bfloat16_token_by_token_is_close_to_the_whole() -> None:
    model = tiny_model(torch.bfloat16)
    cache = HymbaCache(model.config)
    logits = []
    with torch.no_grad():
        for token in TEXTS[0]:
            logits.append(model(token.view(1, 1), cache=cache).logits[0])
    BFLOAT16_MODEL.check(torch.cat(logits), whole(model.float(), TEXTS[0]))


def test_a_mask_may_cover_the_new_columns_only() -> None:
    model = tiny_model(torch.float64)
    ids = torch.stack(random_texts([12, 12]))
    first = model(ids[:, :5], use_cache=True)[CACHE_NAME]
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    logits = model(ids[:, 5:9], cache=first, attention_mask=mask).logits
    second = model(ids[:, :5], use_cache=True)[CACHE_NAME]
    with_past = torch.cat([torch.ones(2, 5), mask], 1)
    assert torch.equal(logits, model(ids[:, 5:9], cache=second, attention_mask=with_past).logits)


def test_the_cache_holds_only_what_later_tokens_need() -> None:
    model = tiny_model(global_attn_idx=[0, 3], kv_reuse_group=[[1, 2]])
    cache = model(torch.stack(random_texts([20, 20])), use_cache=True)[CACHE_NAME]
    keys = {layer: key.shape for layer, key in cache.keys.items()}
    # A windowed layer needs its window and the token that looks at it.
    assert keys == {0: (2, 2, 20, 4), 1: (2, 2, WINDOW + 1, 4), 3: (2, 2, 20, 4)}
    assert {layer: value.shape[:3] for layer, value in cache.values.items()} == {
        layer: shape[:3] for layer, shape in keys.items()
    }
    assert cache.meta.keys() == keys.keys()
    assert all(key.shape == (5, 2, 4) for key, _ in cache.meta.values())
    assert cache.tails.keys() == cache.states.keys() == set(range(4))


def live_bytes(cache: HymbaCache) -> tuple[int, int]:
    """Return the bytes of the keys and values, and of the SSM inputs and states (states counted as bfloat16)."""
    keys = [*cache.keys.values(), *cache.values.values(), *(x for pair in cache.meta.values() for x in pair)]
    ssm = [*cache.tails.values(), *(state.bfloat16() for state in cache.states.values())]
    return sum(x.nbytes for x in keys), sum(x.nbytes for x in ssm)


def shapes_of_scan(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    return torch.empty_like(inputs.u), inputs.A.new_empty(len(inputs.lengths), *inputs.A.shape)


def shapes_of_attention(query: Tensor, _: Tensor, value: Tensor, *__: object) -> Tensor:
    return query.new_empty(len(query), query.shape[1] * value.shape[2])


@pytest.mark.parametrize("prompt", [8192, 8189], ids=["all at once", "the last tokens one by one"])
def test_bytes_of_the_released_model_at_8192_tokens(prompt: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device computes nothing, but every tensor has its size."""
    # Without computation, these two would still take half a minute step by step.
    monkeypatch.setitem(SCAN.backends, "native", Backend("native", shapes_of_scan))
    monkeypatch.setitem(ATTENTION.backends, "blocks", Backend("blocks", shapes_of_attention))
    with torch.device("meta"):
        model = HymbaModel(RELEASED).bfloat16()
        ids = torch.zeros(1, 8192, dtype=torch.long)
    with torch.no_grad():
        cache = model(ids[:, :prompt], use_cache=True)[CACHE_NAME]
        for token in ids[:, prompt:].unbind(1):
            model(token[:, None], cache=cache)
    keys, ssm = live_bytes(cache)
    assert keys <= (78.95e6 if prompt == 8192 else 79.1e6)
    assert keys + ssm <= 83e6
    consumers = [layer for layer in range(32) if model.config.kv_source(layer) != layer]
    assert consumers
    assert not any(layer in stored for layer in consumers for stored in (cache.keys, cache.values, cache.meta))


def test_meta_tokens_are_held_once_for_a_batch() -> None:
    model = tiny_model()
    ids = random_texts([20])[0][None]
    one = model(ids, use_cache=True)[CACHE_NAME]
    four = model(ids.expand(4, -1), use_cache=True)[CACHE_NAME]
    assert all(torch.equal(four.meta[layer][0], key) for layer, (key, _) in one.meta.items())


def test_the_cache_does_not_keep_the_rest_of_the_prompt_in_memory() -> None:
    cache = tiny_model()(random_texts([20])[0][None], use_cache=True)[CACHE_NAME]
    for tensor in (*cache.keys.values(), *cache.values.values(), *cache.tails.values(), *cache.states.values()):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_states_are_float32_in_a_bfloat16_model() -> None:
    cache = tiny_model(torch.bfloat16)(TEXTS[0][None], use_cache=True)[CACHE_NAME]
    assert {state.dtype for state in cache.states.values()} == {torch.float32}
    assert {key.dtype for key in cache.keys.values()} == {torch.bfloat16}


def test_counts_columns_and_tokens() -> None:
    model = tiny_model()
    ids = torch.stack(random_texts([6, 6]))
    cache = HymbaCache(model.config)
    assert cache.get_seq_length() == 0
    model(ids, attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6]), cache=cache)
    assert cache.get_seq_length() == 6
    assert cache.lengths is not None
    assert cache.lengths.tolist() == [4, 6]


def next_logits(model: HymbaForCausalLM, cache: HymbaCache, rows: int) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(torch.arange(rows)[:, None] % 2 + 5, cache=cache).logits
    return logits


@pytest.mark.parametrize("method", ["reorder_cache", "batch_select_indices"])
def test_rows_can_be_reordered(method: str) -> None:
    model = tiny_model(torch.float64)
    ids = torch.stack(random_texts([9, 9, 9]))
    mask = torch.tensor([[0] * 3 + [1] * 6, [1] * 9, [0] * 8 + [1]])
    rows = torch.tensor([2, 0, 0, 1])
    cache = model(ids, attention_mask=mask, use_cache=True)[CACHE_NAME]
    getattr(cache, method)(rows)
    expected = model(ids[rows], attention_mask=mask[rows], use_cache=True)[CACHE_NAME]
    TWINS[torch.float64][0].check(next_logits(model, cache, 4), next_logits(model, expected, 4))


def test_rows_can_be_repeated() -> None:
    model = tiny_model(torch.float64)
    ids = torch.stack(random_texts([9, 9]))
    mask = torch.tensor([[0] * 3 + [1] * 6, [1] * 9])
    cache = model(ids, attention_mask=mask, use_cache=True)[CACHE_NAME]
    cache.batch_repeat_interleave(3)
    repeated = ids.repeat_interleave(3, 0), mask.repeat_interleave(3, 0)
    expected = model(repeated[0], attention_mask=repeated[1], use_cache=True)[CACHE_NAME]
    TWINS[torch.float64][0].check(next_logits(model, cache, 6), next_logits(model, expected, 6))


def test_reset_forgets_everything() -> None:
    model = tiny_model(torch.float64)
    cache = HymbaCache(model.config)
    model(TEXTS[0][None], cache=cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(model(TEXTS[3][None], cache=cache).logits, model(TEXTS[3][None]).logits)


def test_crop_is_refused() -> None:
    with pytest.raises(
        ValueError, match="HymbaCache cannot be cropped to 3 tokens: its SSM states belong to the last token"
    ):
        HymbaCache(tiny_model().config).crop(3)


@pytest.mark.parametrize("use_cache", [None, False])
def test_no_cache_unless_requested(use_cache: bool | None) -> None:
    model = tiny_model()
    assert model(TEXTS[0][None], use_cache=use_cache).get(CACHE_NAME) is None
    assert model.model(TEXTS[0][None], use_cache=use_cache).get(CACHE_NAME) is None


def test_an_existing_cache_is_used_and_returned() -> None:
    model = tiny_model()
    cache = HymbaCache(model.config)
    assert model(TEXTS[0][None], cache=cache)[CACHE_NAME] is cache
    assert model.model(TEXTS[3][None], cache=cache)[CACHE_NAME] is cache
    assert cache.get_seq_length() == len(TEXTS[0]) + len(TEXTS[3])


@pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS.keys())
def test_joined_caches_continue_as_one(overrides: dict[str, Any]) -> None:
    model = tiny_model(torch.float64, **overrides)
    long, short = torch.stack(random_texts([19, 19])), torch.stack(random_texts([3, 3, 3]))
    cache = model(short, use_cache=True)[CACHE_NAME]
    for _ in range(2):
        next_logits(model, cache, 3)
    cache.join(model(long, use_cache=True)[CACHE_NAME])
    cache.batch_select_indices(torch.tensor([4, 1, 2]))
    tail = torch.tensor([0, 1, 0])[:, None].expand(2, -1, -1) % 2 + 5
    actual = [model(tail[i], cache=cache).logits for i in range(2)]
    fed = torch.tensor([[5, 5], [6, 6], [5, 5]])
    texts = [torch.cat([long[1], tail[0, 0]]), *(torch.cat([short[i], fed[i], tail[0, i]]) for i in (1, 2))]
    for row, text in enumerate(texts):
        TWINS[torch.float64][0].check(actual[0][row, -1], whole(model, text)[-1])
        again = torch.cat([text, tail[1, row]])
        TWINS[torch.float64][0].check(actual[1][row, -1], whole(model, again)[-1])


def test_empty_caches_do_not_join() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="an empty cache cannot be joined; run a forward pass"):
        HymbaCache(model.config).join(model(TEXTS[0][None], use_cache=True)[CACHE_NAME])


@pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS.keys())
def test_texts_go_on_apart_and_together_again(overrides: dict[str, Any]) -> None:
    """Also one that has no token yet, as a prompt continues from the meta tokens alone."""
    model = tiny_model(torch.float64, **overrides)
    lengths = [9, 0, 1, 7]
    ids = torch.full((len(TEXTS), 9), 7)
    mask = torch.zeros_like(ids)
    for row, (text, length) in enumerate(zip(TEXTS, lengths, strict=True)):
        ids[row, 9 - length :], mask[row, 9 - length :] = text[:length], 1
    with torch.no_grad():
        cache = model(ids, attention_mask=mask, use_cache=True)[CACHE_NAME]
        apart = [cache.text(row) for row in range(len(TEXTS))]
        before = [one.keys[0].clone() for one in apart]
        joined = apart[3].text(0)
        joined.join(apart[1])
        following = torch.stack([TEXTS[3][7:11], TEXTS[1][:4]])
        logits = model(following, cache=joined).logits
    TWINS[torch.float64][0].check(logits[0], whole(model, TEXTS[3])[7:11])
    TWINS[torch.float64][0].check(logits[1], whole(model, TEXTS[1])[:4])
    assert all(torch.equal(one.keys[0], keys) for one, keys in zip(apart, before, strict=True))
    assert sum(one.nbytes for one in apart) <= cache.nbytes <= cache.nbytes_of(len(TEXTS), 9)
