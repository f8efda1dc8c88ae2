"""Two steps of each trainer of TRL on a small model. These tests are our own, since those of TRL need the Hub."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import hymba_tune  # noqa: F401  (registers Hymba with the Auto classes)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl.experimental import cpo, gkd, online_dpo, orpo, tpo

MODEL = "hymba"  # a folder
PROMPTS = [f"Say {word}." for word in ("one", "two", "three", "four")]
TEXTS = [{"prompt": prompt, "completion": " Yes."} for prompt in PROMPTS]
PAIRS = [{"prompt": prompt, "chosen": " Yes.", "rejected": " No."} for prompt in PROMPTS]
TRIPLES = [pair | {"reference": " Yes, yes."} for pair in PAIRS]
LABELED = [{"prompt": prompt, "completion": " Yes.", "label": i % 2 == 0} for i, prompt in enumerate(PROMPTS)]
CHATS = [
    {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": "Yes."}]} for prompt in PROMPTS
]
ONLY_PROMPTS = [{"prompt": prompt} for prompt in PROMPTS]


def length(completions: list[str], **_: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


TRAINERS: dict[str, tuple[Any, Any, list[dict[str, Any]], Any, dict[str, Any]]] = {
    "SFTTrainer": (trl.SFTTrainer, trl.SFTConfig, TEXTS, dict, {}),
    "SFTTrainer-packed": (trl.SFTTrainer, trl.SFTConfig, TEXTS, dict, {"packing": True, "max_length": 64}),
    "DPOTrainer": (trl.DPOTrainer, trl.DPOConfig, PAIRS, dict, {}),
    "KTOTrainer": (trl.KTOTrainer, trl.KTOConfig, LABELED, dict, {}),
    "RewardTrainer": (trl.RewardTrainer, trl.RewardConfig, PAIRS, dict, {}),
    "GRPOTrainer": (
        trl.GRPOTrainer,
        trl.GRPOConfig,
        ONLY_PROMPTS,
        lambda: {"reward_funcs": length},
        {"num_generations": 2, "max_completion_length": 4},
    ),
    "RLOOTrainer": (
        trl.RLOOTrainer,
        trl.RLOOConfig,
        ONLY_PROMPTS,
        lambda: {"reward_funcs": length},
        {"num_generations": 2, "max_completion_length": 4},
    ),
    "ORPOTrainer": (orpo.ORPOTrainer, orpo.ORPOConfig, PAIRS, dict, {}),
    "CPOTrainer": (cpo.CPOTrainer, cpo.CPOConfig, PAIRS, dict, {}),
    "TPOTrainer": (tpo.TPOTrainer, tpo.TPOConfig, TRIPLES, dict, {}),
    "GKDTrainer": (
        gkd.GKDTrainer,
        gkd.GKDConfig,
        CHATS,
        lambda: {"teacher_model": AutoModelForCausalLM.from_pretrained(MODEL)},
        {"max_new_tokens": 4},
    ),
    "OnlineDPOTrainer": (
        online_dpo.OnlineDPOTrainer,
        online_dpo.OnlineDPOConfig,
        ONLY_PROMPTS,
        lambda: {"reward_funcs": length},
        {"max_new_tokens": 4},
    ),
}


class TestTrainers:
    @pytest.mark.parametrize("name", TRAINERS)
    def test_trains(self, name: str, tmp_path: Path) -> None:
        trainer_class, config_class, rows, make_inputs, settings = TRAINERS[name]
        tokenizer = AutoTokenizer.from_pretrained(MODEL, padding_side="left")
        if name == "RewardTrainer":
            trained = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=1)
        else:
            trained = AutoModelForCausalLM.from_pretrained(MODEL)
        before = {name: parameter.clone() for name, parameter in trained.named_parameters()}
        arguments = config_class(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            report_to="none",
            **settings,
        )
        trainer = trainer_class(
            model=trained,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            **make_inputs(),
        )
        trainer.train()
        moved = [name for name, parameter in trained.named_parameters() if not torch.equal(parameter, before[name])]
        assert any("mamba.in_proj" in name for name in moved)
