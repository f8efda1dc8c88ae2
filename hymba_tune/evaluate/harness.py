"""lm-eval tasks, scored without the logits of all tokens in memory and generated in batches.

Log-likelihoods and answers equal those of lm-eval's own model class for transformers (`HFLM`).
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hymba_tune.data import IGNORED, Encoded
from hymba_tune.errors import ConfigError, DataError
from hymba_tune.evaluate.scoring import score_tokens
from hymba_tune.generate import Generation, Sampling, generate_texts

LONGEST_ANSWER = 256
"""Maximum number of tokens of an answer if a task does not set it."""
RESAMPLED = 1000
"""Number of bootstrap samples for the standard errors of metrics that have no formula; a mean has one."""
Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""lm-eval's text of the request (its cache key), the context's tokens, and the tokens to score."""

# lm-eval runs git in the user's folder to record a commit; outside a repository git prints an error to the screen.
evaluator.get_git_commit_hash = lambda: None


class HymbaLM(TemplateLM):
    """A model with lm-eval's interface.

    Args:
        model: A model in evaluation mode.
        tokenizer: A tokenizer with a chat template.
        batch_size: Number of sequences in a batch.
        cuda_graphs: Whether steps of generation are replayed as CUDA graphs.
        progress: Called with the number of finished requests.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        cuda_graphs: bool = False,
        progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.max_length = int(model.config.max_position_embeddings)
        self._model = model
        self._batch_size = batch_size
        self._cuda_graphs = cuda_graphs
        self._progress = progress
        self._done = 0

    @property
    def eot_token_id(self) -> int:
        """The end token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token in front of a text without context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """The name under which lm-eval caches rendered requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render questions and few-shot examples with the model's chat template."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; the tokenizer's BOS token is added unless the text already starts with it."""
        bos = self.tokenizer.bos_token
        if add_special_tokens is None:
            add_special_tokens = not (bos and string.startswith(bos))
        return list(self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"])

    def _loglikelihood_tokens(self, requests: Sequence[Request], **_: Any) -> list[tuple[float, bool]]:
        scores: list[tuple[float, bool]] = []
        for begin in range(0, len(requests), self._batch_size):
            batch = requests[begin : begin + self._batch_size]
            for log_probs, likeliest in score_tokens(self._model, [self._row(request) for request in batch]):
                scores.append((sum(log_probs), all(likeliest)))
            self._count(len(batch))
        for request, score in zip(requests, scores, strict=True):
            if request[0] is not None:
                self.cache_hook.add_partial("loglikelihood", request[0], score)
        return scores

    def _row(self, request: Request) -> Encoded:
        """The request as a row to score; too long ones are truncated on the left."""
        _, context, scored = request
        ids = (context + scored)[-(self.max_length + 1) :]
        begin = len(ids) - len(scored)
        return Encoded(ids, [IGNORED] * begin + ids[begin:])

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts: each token is scored once, in windows of the model's context length."""
        del disable_tqdm
        sums = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            parts = self._loglikelihood_tokens([(None, *make_disjoint_window(window)) for window in windows])
            sums.append(sum(score for score, _ in parts))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), sums[-1])
        return sums

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate answers, each up to the first of its request's ``until`` strings."""
        del disable_tqdm
        generations = [self._generation(number, *request.args) for number, request in enumerate(requests)]
        answers = [""] * len(generations)
        for one in generate_texts(
            self._model, self.tokenizer, generations, batch_size=self._batch_size, cuda_graphs=self._cuda_graphs
        ):
            answers[one.number] = one.text(self.tokenizer)
            self.cache_hook.add_partial("generate_until", requests[one.number].args, answers[one.number])
            self._count(1)
        return answers

    def _generation(self, number: int, context: str, options: dict[str, Any]) -> Generation:
        until = options.get("until") or []
        stop = tuple(word for word in ([until] if isinstance(until, str) else until) if word)
        limit = int(options.get("max_gen_toks", options.get("max_new_tokens", LONGEST_ANSWER)))
        if limit >= self.max_length:
            raise ConfigError(f"A task needs answers of {limit:,} tokens; the model's context has {self.max_length:,}.")
        temperature = float(options.get("temperature", 1.0)) if options.get("do_sample") else 0.0
        sampling = Sampling(temperature, float(options.get("top_p", 1.0)))
        prompt = self.tok_encode(context)[-(self.max_length - limit) :]
        return Generation(prompt, limit, sampling, (*stop, self.tokenizer.eos_token), number=number)

    def _count(self, more: int) -> None:
        self._done += more
        self._progress(self._done)


def find_tasks(names: Sequence[str]) -> tuple[list[str], TaskManager]:
    """Resolve the names of tasks.

    Args:
        names: Names of lm-eval tasks, or folders with task files; all tasks of a folder are used.

    Raises:
        ConfigError: If a task does not exist, or a folder has none.
        DataError: If a task or its data cannot be read.
    """
    folders = [Path(name).expanduser() for name in names if Path(name).expanduser().is_dir()]
    packaged = [name for name in names if not Path(name).expanduser().is_dir()]
    manager = TaskManager(include_path=list(map(str, folders)) or None, include_defaults=bool(packaged))
    for name in packaged:
        if name not in manager.all_tasks:
            raise ConfigError(
                f"--tasks {name}: there is no such task or folder.",
                expected="a name that `lm-eval ls tasks` lists, or a folder with a task's YAML file",
            )
    own = [name for folder in folders for name in _names_in(folder)]
    tasks = list(dict.fromkeys(packaged + own))
    with _lm_eval_errors(tasks):
        manager.load(tasks)  # only to report errors before a model loads
    return tasks, manager


def _names_in(folder: Path) -> list[str]:
    names = []
    for file in sorted(folder.rglob("*.yaml")):
        try:
            # Task files may refer to functions with YAML tags, which are not needed here.
            task = yaml.load(file.read_text(encoding="utf-8"), _TagFreeLoader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} cannot be read: {error}", expected="a task's YAML file") from error
        if isinstance(task, dict) and isinstance(task.get("task"), str):
            names.append(task["task"])
    if not names:
        raise ConfigError(f"--tasks {folder}: no task in this folder.", expected="YAML files with task: NAME")
    return names


class _TagFreeLoader(yaml.SafeLoader):
    """Reads tagged YAML nodes as None."""


_TagFreeLoader.add_multi_constructor("!", lambda *_: None)


def run_tasks(
    lm: HymbaLM,
    names: Sequence[str],
    manager: TaskManager,
    *,
    fewshot: int | None,
    limit: int | None,
    as_chat: bool,
) -> dict[str, dict[str, float]]:
    """Evaluate a model on tasks.

    Returns:
        The metrics of each task or task group; the standard error of ``acc`` is ``acc_stderr``.

    Raises:
        DataError: If lm-eval fails.
    """
    with _lm_eval_errors(names):
        results = evaluator.simple_evaluate(
            lm,
            tasks=list(names),
            task_manager=manager,
            num_fewshot=fewshot,
            limit=limit,
            apply_chat_template=as_chat,
            fewshot_as_multiturn=as_chat,
            log_samples=False,
            bootstrap_iters=RESAMPLED,
        )
    return {task: _measures(values) for task, values in (results or {}).get("results", {}).items()}


@contextlib.contextmanager
def _lm_eval_errors(names: Sequence[str]) -> Iterator[None]:
    """Hides lm-eval's own output, which would break the progress display, and converts its errors to `DataError`."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"lm-eval cannot run {', '.join(names)}: {error}",
            expected="a task whose data is on this machine or can be downloaded",
        ) from error


def _measures(values: dict[str, Any]) -> dict[str, float]:
    """Metrics by name: ``acc,none`` becomes acc; other filters stay in the name, before the suffix ``_stderr``."""
    measures = {}
    for key, value in values.items():
        measure, comma, filtering = key.partition(",")
        if comma and isinstance(value, int | float) and not isinstance(value, bool):
            name = measure.removesuffix("_stderr")
            filtered = name if filtering == "none" else f"{name} {filtering}"
            measures[filtered + measure.removeprefix(name)] = float(value)
    return measures
