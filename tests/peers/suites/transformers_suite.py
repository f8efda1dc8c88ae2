"""The common tests of transformers on a small model; in the process that runs this, `tests` is theirs."""

from __future__ import annotations

import json
import unittest
from pathlib import Path
from typing import Any, ClassVar

import torch
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_modeling_common import ModelTesterMixin
from tests.test_training_mixin import TrainingTesterMixin

import hymba_tune.model as hymba

CONFIG = json.loads(Path("config.json").read_text())
CLASSES = (
    hymba.HymbaModel,
    hymba.HymbaForCausalLM,
    hymba.HymbaForSequenceClassification,
    hymba.HymbaForTokenClassification,
)


class SmallModel:
    """Makes the small configuration and the inputs of the common tests."""

    __test__: ClassVar = False
    causal_lm_class = CLASSES[1]
    base_model_class = CLASSES[0]
    is_training = True
    batch_size = 3
    seq_length = 9

    def __init__(self, parent: Any) -> None:
        self.parent = parent
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            setattr(self, name, CONFIG[name])

    def get_config(self) -> Any:
        return hymba.HymbaConfig(**CONFIG)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class PeersModelTest(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin, unittest.TestCase):
    """The common tests."""

    all_model_classes = CLASSES
    has_attentions = False  # the kernels never hold attention weights
    model_tester: Any = None

    def setUp(self) -> None:
        self.model_tester = SmallModel(self)
