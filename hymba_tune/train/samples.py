"""Answers to a few prompts before and after training, in ``samples.json``."""

from __future__ import annotations

import json

from transformers import PreTrainedModel

from hymba_tune.files import write_text
from hymba_tune.generate import answer
from hymba_tune.train.screen import Screen
from hymba_tune.train.setup import Data, Setup

SAMPLES = 2
"""The number of prompts: the first of the evaluation data, or of the training data where there is none."""
SAMPLE_TOKENS = 96


def answer_samples(setup: Setup, data: Data, model: PreTrainedModel, when: str, screen: Screen) -> None:
    """Answer the prompts of the data with the model as it is now.

    Args:
        setup: The run's setup.
        data: The data with the prompts.
        model: The model, in any mode.
        when: ``before`` or ``after`` training.
        screen: Shows the progress.
    """
    path = setup.run.path / "samples.json"
    samples = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    if not samples:
        samples = [
            {"prompt": prompt.messages[-1].content, "reference": reference} for prompt, reference in data.prompts
        ]
    with screen.working(f"answering {len(samples)} prompts, {when} training") as progress:
        for number, ((prompt, _), sample) in enumerate(zip(data.prompts, samples, strict=True), start=1):
            sample[when] = answer(model, setup.tokenizer, prompt, max_new_tokens=SAMPLE_TOKENS, temperature=0.0)
            progress(number)
    write_text(path, json.dumps(samples, indent=2, ensure_ascii=False) + "\n")
