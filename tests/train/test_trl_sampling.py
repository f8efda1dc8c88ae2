"""TRL's own trainers can sample from the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from hymba_tune.checkpoint import load_tokenizer

PROMPTS = ["I see two cats.", "What do I see over there, where the other one was?"]
NEW = 6


# trl switches checkpointing off and on around its sampling, by the names transformers is about to rename.
@pytest.mark.filterwarnings("ignore:.*checkpointing.* is deprecated:FutureWarning")
def test_grpo_is_given_what_each_prompt_alone_is_gone_on_with(small_model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(small_model)
    tokenizer.padding_side = "left"
    model = AutoModelForCausalLM.from_pretrained(small_model)
    model.generation_config.eos_token_id = None
    expected = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        written = model.generate(ids, max_new_tokens=NEW, do_sample=False, use_cache=False)
        expected.append(written[0, ids.shape[1] :].tolist())
    sampled: dict[str, list[int]] = {}

    def reward(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        sampled.update(zip(prompts, completion_ids, strict=True))
        return [float(sum(ids)) for ids in completion_ids]

    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_dict({"prompt": PROMPTS}),
        args=GRPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=NEW,
            top_k=1,  # the likeliest token each time
            max_steps=1,
            beta=0.1,  # the reference, a second model, computes log-probabilities too
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
    )
    trainer.train()
    assert sampled == dict(zip(PROMPTS, expected, strict=True))
    # The reference, the same model once more, scores the samples as the model does.
    assert trainer.state.log_history[-1]["kl"] == pytest.approx(0, abs=1e-6)
