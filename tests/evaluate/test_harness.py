"""lm-eval tasks, compared with lm-eval's own model class for transformers."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from hymba_tune.checkpoint import load_tokenizer, load_weights
from hymba_tune.data import with_chat_template
from hymba_tune.errors import ConfigError, DataError
from hymba_tune.evaluate.harness import HymbaLM, _measures, find_tasks, run_tasks
from hymba_tune.registry import resolve_model

PAIRS = [
    ("I see two cats. What do I see?", " You see two cats."),
    ("I see two cats. What do I see? ", "two"),
    ("", "Once upon a time"),
    ("One.", " " + "a longer one, " * 8),
    ("Two", " a"),
    ("Two", " b"),
]
LIMIT = 64
CHOICES = """
task: animals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


@pytest.fixture(scope="module")
def pair(small_model: Path) -> tuple[HymbaLM, Any]:
    model = load_weights(resolve_model(str(small_model)), dtype=torch.float32, device=torch.device("cpu")).eval()
    tokenizer = with_chat_template(load_tokenizer(small_model))
    reference = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=3, max_length=LIMIT)
    ours = HymbaLM(model, tokenizer, batch_size=4)
    ours.max_length = LIMIT
    return ours, reference


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]  # type: ignore[arg-type]


def test_answers_by_cuda_graphs_are_those_without(pair: tuple[HymbaLM, Any], graphs: list[Any]) -> None:
    ours, _ = pair
    free = {"until": [], "max_gen_toks": 6}
    instances = requests("generate_until", [(context, free) for context, _ in PAIRS])
    expected = ours.generate_until(instances, disable_tqdm=True)
    replayed = HymbaLM(ours._model, ours.tokenizer, batch_size=4, cuda_graphs=True)
    assert replayed.generate_until(instances, disable_tqdm=True) == expected
    assert graphs


def test_log_likelihoods_equal_those_of_lm_eval(pair: tuple[HymbaLM, Any]) -> None:
    """Also of texts that are too long, and of texts without context."""
    instances = requests("loglikelihood", [*PAIRS, ("word " * 90, " end")])
    ours, reference = (lm.loglikelihood(instances, disable_tqdm=True) for lm in pair)
    assert [score for score, _ in ours] == pytest.approx([score for score, _ in reference], rel=1e-5)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in reference]


def test_rolling_log_likelihoods_equal_those_of_lm_eval(pair: tuple[HymbaLM, Any]) -> None:
    instances = requests("loglikelihood_rolling", [("a short text",), ("one two three " * 40,)])
    ours, reference = (lm.loglikelihood_rolling(instances, disable_tqdm=True) for lm in pair)
    assert ours == pytest.approx(reference, rel=1e-5)


def test_generated_answers_equal_those_of_lm_eval(pair: tuple[HymbaLM, Any]) -> None:
    free = {"until": [], "max_gen_toks": 8}
    first = pair[1].generate_until(requests("generate_until", [(PAIRS[0][0], free)]), disable_tqdm=True)[0]
    stop = {"until": [first[3:5]], "max_gen_toks": 8, "do_sample": False}
    instances = requests("generate_until", [(PAIRS[0][0], free), ("Two", free), (PAIRS[0][0], stop)])
    ours, reference = (lm.generate_until(instances, disable_tqdm=True) for lm in pair)
    assert ours == reference
    assert ours[2] == first[: first.find(first[3:5])]


def test_answers_longer_than_the_context_are_rejected(pair: tuple[HymbaLM, Any]) -> None:
    instances = requests("generate_until", [("Two", {"until": [], "max_gen_toks": LIMIT})])
    with pytest.raises(ConfigError, match="A task needs answers of 64 tokens; the model's context has 64"):
        pair[0].generate_until(instances)


def test_rendered_chats_equal_those_of_lm_eval(pair: tuple[HymbaLM, Any]) -> None:
    chat = [{"role": "user", "content": "Two?"}]
    assert pair[0].apply_chat_template(chat) == pair[1].apply_chat_template(chat)


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    rows = [
        {"question": f"I see {n} cats.", "choices": [" one", " two", " three"], "answer": i}
        for i, n in enumerate("ABC")
    ]
    data = tmp_path / "test.jsonl"
    folder = tmp_path / "tasks"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder.mkdir()
    (folder / "animals.yaml").write_text(CHOICES.format(data=data))
    return folder


def test_a_folder_of_tasks_runs_offline(pair: tuple[HymbaLM, Any], tasks: Path) -> None:
    names, manager = find_tasks([str(tasks)])
    assert names == ["animals"]
    settings: dict[str, Any] = {"fewshot": 0, "limit": 2, "as_chat": False}
    ours, reference = (run_tasks(lm, names, manager, **settings)["animals"] for lm in pair)
    assert ours.keys() >= {"acc", "acc_stderr", "acc_norm"}
    assert ours == reference
    assert run_tasks(pair[0], names, manager, fewshot=1, limit=None, as_chat=True)["animals"].keys() == ours.keys()


def test_standard_errors_are_named_after_their_metrics() -> None:
    values = {"acc,none": 0.5, "acc_stderr,none": 0.1, "match,strict": 1, "match_stderr,strict": 0.2, "alias": "x"}
    measures = {"acc": 0.5, "acc_stderr": 0.1, "match strict": 1.0, "match strict_stderr": 0.2}
    assert _measures(values | {"bleu_stderr,none": "N/A"}) == measures


def test_tasks_by_name(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small task manager: listing all of lm-eval's tasks takes seconds."""
    small_manager = functools.partial(TaskManager, include_path=str(tasks), include_defaults=False)
    monkeypatch.setattr("hymba_tune.evaluate.harness.TaskManager", lambda **_: small_manager())
    assert find_tasks(["animals"])[0] == ["animals"]
    with pytest.raises(ConfigError, match="--tasks animal: there is no such task or folder"):
        find_tasks(["animal"])


def test_folders_without_tasks_and_broken_files_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no task in this folder"):
        find_tasks([str(tmp_path)])
    (tmp_path / "torn.yaml").write_text("task: [")
    with pytest.raises(ConfigError, match=r"torn\.yaml cannot be read"):
        find_tasks([str(tmp_path)])


def test_tasks_without_their_data_are_rejected(tasks: Path, tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(DataError, match="lm-eval cannot run animals"):
        find_tasks([str(tasks)])
