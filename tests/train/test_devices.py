"""A trainer computes on one device, its model's, however many GPUs are visible. The GPUs here are mocked."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock, PropertyMock

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel, Trainer
from transformers.training_args import ParallelMode

from hymba_tune.checkpoint import load_tokenizer, load_weights
from hymba_tune.registry import resolve_model
from hymba_tune.train.banner import device_in_words
from hymba_tune.train.trainer import HymbaTrainer
from tests.runs import one_plain_step

CPU = torch.device("cpu")


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Two mocked GPUs, and the list of those that were made the current device."""
    devices: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: devices.append(torch.device(device)))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "make-believe")
    monkeypatch.setattr("accelerate.state.check_cuda_p2p_ib_support", lambda: True)
    return devices


def trainer(model: PreTrainedModel, small_model: Path, folder: Path, **changes: Any) -> HymbaTrainer:
    rows = Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 8)
    args = one_plain_step(folder, batch_size=4, grad_accum=1, dataset_kwargs={"skip_prepare_dataset": True}, **changes)
    return HymbaTrainer(
        model=model, args=args, train_dataset=rows, eval_dataset=rows, processing_class=load_tokenizer(small_model)
    )


@pytest.mark.parametrize("name", ["cuda:0", "cuda:1"])
def test_gpu_of_the_model_is_the_trainers_only_one(
    name: str, current: list[torch.device], small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_weights(resolve_model(str(small_model)), dtype=torch.float32, device=CPU)
    monkeypatch.setattr(type(model), "device", PropertyMock(return_value=torch.device(name)))
    monkeypatch.setattr(Trainer, "_move_model_to_device", lambda *_: None)
    built = trainer(model, small_model, tmp_path, use_cpu=False)
    assert built.args.n_gpu == 1
    assert built.args.parallel_mode is ParallelMode.NOT_PARALLEL
    assert built.args.train_batch_size == 4
    assert str(built.args.device) == str(built.accelerator.device) == name
    assert str(current[-1]) == name
    assert built._wrap_model(model) is model


@pytest.mark.usefixtures("current")
def test_banner_says_that_one_of_several_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Mock(total_memory=24 * 2**30))
    assert device_in_words(torch.device("cuda:1")) == "cuda:1 (make-believe, 24 GB, 1 of 2 GPUs)"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert device_in_words(torch.device("cuda:0")) == "cuda:0 (make-believe, 24 GB)"
