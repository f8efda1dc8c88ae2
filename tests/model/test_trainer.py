"""Hymba with the Trainer of transformers, and the inputs that it passes to a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModel, Trainer, TrainingArguments

from hymba_tune.model import HymbaModel
from hymba_tune.model.head import HymbaHead
from tests.tiny import random_texts, tiny_model
from tests.tolerances import FLOAT32, FLOAT64

IDS = torch.stack(random_texts([16, 16, 16]))
ROWS = [{"input_ids": ids, "labels": ids} for ids in IDS]


def trainer(model: nn.Module, folder: Path, **changes: Any) -> Trainer:
    defaults: dict[str, Any] = {"per_device_eval_batch_size": 2, "per_device_train_batch_size": 3, "use_cpu": True}
    arguments = TrainingArguments(str(folder), report_to="none", disable_tqdm=True, **defaults | changes)
    return Trainer(model, arguments, train_dataset=ROWS, eval_dataset=ROWS)


def test_trainer_evaluates_and_predicts(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        output = model(IDS, labels=IDS)
    tested = trainer(model, tmp_path)
    assert tested.evaluate()["eval_loss"] == pytest.approx(output.loss.item(), rel=1e-5)
    predicted = tested.predict(ROWS)
    FLOAT32.check(torch.tensor(predicted.predictions), output.logits)
    assert predicted.label_ids.tolist() == IDS.tolist()


def test_label_smoothing_shifts_the_labels(tmp_path: Path) -> None:
    model = tiny_model()
    tested = trainer(model, tmp_path, label_smoothing_factor=0.1)
    logits = model(IDS).logits[:, :-1].flatten(0, 1)
    expected = cross_entropy(logits, IDS[:, 1:].flatten(), label_smoothing=0.1)
    loss = tested.compute_loss(model, {"input_ids": IDS, "labels": IDS})
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def shifted(ids: Tensor, mask: Tensor) -> Tensor:
    """Return the label that each position predicts, -100 if it or the next token is padding."""
    labels = torch.nn.functional.pad(ids.masked_fill(mask == 0, -100), (0, 1), value=-100)[:, 1:]
    return labels.masked_fill(mask == 0, -100)


@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_shifted_labels_are_not_shifted_again(side: str, with_labels: bool) -> None:
    model = tiny_model(torch.float64)
    mask = torch.ones_like(IDS)
    if side != "none":
        mask[1, slice(5) if side == "left" else slice(-5, None)] = 0
    expected = model(IDS, attention_mask=mask, labels=IDS.masked_fill(mask == 0, -100)).loss
    labels = {"labels": IDS} if with_labels else {}
    actual = model(IDS, attention_mask=mask, shift_labels=shifted(IDS, mask), **labels).loss
    FLOAT64.check(actual, expected)


def test_shifted_labels_of_the_last_token_count() -> None:
    model = tiny_model(torch.float64)
    logits = model(IDS[:, :9]).logits
    expected = cross_entropy(logits.flatten(0, 1), IDS[:, 1:10].flatten())
    FLOAT64.check(model(IDS[:, :9], shift_labels=IDS[:, 1:10]).loss, expected)
    scores = model(IDS[:, :9], shift_labels=IDS[:, 1:10], fused_lm_head=True).log_probs
    FLOAT64.check(-scores.mean(), expected)
    weights = torch.rand(3, 9, dtype=torch.float64)
    losses = cross_entropy(logits.mT, IDS[:, 1:10], reduction="none")
    weighted = model(IDS[:, :9], shift_labels=IDS[:, 1:10], loss_weights=weights).loss
    FLOAT64.check(weighted, (losses * weights).sum() / weights.sum())


def test_auto_model_is_the_layers_without_the_head(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, HymbaModel)
    assert torch.equal(loaded(IDS).last_hidden_state, model.model(IDS).last_hidden_state)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapted_head_gets_gradients_from_the_loss() -> None:
    model = tiny_model(tie_word_embeddings=False)
    adapted = get_peft_model(model, LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    output = adapted(IDS, labels=IDS)
    expected = cross_entropy(output.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    FLOAT32.check(output.loss, expected)
    FLOAT32.check(adapted(IDS, labels=IDS, loss_weights=torch.ones(3, 16)).loss, expected)
    output.loss.backward()
    assert model.lm_head.lora_B["default"].weight.grad.any()
    with pytest.raises(ValueError, match="fused_lm_head reads the weight of lm_head, which is a Linear and computes"):
        adapted(IDS, labels=IDS, fused_lm_head=True)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_resized_head_is_still_a_hymba_head(tied: bool) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    model.resize_token_embeddings(70, mean_resizing=False)
    assert isinstance(model.lm_head, HymbaHead)
    output = model(IDS, labels=IDS)
    assert output.logits.shape[-1] == 70
    FLOAT32.check(output.loss, cross_entropy(output.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()))
