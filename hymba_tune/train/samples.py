"""Held-out prompts that are answered before and after training: a few to read, and all of them where answers count."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hymba_tune.config import GRPOConfig
from hymba_tune.data import encode_prompt
from hymba_tune.evaluate.questions import AnsweredQuestion, Extraction, Question, answer_questions, score_answers
from hymba_tune.files import read_json, write_text
from hymba_tune.generate import answer, evaluating, write
from hymba_tune.train.screen import Screen
from hymba_tune.train.setup import Data, Setup

SAMPLES = 3
"""The number of prompts whose answers are shown: the first of the held-out data, or of the training data."""
SAMPLE_TOKENS = 96
LONGER = 2
"""The most tokens of a counted answer, as a multiple of those of the longest reference answer."""


def answer_samples(setup: Setup, data: Data, model: PreTrainedModel, when: str, screen: Screen) -> None:
    """Answer the prompts of the data with the model as it is now.

    Args:
        setup: The run whose directory receives the answers.
        data: The data whose prompts are answered.
        model: The model, in training or evaluation mode.
        when: ``before`` or ``after``.
        screen: Shows the progress.
    """
    path = setup.run.path / "samples.json"
    prompts = data.prompts[:SAMPLES]
    if not prompts:
        return
    most = setup.config.max_new_tokens if isinstance(setup.config, GRPOConfig) else SAMPLE_TOKENS
    samples: list[dict[str, str]] = read_json(path, list) or []
    if len(samples) != len(prompts) or not all(isinstance(sample, dict) for sample in samples):
        samples = [{"prompt": prompt.messages[-1].content, "reference": reference} for prompt, reference in prompts]
    with screen.working(f"answering {len(samples)} prompts, {when} training") as progress:
        for number, ((prompt, reference), sample) in enumerate(zip(prompts, samples, strict=True), start=1):
            sample[when] = answer(
                model,
                setup.tokenizer,
                prompt,
                max_new_tokens=most,
                temperature=0.0,
                cuda_graphs=setup.config.cuda_graphs,
            )
            if data.rate is not None:
                sample[f"reward {when}"] = data.rate(prompt, sample[when], reference)
            progress(number)
    write_text(path, json.dumps(samples, indent=2, ensure_ascii=False) + "\n")
    if data.extract is not None:
        _count_right(setup, data, data.extract, model, when, screen)


def _count_right(
    setup: Setup, data: Data, extract: Extraction, model: PreTrainedModel, when: str, screen: Screen
) -> None:
    """Answer every prompt, and record in ``run.json`` how many answers are right."""
    tokenizer = setup.tokenizer
    questions = [Question(prompt, reference) for prompt, reference in data.prompts]
    longest = max(len(tokenizer(question.reference).input_ids) for question in questions)
    most = {"max_new_tokens": LONGER * longest, "batch_size": setup.config.batch_size}
    with screen.working(f"answering {len(questions):,} held-out prompts, {when} training") as progress:
        if setup.config.cuda_graphs:
            with evaluating(model):
                answered = answer_questions(
                    model, tokenizer, questions, extract, **most, cuda_graphs=True, progress=progress
                )
        else:
            answered = _answered(model, tokenizer, questions, extract, **most, progress=progress)
    known = setup.run.facts().get("answers", {})
    counts = {**known, "questions": len(questions), when: score_answers(answered).correct}
    right = [number for number, one in enumerate(answered) if one.correct]
    if when == "before":
        counts["right_before"] = right
    elif "right_before" in known:
        before = set(known["right_before"])
        counts |= {"gained": len(set(right) - before), "lost": len(before - set(right))}
    setup.run.record(answers=counts)


def _answered(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    extract: Extraction,
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: Callable[[int], None],
) -> list[AnsweredQuestion]:
    """Answer questions as `answer_questions` does, with `generate` of transformers."""
    answered: list[AnsweredQuestion] = []
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        ids = [encode_prompt(question.prompt, tokenizer) for question in batch]
        written = write(model, ids, ends=[tokenizer.eos_token_id], max_new_tokens=max_new_tokens, temperature=0.0)
        texts = tokenizer.batch_decode(written, skip_special_tokens=True)
        answered += [
            AnsweredQuestion(question, text, extract(text), extract(question.reference))
            for question, text in zip(batch, texts, strict=True)
        ]
        progress(len(answered))
    return answered
