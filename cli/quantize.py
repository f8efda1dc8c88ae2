"""`hymba-tune quantize`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.table import Table
from rich.text import Text

from hymba_tune.cli.screen import RichScreen, console, loading, print_chosen_gpu, quiet_libraries
from hymba_tune.cli.settings import check_first
from hymba_tune.config import QuantizeConfig
from hymba_tune.errors import command
from hymba_tune.formatting import format_bytes

if TYPE_CHECKING:
    from hymba_tune.hub import QuantizedModel, Searched

NOTHING_FOUND = 2
"""Exit code of a search without a proposal."""


def quantize(
    model: Annotated[str, Parameter(name="MODEL")],
    /,
    *,
    flags: Annotated[QuantizeConfig, Parameter(name="*")] = QuantizeConfig(),  # noqa: B008 (cyclopts reads the default)
) -> int | None:
    """Quantize the weights of a model, or of a run with its adapter merged, and check the written folder.

    Example: hymba-tune quantize runs/my-run --scheme nf4 --out my-model-nf4

    Choose what to leave unquantized: hymba-tune quantize runs/my-run --scheme fp4 --search --max-rise 0.5%

    The folder loads with transformers and bitsandbytes, and you can pass it anywhere a model is expected: chat, eval,
    sft, export. The damage is measured on --data, and written to damage.json and damage.html.

    Parameters
    ----------
    model
        A run directory, or a model as for --model.
    """
    flags.model = model
    check_first(flags)
    with loading():
        from hymba_tune.hub import quantize as write_quantized
        from hymba_tune.hub import search_skips

    quiet_libraries()
    print_chosen_gpu(flags.device)
    if not flags.search:
        _print_written(write_quantized(flags, RichScreen().working))
        return None
    result = search_skips(flags, RichScreen().working)
    _print_search(result, flags)
    if result.written:
        _print_written(result.written)
    return None if result.search.skip is not None else NOTHING_FOUND


def _print_written(done: QuantizedModel) -> None:
    damage, drift = done.damage, done.damage.drift
    before, after = (format_bytes(size) for size in damage.weight_bytes)
    errors = " · ".join(f"{kind} {100 * error.error:.2g} %" for kind, error in damage.kinds.items())
    _lines(
        ("quantized", f"{done.folder} (weights {before} → {after})"),
        *([("from", done.note)] if done.note else []),
        ("damage", damage.sentence),
        ("", f"drift {drift.kl:.2g} nats a token (KL), over {damage.texts.tokens:,} tokens"),
        ("weights", f"off by {errors}"),
        ("kept", f"{', '.join(damage.kept)} (why: {done.folder}/damage.html)"),
        ("checked", f"reloaded: logits differ by at most {done.difference:.2g}; SHA256SUMS"),
        ("chat with it", command("chat", done.folder)),
        ("publish it", command("export", done.folder, "--push", "USER/NAME")),
    )


def _print_search(result: Searched, flags: QuantizeConfig) -> None:
    tried = result.search
    scheme = flags.scheme
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(f" in {scheme}", overflow="fold", header_style="dim")
    for name in ("perplexity", "rise", "drift", "saves"):
        table.add_column(name, justify="right", header_style="dim")
    table.add_row(Text(" nothing"), tried.whole[0].drift.perplexities[0], "", "", "")
    alone = [(f"{' '.join(trial.kinds)} alone", trial) for trial in tried.alone]
    sets = [(" ".join(("all but", *left)) if (left := tried.left_of(trial)) else "all", trial) for trial in tried.whole]
    for label, trial in alone + sets:
        drift = trial.drift
        cells = (drift.perplexities[1], drift.risen, f"{drift.kl:.2g}", format_bytes(trial.saved))
        table.add_row(Text(f" {label}"), *cells)
    console.print(table)
    limit = f"{flags.max_rise:g} %"
    if tried.skip is None:
        _lines(
            ("proposal", f"no set of them keeps the rise within {limit}"),
            ("to go on", "a larger --max-rise, or --scheme int8"),
        )
        return
    what = f"leave {' '.join(tried.skip)}" if tried.skip else "all may be quantized"
    _lines(("proposal", f"{what}: {tried.whole[-1].drift.risen} (measured whole; {limit} allowed)"))
    if not result.written:
        skip = ["--skip", *result.skip] if result.skip else []
        checkpoint = ["--checkpoint", flags.checkpoint] if flags.checkpoint else []
        _lines(("to do it", command("quantize", flags.model, *checkpoint, "--scheme", scheme, *skip)))


def _lines(*lines: tuple[str, str]) -> None:
    for label, line in lines:
        console.print(f" {label:<14}{line}", markup=False, soft_wrap=True)
