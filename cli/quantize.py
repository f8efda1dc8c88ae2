"""`hymba-tune quantize`."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from hymba_tune.cli.screen import RichScreen, console, quiet_libraries
from hymba_tune.config import QuantizeConfig


def quantize(
    model: Annotated[str, Parameter(name="MODEL")],
    /,
    *,
    flags: Annotated[QuantizeConfig, Parameter(name="*")] = QuantizeConfig(),  # noqa: B008 (cyclopts reads the default)
) -> None:
    """Store a model's weights in fewer bits, a run's with its adapter folded in, and check what was written.

    Example: hymba-tune quantize runs/my-run --scheme nf4 --out my-model-nf4

    The folder loads with transformers and bitsandbytes, and stands wherever a model does: chat, eval, sft, export. What
    it cost is measured on --data: damage.json, damage.html.

    Parameters
    ----------
    model
        A run directory, or whatever --model takes.
    """
    from hymba_tune.hub import quantize as make
    from hymba_tune.pages import gigabytes

    quiet_libraries()
    flags.model = model
    done = make(flags, RichScreen().working)
    damage, drift = done.damage, done.damage.drift
    before, after = (gigabytes(size) for size in damage.weight_bytes)
    errors = " · ".join(f"{kind} {100 * error.error:.2g} %" for kind, error in damage.kinds.items())
    for label, line in (
        ("quantised", f"{done.folder} (weights {before} → {after})"),
        ("damage", damage.sentence),
        ("", f"drift {drift.kl:.2g} nats a token (KL), over {damage.texts.tokens:,} tokens"),
        ("weights", f"off by {errors}"),
        ("kept", f"{', '.join(damage.kept)} (why: {done.folder}/damage.html)"),
        ("checked", f"read again: logits differ by {done.difference:.2g} at most; SHA256SUMS"),
        ("talk to it", f"hymba-tune chat {done.folder}"),
        ("publish it", f"hymba-tune export {done.folder} --push USER/NAME"),
    ):
        console.print(f" {label:<11}{line}", markup=False, soft_wrap=True)
