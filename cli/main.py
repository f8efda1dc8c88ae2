"""`hymba-tune`: runs the verb of a command line, and prints the user's mistakes as one message."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import reduce
from io import TextIOWrapper

from cyclopts import App, CycloptsError, Parameter, UnusedCliTokensError, ValidationError
from cyclopts.config import Env
from pydantic import ValidationError as PydanticError

from hymba_tune import __version__
from hymba_tune.cli.chat import chat
from hymba_tune.cli.data import data
from hymba_tune.cli.distill import distill
from hymba_tune.cli.doctor import doctor
from hymba_tune.cli.dpo import dpo
from hymba_tune.cli.eval import measure
from hymba_tune.cli.export import export
from hymba_tune.cli.kto import kto
from hymba_tune.cli.merge import merge
from hymba_tune.cli.orpo import orpo
from hymba_tune.cli.plan import plan
from hymba_tune.cli.quantize import quantize
from hymba_tune.cli.recipes import recipes
from hymba_tune.cli.report import report
from hymba_tune.cli.screen import error_console
from hymba_tune.cli.serve import serve
from hymba_tune.cli.settings import explain
from hymba_tune.cli.sft import sft
from hymba_tune.config import TrainingConfig
from hymba_tune.errors import ConfigError, HymbaTuneError, nearest

USER_ERROR, INTERRUPTED = 2, 130
TAKE_DATA = (*TrainingConfig.by_verb(), "plan")

app = App(
    name="hymba-tune",
    help="Fine-tune Hymba models on the machine you have.",
    help_epilogue="Try it: hymba-tune sft --model hymba-nano --data demo --steps 100. With --debug, errors show where.",
    version=__version__,
    config=Env("HYMBA_TUNE_", command=True),
    default_parameter=Parameter(show_env_var=False),
    result_action="return_value",
)
for verb in (sft, dpo, kto, orpo, chat, merge, quantize, export, report, plan, recipes, doctor):
    app.command(verb)
app.command(measure, name="eval")
app.command(serve)
app.command(data)
app.command(distill)

CACHED_KERNELS = "64"
"""The most kernels that oneDNN caches. On a CPU it compiles one for each shape of a bfloat16 product: a layer has fewer
than this, and the next texts seldom have the same shapes. The default limit of 1,024 takes 0.6 GB more."""


def main(words: Sequence[str] | None = None) -> None:
    """Run one command and exit: with 0, with 2 for a mistake of the user, or with 130 when interrupted."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", CACHED_KERNELS)
    # TRL reports each new trainer to the Hub. huggingface_hub reads this variable when it is imported.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    words = list(sys.argv[1:] if words is None else words)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # so that a piped table shows each row at once
    debug = "--debug" in words
    sys.exit(_run([word for word in words if word != "--debug"], debug=debug))


def _run(words: list[str], *, debug: bool) -> int:
    try:
        result = app(words, exit_on_error=False, print_error=False)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (HymbaTuneError, CycloptsError) as error:
        if debug:
            raise
        error_console.print(_message(error), markup=False, highlight=False, soft_wrap=True)
        return USER_ERROR
    return result if isinstance(result, int) else 0


def _message(error: HymbaTuneError | CycloptsError) -> str:
    cause = error.__cause__
    if isinstance(error, ValidationError) and isinstance(cause, PydanticError):
        return explain(cause)
    return str(_unexpected(error) if isinstance(error, UnusedCliTokensError) else error)


def _unexpected(error: UnusedCliTokensError) -> ConfigError:
    """Return the error for an unexpected argument: data without its flag, or a misspelled subcommand."""
    word = (error.unused_tokens or [""])[0]
    chain = error.command_chain or ()
    verb = " ".join(("hymba-tune", *chain))
    command = reduce(lambda parent, name: parent[name], chain, app)
    verbs = [name for name in command if not name.startswith("-")]
    near = nearest(word, verbs)
    fix = f"{verb} {near or '--help'}"
    if chain and chain[0] in TAKE_DATA and not near:
        fix = f"{verb} --data {word}"
    return ConfigError(f"{verb}: unexpected argument {word!r}.", expected=", ".join(verbs), fix=fix)
