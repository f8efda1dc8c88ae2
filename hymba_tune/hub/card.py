"""Writes the model card: what a model is, its lineage, its training, and its use."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from hymba_tune import __version__
from hymba_tune.config import ExportConfig
from hymba_tune.data.readers import KINDS, kind
from hymba_tune.errors import ConfigError, command
from hymba_tune.hub.lineage import CARD, Lineage
from hymba_tune.quant import Damage
from hymba_tune.registry import NANO, hub_name
from hymba_tune.report import RunRecord, judge, loss_picture

PRIVATE = {"model", "data", "eval_data", "device", "chat_template", "track", "kernels"}
"""Settings with names of the machine of the run. The card names data files without their folders."""
HUB_DATA = re.compile(r"[\w.-]+/[\w.-]+")
PROMPT = """\
prompt = tokenizer.apply_chat_template(
    [{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)"""
ANSWER = """\
answer = model.generate(**prompt, max_new_tokens=200)
print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))"""
CODE = {
    "kit": """\
With {needs}, on a CPU or a GPU; the code next to the weights is hymba-tune's (Apache-2.0):
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
{prompt}
{answer}
```
""",
    "hymba": """\
The configuration is for the code of NVIDIA's release, which transformers 4.44 downloads and which needs CUDA:
```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", torch_dtype=torch.bfloat16, trust_remote_code=True).cuda()
tokenizer = AutoTokenizer.from_pretrained("{name}")
{prompt}.to("cuda")
{answer}
```
""",
    "adapter": """\
```python
import hymba_tune.model  # registers Hymba with transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({base})
model = PeftModel.from_pretrained(model, "{name}")
```
""",
}


def write_card(
    folder: Path,
    name: str,
    lineage: Lineage,
    config: ExportConfig,
    *,
    size: str,
    quantized: bool = False,
    damage: Damage | None = None,
) -> None:
    """Write ``README.md`` and, for a model that a run trained, a plot of its loss.

    Args:
        folder: An existing folder.
        name: The name under which the model will be loaded.
        lineage: The lineage of the model.
        config: The settings of the export.
        size: The number of parameters and their dtype, in words.
        quantized: Whether the weights are quantized.
        damage: The cost of the quantization, if it was measured.
    """
    head = {name: value for name, value in _head(lineage, config, quantized=quantized).items() if value}
    needs = "torch, transformers 5, accelerate and bitsandbytes" if quantized else "torch and transformers 5"
    code = CODE["adapter" if config.adapter_only else config.format].format(
        name=name, base=_base_arguments(lineage), needs=needs, prompt=PROMPT, answer=ANSWER
    )
    relation = "An adapter for" if config.adapter_only else "Made from"
    lines = [
        *("---", yaml.safe_dump(head, sort_keys=False, allow_unicode=True).rstrip(), "---"),
        *("", f"# {name.rpartition('/')[2]}", ""),
        f"{relation} {lineage.base or 'a Hymba model'}, a Hymba: attention heads and Mamba heads side by side "
        "([arXiv 2411.13676](https://arxiv.org/abs/2411.13676)).",
        *("", f"{size}.", *(["", _cost(damage)] if damage else []), "", "## Use", "", code),
        f"With hymba-tune: `{command('chat', name)}`",
    ]
    for number, run in enumerate(lineage.runs):
        lines += ["", *_training(run, folder, number)]
    license = lineage.license.get("license_name") or lineage.license.get("license")
    if license:
        link = lineage.license.get("license_link")
        lines += ["", "## License", "", f"The weights: {f'[{license}]({link})' if link else license}."]
    lines += ["", f"Exported by hymba-tune {__version__}; checksums are in SHA256SUMS."]
    (folder / CARD).write_text("\n".join(lines) + "\n", encoding="utf-8")


def check_publishable(lineage: Lineage) -> None:
    """Check that the card of a model would name what a published card must name.

    Raises:
        ConfigError: If the base model or its license is not known.
    """
    if not lineage.base:
        raise ConfigError(
            "--push: the base model of this model is not known.",
            expected="a base model, which the card of a published model must name",
            fix="--base-model nvidia/Hymba-1.5B-Base, or the model that this one was made from",
        )
    if not lineage.license.get("license"):
        raise ConfigError(
            f"--push: the license of {lineage.base} is not known.",
            expected="the license of the weights, which the card of a published model must name",
            fix="--license with an id of the Hub, such as apache-2.0",
        )


def _head(lineage: Lineage, config: ExportConfig, *, quantized: bool) -> dict[str, Any]:
    """Return the card's metadata, which the Hub reads."""
    relation = "adapter" if config.adapter_only else "quantized" if quantized else "finetune"
    data_names = (name for run in lineage.runs for name in run.settings.get("data", []))
    return {
        **lineage.license,
        "base_model": lineage.base,
        "base_model_relation": relation if lineage.base and (lineage.runs or quantized) else None,
        "library_name": "peft" if config.adapter_only else "transformers",
        "pipeline_tag": "text-generation",
        "datasets": list(dict.fromkeys(HUB_DATA.match(name)[0] for name in data_names if _on_the_hub(name))),  # type: ignore[index]
        "tags": ["hymba", "hymba-tune"],
    }


def _base_arguments(lineage: Lineage) -> str:
    """Return the arguments with which `from_pretrained` loads the base model of an adapter."""
    name, revision = hub_name(lineage.adapter_base or "path/to/its/base/model")
    if name == NANO:
        return f'next(iter(hymba_tune.__path__)) + "/assets/{NANO}"'
    return f'"{name}"' + (f', revision="{revision}"' if revision else "")


def _cost(damage: Damage) -> str:
    return (
        f"Quantized to {damage.scheme} by bitsandbytes. {damage.sentence} Left in {damage.dtype}: "
        f"{', '.join(damage.kept)}. The reasons and all measurements are in damage.json and damage.html."
    )


def _on_the_hub(name: str) -> bool:
    path = Path(name)
    return bool(HUB_DATA.match(name)) and kind(path) not in (*KINDS, ".yaml") and not path.exists()


def _training(run: RunRecord, folder: Path, number: int) -> list[str]:
    """Describe a run, its result and its settings; run 0 is the last one."""
    facts = run.facts
    verdict = judge(run)
    data = facts.get("data", {})
    names = [name if _on_the_hub(name) else Path(name).name for name in run.settings.get("data", [])]
    counts = [f"{value:,} {name.replace('_', ' ')}" for name, value in data.items() if isinstance(value, int) and value]
    lines = [
        f"## {'Training' if not number else 'Before that'}: {run.verb}",
        *("", verdict.sentence, ""),
        *_table(["", "", ""], [list(figure) for figure in verdict.figures]),
    ]
    if (plot := loss_picture(run)) is not None:
        description, picture = plot
        file = f"loss{number or ''}.png"
        (folder / file).write_bytes(picture)
        lines += ["", f"![{description}]({file})"]
    steps = f"{facts.get('steps', run.last_step):,} steps, {facts.get('tokens_seen', 0):,} tokens"
    lines += ["", f"Data: {', '.join(names)} ({'; '.join(counts)}); SHA-256 of the encoded rows: {_fingerprint(data)}."]
    lines += ["", f"{steps}. Settings, as a recipe for `hymba-tune {run.verb} --config`:", "", "```yaml"]
    settings = {name: value for name, value in run.settings.items() if name not in PRIVATE}
    return [*lines, yaml.safe_dump(settings, sort_keys=False).rstrip(), "```"]


def _fingerprint(data: dict[str, Any]) -> str:
    return str(data.get("fingerprint", "not recorded"))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]
