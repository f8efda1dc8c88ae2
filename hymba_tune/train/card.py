"""A run's model card."""

from __future__ import annotations

from hymba_tune.config import TrainingConfig
from hymba_tune.train.run import Run


def write_card(run: Run, config: TrainingConfig) -> None:
    """Write ``README.md``: what was trained on what, how it did, and how to use it."""
    facts, evaluations = run.facts(), list(run.evaluations())
    trained = "model" if run.model.is_dir() else "adapter"
    lines = [
        *("---", f"base_model: {config.model}", "library_name: transformers", "tags: [hymba, hymba-tune]", "---"),
        *("", f"# {run.name}", ""),
        f"{config.model}, fine-tuned with hymba-tune ({config.method.value}) on {', '.join(config.data)}.",
        "",
    ]
    if evaluations:
        first, kept = evaluations[0], facts["kept"]
        lines += [
            *("| held-out loss | step | nats a token |", "|---|---|---|"),
            f"| before | {first.step} | {first.eval_loss:.4f} |",
            f"| after | {kept['step']} | {kept['eval_loss']:.4f} |",
            "",
        ]
    data = facts["data"]
    lines += [
        f"Data: {data['rows']:,} rows, {data['tokens']:,} tokens, {data['learned']:,} of them learned; "
        f"SHA-256 of the encoded rows {data['fingerprint']}.",
        f"Training: {facts['steps']:,} steps, {facts['tokens_seen']:,} tokens; all settings are in config.yaml.",
        "",
        f"The {trained}/ folder holds the {trained}. Chat with it: `hymba-tune chat {run.path}`",
    ]
    (run.path / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
