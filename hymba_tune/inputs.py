"""The first checks of a verb: what its settings need and name, before torch is imported and anything is downloaded."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from hymba_tune.config import (
    ChatConfig,
    Config,
    EvalConfig,
    GRPOConfig,
    PreferenceConfig,
    ServeConfig,
    TeacherOptions,
)
from hymba_tune.config.inference import ScoringOptions
from hymba_tune.config.options import CheckpointChoice, HeldOutOptions, ModelChoice, ReadingOptions, SourceOptions
from hymba_tune.errors import ConfigError, command
from hymba_tune.files.checkpoints import at_checkpoint
from hymba_tune.registry import ALIASES, TEACHERS, find_local


def check_inputs(config: Config, *, complete: bool = True) -> None:
    """Check that settings are complete, and that the models, data and chat templates they name exist.

    Nothing is downloaded, and torch is not imported. Whether a name on the Hub exists is not known afterwards.

    Args:
        config: The settings of any verb.
        complete: Whether everything has to be given that the verb needs; a plan needs neither data nor teacher.

    Raises:
        ConfigError: If a setting is missing or does not fit the others, or there is no such model or template.
        CheckpointError: If a folder holds no model.
        DataError: If there is no such file, or it is of no known kind.
    """
    if complete:
        _check_complete(config)
    _check_sources(config)
    for flag, name, aliases in _models(config):
        _check_model(flag, name, aliases)
    for flag, template in _templates(config):
        from hymba_tune.data.templates import read_template

        read_template(template, flag=flag)


def _check_sources(config: Config) -> None:
    if not isinstance(config, SourceOptions | HeldOutOptions | ScoringOptions | ChatConfig):
        return
    from hymba_tune.data.mixes import open_sources  # after what can be checked without pyarrow
    from hymba_tune.data.sources import open_source

    if isinstance(config, SourceOptions):
        open_sources(config.data, config.weights, config.caps)
    if isinstance(config, HeldOutOptions):
        open_sources(config.eval_data)
    if isinstance(config, ScoringOptions):
        open_sources(config.data)
    if isinstance(config, ChatConfig) and config.prompts is not None:
        open_source(str(config.prompts))


def _models(config: Config) -> Iterator[tuple[str, str, Mapping[str, str]]]:
    """The models that settings name: the flag, the name, and the aliases that the flag takes."""
    if isinstance(config, ModelChoice):
        chosen = config.checkpoint if isinstance(config, CheckpointChoice) else None
        yield "--model", at_checkpoint(config.model, chosen), ALIASES
    if isinstance(config, ChatConfig | EvalConfig):
        yield from (("--against", name, ALIASES) for name in config.against)
    if isinstance(config, TeacherOptions):
        if config.teacher and not config.served:
            yield "--teacher", config.teacher, TEACHERS
        name = config.teacher_tokenizer
        if name and not (Path(name).expanduser() / "tokenizer.json").is_file():  # a tokenizer alone will do
            yield "--teacher-tokenizer", name, TEACHERS


def _check_model(flag: str, name: str, aliases: Mapping[str, str]) -> None:
    """Check a model, and those below it if it is an adapter."""
    found = find_local(name, flag=flag, aliases=aliases)
    while found is not None and found.base:
        found = find_local(found.base)


def _templates(config: Config) -> Iterator[tuple[str, str]]:
    if isinstance(config, ReadingOptions | ServeConfig) and config.chat_template is not None:
        yield "--chat-template", config.chat_template
    if isinstance(config, TeacherOptions) and config.teacher_chat_template is not None:
        yield "--teacher-chat-template", config.teacher_chat_template


def _check_complete(config: Config) -> None:
    if isinstance(config, TeacherOptions):
        _check_teacher(config)
    if isinstance(config, SourceOptions) and not config.data:
        packaged = not isinstance(config, PreferenceConfig)  # the demo has no preferences
        raise ConfigError(
            "--data is missing.",
            expected="a file, a Hub dataset, or demo" if packaged else "a file or a Hub dataset",
            fix="--data demo to try the kit" if packaged else "",
        )
    if isinstance(config, GRPOConfig):
        _check_rewards(config)
    if isinstance(config, EvalConfig):
        _check_evaluation(config)
    if isinstance(config, ChatConfig):
        _check_chat(config)
    if isinstance(config, ServeConfig) and config.api_key is not None and not os.environ.get(config.api_key):
        # Somebody may have written the key itself, so the message does not repeat it.
        raise ConfigError(
            "--api-key: there is no environment variable of this name, or it is empty.",
            expected="the name of a variable that has the key",
            fix="export SERVE_KEY=…, then --api-key SERVE_KEY",
        )


def _check_teacher(options: TeacherOptions) -> None:
    if not options.teacher:
        raise ConfigError(
            "--teacher is missing.",
            expected="a Hub id, an alias (llama-3.2-3b-instruct), a folder, a run directory, or a server's address",
        )
    if not options.served:
        return
    if options.temperature != 1:
        raise ConfigError(
            f"--temperature {options.temperature:g}: a server returns probabilities at temperature 1 only.",
            fix="leave it out, or name a model that is loaded here",
        )
    if options.teacher_quantize:
        raise ConfigError("--teacher-quantize: a server has loaded its model already.", fix="leave it out")
    if not options.teacher_tokenizer:
        raise ConfigError(
            "--teacher-tokenizer is missing: a server does not give its model's.",
            expected="a Hub id, an alias or a folder",
            fix="--teacher-tokenizer llama-3.2-3b-instruct",
        )


def _check_rewards(config: GRPOConfig) -> None:
    if not config.reward:
        raise ConfigError(
            "--reward is missing.",
            expected="exact, number, gsm8k, choice, regex=PATTERN, format, length, or FILE.py:FUNCTION",
            fix="--reward gsm8k for answers that end with #### and a number",
        )
    for reward in config.rewards:
        if reward.runs_code and not Path(reward.argument).expanduser().is_file():
            raise ConfigError(f"--reward {reward.text}: there is no file {reward.argument}.", expected="a Python file")


def _check_evaluation(config: EvalConfig) -> None:
    has_questions = config.answers or config.extract
    if not config.data and not config.tasks:
        _check_model("--model", config.model, ALIASES)  # otherwise the command below fails too
        fix = command("eval", config.model, "--data", "demo")
        raise ConfigError("Nothing to evaluate on.", expected="--data or --tasks", fix=fix)
    if has_questions and not config.data:
        raise ConfigError("--answers and --extract need --data, for its prompts and answers.", fix="--data FILE")
    if config.answers and config.extract:
        raise ConfigError("--answers and --extract cannot be combined.", expected="one of them")
    if config.save_answers and not has_questions:
        raise ConfigError("--save-answers needs --answers or --extract.", fix="--answers exact, or another")
    try:
        re.compile(config.extract or "")
    except re.error as error:
        raise ConfigError(
            f"--extract {config.extract}: {error}.", expected="a regular expression such as '#### (.*)'"
        ) from error
    if gone := [name for name in config.tasks if "/" in name and not Path(name).expanduser().is_dir()]:
        raise ConfigError(
            f"--tasks {gone[0]}: there is no such folder.",
            expected="a folder with the YAML file of a task, or a name that lm-eval ls tasks lists",
        )
    if config.tasks and importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "--tasks needs lm-eval, which is not installed.", fix="pip install 'hymba-tune[eval]' (or lm-eval)"
        )


def _check_chat(config: ChatConfig) -> None:
    if config.prompts is None and config.to is None:
        return
    if config.prompts is None or config.to is None:
        raise ConfigError("--from and --to go together.", fix="--from prompts.jsonl --to answers.jsonl")
    if config.against or config.prompt is not None:
        raise ConfigError("--from answers a file with one model.", fix="remove --against and --prompt")
    if config.to.suffix != ".jsonl":
        raise ConfigError(f"--to {config.to}: answers are written as JSON Lines.", expected="a file name in .jsonl")
