"""Heads that classify texts or tokens, and the reward models of TRL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from hymba_tune.checkpoint import load_tokenizer
from hymba_tune.model import HymbaForSequenceClassification, HymbaForTokenClassification
from tests.tiny import random_texts, tiny_model
from tests.tolerances import FLOAT32

TEXTS = random_texts([4, 9, 6])
OTHER_PAD = 60
"""A padding id that is not the one of the configuration, as that of the released tokenizer."""


def padded(side: str) -> dict[str, Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence(TEXTS, batch_first=True, padding_value=OTHER_PAD, padding_side=side)
    ones = [torch.ones_like(text) for text in TEXTS]
    mask = torch.nn.utils.rnn.pad_sequence(ones, batch_first=True, padding_side=side)
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_text_is_scored_by_its_last_token(folder: Path, side: str) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).eval()
    assert isinstance(model, HymbaForSequenceClassification)
    hidden = [tiny_model().model(text[None]).last_hidden_state[:, -1] for text in TEXTS]
    FLOAT32.check(model(**padded(side)).logits, model.score(torch.cat(hidden)))


def test_tokens_are_classified_one_by_one(folder: Path) -> None:
    model = AutoModelForTokenClassification.from_pretrained(folder, num_labels=3).eval()
    assert isinstance(model, HymbaForTokenClassification)
    logits = model(**padded("right")).logits
    for row, text in enumerate(TEXTS):
        FLOAT32.check(logits[row, : len(text)], model.score(tiny_model().model(text[None]).last_hidden_state[0]))


@pytest.mark.parametrize(
    ("auto_class", "labels"),
    [
        (AutoModelForSequenceClassification, torch.tensor([0, 2, 1])),
        (AutoModelForTokenClassification, torch.arange(27).view(3, 9) % 3),
    ],
)
def test_the_loss_of_a_head_trains_every_layer_and_survives_saving(
    auto_class: Any, labels: Tensor, folder: Path, tmp_path: Path
) -> None:
    model = auto_class.from_pretrained(folder, num_labels=3).eval()
    output = model(**padded("left"), labels=labels, output_hidden_states=True)
    assert len(output.hidden_states) == 5
    output.loss.backward()
    unread = {"model.layers.2.mamba.in_proj.weight"} if model.config.kv_reuse_group is None else set()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is None} == unread

    model.save_pretrained(tmp_path)
    reloaded = auto_class.from_pretrained(tmp_path)
    assert torch.equal(reloaded(**padded("left")).logits, output.logits)


@pytest.mark.parametrize("auto_class", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_a_head_returns_a_tuple_if_the_configuration_says_so(auto_class: Any, folder: Path) -> None:
    model = auto_class.from_pretrained(folder, num_labels=3).eval()
    named = model(**padded("left"))
    model.config.return_dict = False
    assert torch.equal(model(**padded("left"))[0], named.logits)


def test_reward_trainer_learns_which_answer_is_better(small_model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(small_model)
    rows = [{"prompt": f"Say {word}.", "chosen": " Yes.", "rejected": " No, no."} for word in ("one", "two") * 8]
    arguments = trl.RewardConfig(
        output_dir=str(tmp_path),
        learning_rate=1e-2,
        max_steps=6,
        logging_steps=1,
        per_device_train_batch_size=4,
        activation_checkpointing=False,
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
    )
    model = AutoModelForSequenceClassification.from_pretrained(small_model, num_labels=1)
    trainer = trl.RewardTrainer(
        model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    trainer.train()
    accuracies = [row["accuracy"] for row in trainer.state.log_history if "accuracy" in row]
    assert accuracies[-1] == 1.0
