"""lm-eval's tasks, scored without the logits of all tokens and answered several at a time.

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
from hymba_tune.generate import Sampling, Writing, write_texts

LONGEST_ANSWER = 256
"""Tokens of an answer where a task does not say."""
RESAMPLED = 1000
"""How often a standard error is drawn where no formula gives it; a mean has one."""
Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""lm-eval's own text of it, the tokens that are only read, and those that are scored."""

# lm-eval asks git for the commit of the user's own folder, and git complains on the screen where there is none.
evaluator.get_git_commit_hash = lambda: None


class HymbaLM(TemplateLM):
    """A model as lm-eval asks one.

    Args:
        model: In evaluation mode.
        tokenizer: With a chat template.
        batch_size: Texts at a time.
        progress: Called with the number of requests done.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.max_length = int(model.config.max_position_embeddings)
        self._model, self._batch_size, self._progress = model, batch_size, progress
        self._done = 0

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without a context."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        """Under which lm-eval keeps what it made with the tokenizer."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Questions and solved examples as the model's chat template writes them."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, behind the token that begins a text where the tokenizer puts one and the text has none."""
        begins = self.tokenizer.bos_token
        if add_special_tokens is None:
            add_special_tokens = not (begins and string.startswith(begins))
        return list(self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"])

    def _loglikelihood_tokens(self, requests: Sequence[Request], **_: Any) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = []
        for begin in range(0, len(requests), self._batch_size):
            batch = requests[begin : begin + self._batch_size]
            for log_probs, likeliest in score_tokens(self._model, [self._row(request) for request in batch]):
                found.append((sum(log_probs), all(likeliest)))
            self._count(len(batch))
        for request, score in zip(requests, found, strict=True):
            if request[0] is not None:
                self.cache_hook.add_partial("loglikelihood", request[0], score)
        return found

    def _row(self, request: Request) -> Encoded:
        """What is too long loses its beginning."""
        _, context, scored = request
        ids = (context + scored)[-(self.max_length + 1) :]
        read = len(ids) - len(scored)
        return Encoded(ids, [IGNORED] * read + ids[read:])

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts: each token scored once, in windows as long as the model reads."""
        del disable_tqdm
        sums = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            parts = self._loglikelihood_tokens([(None, *make_disjoint_window(window)) for window in windows])
            sums.append(sum(score for score, _ in parts))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), sums[-1])
        return sums

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers up to the first of a request's ``until``."""
        del disable_tqdm
        texts = [self._writing(number, *request.args) for number, request in enumerate(requests)]
        answers = [""] * len(texts)
        for written in write_texts(self._model, self.tokenizer, texts, batch_size=self._batch_size):
            answers[written.number] = written.text(self.tokenizer)
            self.cache_hook.add_partial("generate_until", requests[written.number].args, answers[written.number])
            self._count(1)
        return answers

    def _writing(self, number: int, context: str, options: dict[str, Any]) -> Writing:
        until = options.get("until") or []
        stop = tuple(word for word in ([until] if isinstance(until, str) else until) if word)
        limit = int(options.get("max_gen_toks", options.get("max_new_tokens", LONGEST_ANSWER)))
        if limit >= self.max_length:
            raise ConfigError(f"A task asks for answers of {limit:,} tokens; the model reads {self.max_length:,}.")
        temperature = float(options.get("temperature", 1.0)) if options.get("do_sample") else 0.0
        sampling = Sampling(temperature, float(options.get("top_p", 1.0)))
        prompt = self.tok_encode(context)[-(self.max_length - limit) :]
        return Writing(prompt, limit, sampling, (*stop, self.tokenizer.eos_token), number=number)

    def _count(self, more: int) -> None:
        self._done += more
        self._progress(self._done)


def find_tasks(names: Sequence[str]) -> tuple[list[str], TaskManager]:
    """The tasks that names stand for.

    Args:
        names: lm-eval's names, or folders with task files, of which all are taken.

    Raises:
        ConfigError: If there is no such task, or a folder has none.
        DataError: If a task or its data cannot be read.
    """
    folders = [Path(name).expanduser() for name in names if Path(name).expanduser().is_dir()]
    packaged = [name for name in names if not Path(name).expanduser().is_dir()]
    manager = TaskManager(include_path=list(map(str, folders)) or None, include_defaults=bool(packaged))
    for name in packaged:
        if name not in manager.all_tasks:
            raise ConfigError(
                f"--tasks {name}: no such task, and no such folder.",
                expected="a name that lm-eval ls tasks lists, or a folder with the YAML file of a task",
            )
    own = [name for folder in folders for name in _names_in(folder)]
    found = list(dict.fromkeys(packaged + own))
    with _theirs(found):
        manager.load(found)  # to see that it can be
    return found, manager


def _names_in(folder: Path) -> list[str]:
    names = []
    for file in sorted(folder.rglob("*.yaml")):
        try:
            # Task files may name functions with tags of their own, which are not looked at here.
            task = yaml.load(file.read_text(encoding="utf-8"), _Plain)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} cannot be read: {error}", expected="the YAML file of a task") from error
        if isinstance(task, dict) and isinstance(task.get("task"), str):
            names.append(task["task"])
    if not names:
        raise ConfigError(f"--tasks {folder}: no task in this folder.", expected="YAML files with task: NAME")
    return names


class _Plain(yaml.SafeLoader):
    """Reads YAML with tags of any kind as if they had none."""


_Plain.add_multi_constructor("!", lambda *_: None)


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
        What each task, or group of them, measured; ``acc`` has its standard error in ``acc_stderr``.

    Raises:
        DataError: If lm-eval refuses.
    """
    with _theirs(names):
        found = evaluator.simple_evaluate(
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
    return {task: _measures(values) for task, values in (found or {}).get("results", {}).items()}


@contextlib.contextmanager
def _theirs(names: Sequence[str]) -> Iterator[None]:
    """lm-eval at work: what it has to say stands beside our own progress, and what goes wrong is told in our way."""
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
    """Numbers by name: ``acc,none`` is called acc, other filters keep theirs, before what marks a standard error."""
    found = {}
    for key, value in values.items():
        measure, comma, kept = key.partition(",")
        if comma and isinstance(value, int | float) and not isinstance(value, bool):
            name = measure.removesuffix("_stderr")
            called = name if kept == "none" else f"{name} {kept}"
            found[called + measure.removeprefix(name)] = float(value)
    return found
