"""`hymba-tune`: runs the verb of a command line, and prints the user's mistakes as one message."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from functools import reduce
from io import TextIOWrapper
from typing import Any

from cyclopts import App, CycloptsError, Parameter, UnusedCliTokensError, ValidationError
from cyclopts.config import Env

from hymba_tune import __version__
from hymba_tune.cli.other_tools import other_flags, other_verb
from hymba_tune.cli.screen import HELP_FLAGS, console, error_console
from hymba_tune.distributed.environment import check_single_process, is_main
from hymba_tune.errors import ConfigError, HymbaTuneError, command, nearest, without_passwords

INTERNAL_ERROR, USER_ERROR, INTERRUPTED = 1, 2, 130
VERBS = {
    "demo": "Fine-tune the packaged model on the packaged data, chat with the result, and merge it: minutes on a CPU.",
    "init": "Ask for your data and your GPU, and write a recipe that fits.",
    "sft": "Fine-tune a model on conversations or texts.",
    "dpo": "Train a model to prefer the better of two answers.",
    "kto": "Train a model on single answers that are labeled good or bad.",
    "orpo": "Train a model on pairs of a better and a worse answer, without a reference model.",
    "reward": "Train a reward model: it scores texts, and learns from pairs of a better and a worse answer.",
    "grpo": "Train a model from rewards of answers that it samples itself, compared with reference answers.",
    "distill": "Distill a teacher into a model; the two tokenizers may differ.",
    "data": "Check, preview, convert and split data before training.",
    "chat": "Chat with a model or with several side by side.",
    "eval": "Evaluate a model, or compare several: loss, perplexity, bits per byte, exact match, lm-eval tasks.",
    "serve": "Serve a model over OpenAI's HTTP API: chat and text completions, several at once.",
    "merge": "Merge a run's adapter into its base model, as one model with the released tensor names.",
    "quantize": "Quantize the weights of a model, or of a run with its adapter merged, and check the written folder.",
    "export": "Export a run or a model for any library, check it, write its model card, and publish it.",
    "report": "Write a run's report.html again, or compare several runs on one page.",
    "plan": "Estimate the memory and time of a run, and what to change where it does not fit. Loads no weights.",
    "recipes": "List the packaged recipes, show or copy one, or check one of your own.",
    "completion": "Print a script with which a shell completes verbs, flags, choices, recipes and files.",
    "doctor": "Show this machine's hardware and libraries, the kernels that are used on it, and why others are not.",
}
"""The verbs, with the first sentences of their help. Listing them imports none of them."""
TAKE_DATA = ("sft", "dpo", "kto", "orpo", "reward", "grpo", "distill", "plan")
IN_SEVERAL_PROCESSES = ("sft", "dpo", "kto", "orpo", "reward", "distill")
"""Verbs that work in several processes together."""
ANYWHERE = ("init", "doctor", "recipes", "completion")
"""Verbs that do no work of which several processes would do the whole each."""
FUNCTIONS = {"eval": "measure"}
"""Functions that do not have the name of their verb."""


def build_app(*, summaries: bool = False) -> App:
    """Build the command line. Each verb is imported when it is used.

    Args:
        summaries: Whether verbs have the help of `VERBS` only, so that listing them imports none of them.
    """
    app = App(
        name="hymba-tune",
        help="Fine-tune Hymba models on the machine you have.",
        help_epilogue="Try it: hymba-tune demo. With --debug, errors show where.",
        help_format="plaintext",
        help_flags=HELP_FLAGS,
        version=__version__,
        version_flags=("--version", "-v", "-V"),
        config=Env("HYMBA_TUNE_", command=True),
        default_parameter=Parameter(show_env_var=False),
        result_action="return_value",
    )
    for place, (verb, summary) in enumerate(VERBS.items()):
        path = f"hymba_tune.cli.{verb}:{FUNCTIONS.get(verb, verb)}"
        app.command(path, name=verb, help=summary if summaries else None, sort_key=place)
    return app


app = build_app()

CACHED_KERNELS = "64"
"""The most kernels that oneDNN caches. On a CPU it compiles one for each shape of a bfloat16 product: a layer has fewer
than this, and the next texts seldom have the same shapes. The default limit of 1,024 takes 0.6 GB more."""


def main(words: Sequence[str] | None = None) -> None:
    """Run one command and exit: with 0, 2 for a mistake of the user, 1 for an internal error, or 130 if interrupted."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", CACHED_KERNELS)
    # TRL reports each new trainer to the Hub. huggingface_hub reads this variable when it is imported.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # Where DeepSpeed is installed, Accelerate imports it for every command, and it says so on the screen.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    words = list(sys.argv[1:] if words is None else words)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # A piped table shows each row at once, and one in an encoding without → and ▼ shows them as ?.
            stream.reconfigure(line_buffering=True, errors="replace")
    console.quiet = error_console.quiet = not is_main()
    debug = "--debug" in words
    sys.exit(_run(_as_flags([word for word in words if word != "--debug"]), debug=debug))


def _as_flags(words: list[str]) -> list[str]:
    """Turn ``help``, ``help sft`` and ``version``, which other programs have as verbs, into flags."""
    if words[:1] == ["help"]:
        return [*words[1:], "--help"]
    if len(words) == 2 and words[1] == "help":
        return [words[0], "--help"]
    return ["--version"] if words == ["version"] else words


def _run(words: list[str], *, debug: bool) -> int:
    lists_verbs = not words or words[0] in HELP_FLAGS
    line = build_app(summaries=True) if lists_verbs else app
    try:
        if words and words[0] in VERBS.keys() - {*IN_SEVERAL_PROCESSES, *ANYWHERE}:
            check_single_process(words[0])
        with line.app_stack([], _help_settings(line, words)):
            result = line(words, exit_on_error=False, print_error=False)
    except KeyboardInterrupt:
        return _ended(INTERRUPTED, "")
    except Exception as error:
        if debug:
            raise
        from hymba_tune.cli.crash import as_own_error, describe_crash  # most commands end well
        from hymba_tune.distributed.watch import explain

        code = USER_ERROR
        if isinstance(error, CycloptsError):
            message = _message(error, words)
        elif isinstance(error, HymbaTuneError):
            code, message = error.exit_code, error
        elif own := as_own_error(error) or explain(error):
            message = own
        else:
            code, message = INTERNAL_ERROR, describe_crash(error, words)
        return _ended(code, without_passwords(str(message)))
    return result if isinstance(result, int) else 0


def _help_settings(line: App, words: list[str]) -> dict[str, Any]:
    if words and {*HELP_FLAGS}.isdisjoint(words):
        return {}
    from hymba_tune.cli.help import help_settings  # most commands show no help

    return help_settings(line, words)


def _ended(code: int, message: str) -> int:
    """Show why the command has ended, or leave that to another one of several processes, and return the code."""
    from hymba_tune.distributed.launch import has_final_ending
    from hymba_tune.distributed.watch import tell

    if tell(code, message) and message:
        error_console.quiet = False
        error_console.print(message, markup=False, highlight=False, soft_wrap=True)
    return 0 if has_final_ending() else code


def _message(error: CycloptsError, words: list[str]) -> object:
    """Describe why a command line cannot be used, in terms of this command line."""
    from pydantic import ValidationError as PydanticError

    from hymba_tune.cli.settings import explain

    chain = error.command_chain or ()
    verb = reduce(lambda parent, name: parent[name], chain, app)
    if chain and (own := other_flags(words, verb.assemble_argument_collection())):
        return own
    if not chain and words and (own := other_verb(words[0])):
        return own
    cause = error.__cause__
    if isinstance(error, ValidationError) and isinstance(cause, PydanticError):
        return explain(cause)
    return _unexpected(error) if isinstance(error, UnusedCliTokensError) else error


def _unexpected(error: UnusedCliTokensError) -> ConfigError:
    """Return the error for an unexpected argument: data without its flag, or a misspelled subcommand."""
    word = (error.unused_tokens or [""])[0]
    chain = error.command_chain or ()
    verb = " ".join(("hymba-tune", *chain))
    parent = reduce(lambda parent, name: parent[name], chain, app)
    verbs = [name for name in parent if not name.startswith("-")]
    near = nearest(word, verbs)
    fix = f"{verb} {near or '--help'}"
    if chain and chain[0] in TAKE_DATA and not near:
        fix = command(*chain, "--config" if word.endswith((".yaml", ".yml")) else "--data", word)
    return ConfigError(f"{verb}: unexpected argument {word!r}.", expected=", ".join(verbs), fix=fix)
