"""A run's model card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hymba_tune.config import TrainingConfig
from hymba_tune.errors import command
from hymba_tune.files import write_text
from hymba_tune.registry import hub_name
from hymba_tune.train.run import Run
from hymba_tune.train.screen import MetricsRow


def write_card(run: Run, config: TrainingConfig, summary: Sequence[str]) -> None:
    """Write ``README.md``: the model and its data, the held-out results, and how to use the run.

    Args:
        run: The run, with its facts recorded.
        config: The run's settings.
        summary: The amount of data, in words.
    """
    facts = run.facts()
    evaluations = list(run.evaluations())
    trained = "model" if run.model.is_dir() else "adapter"
    is_folder = Path(config.model).expanduser().is_dir()
    base = config.model if is_folder else hub_name(config.model)[0]  # a card names no revision
    how = config.method.value + (f" on weights quantized to {facts['quantized']}" if facts.get("quantized") else "")
    lines = [
        *("---", f"base_model: {base}", "library_name: transformers", "tags: [hymba, hymba-tune]", "---"),
        *("", f"# {run.name}", ""),
        f"{config.model}, trained by hymba-tune {config.verb} ({how}) on {', '.join(config.data)}.",
        "",
    ]
    if evaluations:
        final = next((row for row in evaluations if row.step == facts["kept"]["step"]), evaluations[-1])
        lines += [*_table(evaluations[0], final), ""]
    if "before" in (answers := facts.get("answers", {})):
        lines += [
            f"Right answers to the {answers['questions']:,} held-out prompts: {answers['before']:,} before training, "
            f"{answers['after']:,} after.",
            "",
        ]
    data = facts["data"]
    lines += [
        f"Data: {data['rows']:,} rows; {' · '.join(summary)}; SHA-256 of the encoded rows {data['fingerprint']}.",
        f"Training: {facts['steps']:,} steps, {facts['tokens_seen']:,} tokens; all settings are in config.yaml.",
        "",
        f"The {trained}/ folder holds the {trained}. {_how_to_use(run, config, trained)}",
    ]
    write_text(run.path / "README.md", "\n".join(lines) + "\n")


def _how_to_use(run: Run, config: TrainingConfig, trained: str) -> str:
    if not config.verb.scores:
        return f"Chat with it: `{command('chat', run.path)}`"
    options = "" if trained == "model" else ", num_labels=1"
    loader = {
        "model": "from transformers import AutoModelForSequenceClassification as Model, AutoTokenizer",
        "adapter": "from peft import AutoPeftModelForSequenceClassification as Model\n"
        "from transformers import AutoTokenizer",
    }
    return f"""It gives a conversation with its answer one score, the higher the better:
```python
import hymba_tune  # transformers' Auto classes now know Hymba
{loader[trained]}

folder = {str(run.path / trained)!r}
model, tokenizer = Model.from_pretrained(folder{options}).eval(), AutoTokenizer.from_pretrained(folder)
conversation = [{{"role": "user", "content": "Who are you?"}}, {{"role": "assistant", "content": "A reward model."}}]
text = tokenizer.apply_chat_template(conversation, return_tensors="pt", return_dict=True)
print(model(**text).logits.item())
```"""


def _table(first: MetricsRow, last: MetricsRow) -> list[str]:
    """Return a table of the first and the last evaluation."""
    columns = {"eval_loss": "loss" if last.eval_accuracy is not None else "nats a token"}
    columns |= {"eval_accuracy": "accuracy", "eval_margin": "margin of rewards"}
    columns |= {"eval_distillation": "from the teacher", "eval_bits_per_byte": "bits per byte"}
    values = [row.as_columns() for row in (first, last)]
    if "eval_reward" in values[-1]:
        columns = {"eval_reward": "reward", "eval_answer_tokens": "tokens of an answer"}
    known = [name for name in columns if name in values[-1]]
    lines = [f"| held-out | step | {' | '.join(columns[name] for name in known)} |", "|---" * (2 + len(known)) + "|"]
    for when, row in zip(("before", "after"), values, strict=True):
        cells = (f"{row.get(name, 0.0):.4f}" for name in known)
        lines.append(f"| {when} | {row['step']} | {' | '.join(cells)} |")
    return lines
