"""The results for a text do not depend on the layout of the batch that contains it."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.tiny import gradients, random_texts, tiny_model
from tests.tolerances import FLOAT32, TWINS

TEXTS = random_texts([9, 1, 14, 6, 2, 21])
LABELS = [text.where(torch.arange(len(text)) % 4 > 0, -100) for text in TEXTS]
LABELS[1] = TEXTS[1]  # the label of a one-token text must not be a target of the text before it
LABELS[3] = TEXTS[3]  # the first label of any other text must not be a target either
GARBAGE = 7
"""The id and label at padding."""


class Batch(NamedTuple):
    """Inputs of the model, and the position of each text in them."""

    inputs: dict[str, Tensor]
    places: list[tuple[int, slice]]


def lay_out(rows: list[list[int]], begins: list[int], *, restart: bool = False, offsets: bool = False) -> Batch:
    """Put texts into rows.

    Args:
        rows: The indices of the texts of each row.
        begins: The column at which the texts of each row begin, with padding before and after them.
        restart: Whether to add position_ids that restart where a text begins.
        offsets: Whether to add cu_seq_lens_q.
    """
    length = max(begin + sum(len(TEXTS[i]) for i in row) for row, begin in zip(rows, begins, strict=True))
    ids = torch.full((len(rows), length), GARBAGE)
    labels, mask, positions = ids.clone(), torch.zeros_like(ids), torch.zeros_like(ids)
    places: dict[int, tuple[int, slice]] = {}
    for row, (texts, column) in enumerate(zip(rows, begins, strict=True)):
        for i in texts:
            place = places[i] = row, slice(column, column + len(TEXTS[i]))
            ids[place] = TEXTS[i]
            labels[place] = LABELS[i]
            mask[place] = 1
            positions[place] = torch.arange(len(TEXTS[i]))
            column += len(TEXTS[i])
    inputs = {"input_ids": ids, "labels": labels}
    if not mask.all():
        inputs["attention_mask"] = mask
    if restart:
        inputs["position_ids"] = positions
    if offsets:
        inputs["cu_seq_lens_q"] = torch.tensor([0, *(len(TEXTS[i]) for row in rows for i in row)]).cumsum(0).int()
    return Batch(inputs, [places[i] for i in range(len(TEXTS))])


EACH = [[i] for i in range(len(TEXTS))]
LAYOUTS = {
    "left_padded": lay_out(EACH, [21 - len(text) for text in TEXTS]),
    "right_padded": lay_out(EACH, [0] * 6),
    "padded_on_both_sides": lay_out(EACH, [3, 20, 7, 2, 1, 0]),
    "padded_everywhere": lay_out(EACH, [5, 4, 3, 2, 1, 5]),
    "packed_by_positions": lay_out([[0, 1, 2, 3, 4, 5]], [0], restart=True),
    "packed_by_offsets": lay_out([[5, 4, 3, 2, 1, 0]], [0], offsets=True),
    "packed_by_both": lay_out([[5, 4, 3, 2, 1, 0]], [0], restart=True, offsets=True),
    "packed_rows_by_positions": lay_out([[0, 1, 3], [2, 4], [5]], [0, 0, 0], restart=True),
    "packed_rows_padded_left_by_positions": lay_out([[0, 1, 3], [5], [2, 4]], [5, 0, 5], restart=True),
    "packed_rows_padded_right_by_offsets": lay_out([[4], [2, 3, 1], [0, 5]], [0, 0, 0], offsets=True),
    "one_token_texts_next_to_each_other": lay_out([[1, 4], [5, 0], [2, 3]], [0, 0, 1], restart=True),
    "padded_with_positions": lay_out(EACH, [0, 2, 4, 1, 3, 0], restart=True),
}
MODELS: dict[str, dict[str, Any]] = {
    "as_released": {},
    "no_meta_tokens": {"num_memory_tokens": 0},
    "dynamic_ntk": {"rope_type": "dynamic_ntk"},
}
TARGETS = sum(int((labels[1:] != -100).sum()) for labels in LABELS)


class Alone(NamedTuple):
    """The results of a separate pass for each text."""

    logits: list[Tensor]
    loss: Tensor
    gradients: dict[str, Tensor | None]


@functools.cache
def alone(name: str, dtype: torch.dtype) -> Alone:
    model = tiny_model(dtype, **MODELS[name])
    logits, losses = [], []
    for text, labels in zip(TEXTS, LABELS, strict=True):
        output = model(text[None], labels=labels[None], num_items_in_batch=TARGETS)
        logits.append(output.logits[0].detach())
        losses.append(output.loss)
    loss = torch.stack(losses).sum()
    loss.backward()
    return Alone(logits, loss.detach(), gradients(model))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_equals_each_text_alone(batch: Batch, name: str, dtype: torch.dtype) -> None:
    expected = alone(name, dtype)
    close, close_gradient = TWINS[dtype]
    model = tiny_model(dtype, **MODELS[name])
    output = model(**batch.inputs)
    output.loss.backward()
    for i, place in enumerate(batch.places):
        close.check(output.logits[place], expected.logits[i], f"logits of text {i}")
    close.check(output.loss, expected.loss, "loss")
    close_gradient.check_all(gradients(model), expected.gradients)


def test_positions_of_one_row_apply_to_all_rows() -> None:
    ids = torch.stack(random_texts([12, 12]))
    positions = torch.cat([torch.arange(5), torch.arange(7)])
    model = tiny_model(torch.float64)
    once = model(ids, position_ids=positions[None]).logits
    assert torch.equal(once, model(ids, position_ids=positions.expand(2, 12)).logits)
    assert not torch.equal(once, model(ids).logits)


def test_embeddings_give_the_results_of_their_ids() -> None:
    model = tiny_model(torch.float64)
    inputs = dict(LAYOUTS["padded_on_both_sides"].inputs)
    expected = model(**inputs)
    embeds = model.model.embed_tokens(inputs.pop("input_ids"))
    output = model(**inputs, inputs_embeds=embeds)
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(output.loss, expected.loss)


@pytest.mark.parametrize("keep", [1, 4, torch.tensor([0, 5, 20])], ids=["last", "last_four", "columns"])
def test_logits_to_keep_are_those_columns(keep: int | Tensor) -> None:
    model = tiny_model()
    inputs = dict(LAYOUTS["left_padded"].inputs)
    inputs.pop("labels")
    columns = slice(-keep, None) if isinstance(keep, int) else keep
    FLOAT32.check(model(**inputs, logits_to_keep=keep).logits, model(**inputs).logits[:, columns])


def test_loss_needs_no_logits() -> None:
    model = tiny_model()
    inputs = LAYOUTS["left_padded"].inputs
    output = model(**inputs, skip_logits=True)
    assert output.logits is None
    assert torch.equal(output.loss, model(**inputs).loss)


def test_the_loss_without_targets_is_zero() -> None:
    text = TEXTS[0][None]
    loss = tiny_model()(text, labels=torch.full_like(text, -100)).loss
    loss.backward()
    assert loss == 0


def test_hidden_states_are_zero_at_padding_only() -> None:
    inputs = LAYOUTS["padded_on_both_sides"].inputs
    hidden = tiny_model().model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
    assert torch.equal(hidden.any(-1), inputs["attention_mask"].bool())


@pytest.mark.parametrize("return_dict", [False, True])
def test_a_tuple_contains_the_fields_of_the_output(return_dict: bool) -> None:
    model = tiny_model()
    inputs = LAYOUTS["left_padded"].inputs
    loss, logits = model(**inputs, return_dict=return_dict)[:2]
    expected = model(**inputs)
    assert torch.equal(loss, expected.loss)
    assert torch.equal(logits, expected.logits)
    hidden = model.model(inputs["input_ids"], return_dict=return_dict)[0]
    assert torch.equal(hidden, model.model(inputs["input_ids"]).last_hidden_state)
