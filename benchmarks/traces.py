"""Short runs of every verb, whose losses, answers and weights must not change when only the code is refactored.

    python benchmarks/traces.py record before.json       # before the change
    python benchmarks/traces.py record after.json        # after it, on the same machine
    python benchmarks/traces.py compare before.json after.json

The runs use the command line, hymba-nano and the packaged demo, on a CPU with one thread. On one machine they are
reproducible bit for bit. ``compare`` prints each number that differs, and exits with 1 if there is any.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, set_seed

import hymba_tune.assets

DEMO = Path(hymba_tune.assets.__file__).parent / "demo"

console = Console()
MACHINE = ("tokens_per_s", "memory_bytes")
"""Columns of metrics.jsonl that depend on the machine."""
SHORT = ["--model", "hymba-nano", "--device", "cpu", "--steps", "6", "--log-every", "1", "--eval-max-rows", "24"]
SFT = ["sft", "--data", "demo", *SHORT]
FP32 = ["--dtype", "float32"]
BF16 = ["--dtype", "bfloat16"]
UNTRAINED = ["--min-teacher-probability", "0", "--min-end-probability", "0"]
"""Flags for a teacher that knows nothing."""


def main() -> int:
    """Record or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    record_parser = verbs.add_parser("record", help="run everything and write the results")
    record_parser.add_argument("out", type=Path)
    record_parser.add_argument("--only", help="run only those whose name contains this, and sft")
    compare_parser = verbs.add_parser("compare", help="print the differences")
    compare_parser.add_argument("before", type=Path)
    compare_parser.add_argument("after", type=Path)
    parsed = parser.parse_args()
    if parsed.verb == "record":
        with tempfile.TemporaryDirectory() as folder:
            results = record(Path(folder), parsed.only or "")
        parsed.out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return 0
    before, after = (json.loads(path.read_text(encoding="utf-8")) for path in (parsed.before, parsed.after))
    differences = list(compare(before, after))
    lines = differences or [f"{len(before)} runs: equal"]
    console.print("\n".join(lines), markup=False, soft_wrap=True)
    return 1 if differences else 0


def runs(folder: Path) -> dict[str, list[str]]:
    """The command line of each run; a run comes after those that it needs."""
    labeled = folder / "labeled.jsonl"
    pairs = folder / "pairs.jsonl"
    questions = folder / "questions.jsonl"
    teacher = ["--data", "demo", *SHORT, *FP32, *UNTRAINED, "--teacher", str(folder / "llama")]
    same = ["--data", "demo", *SHORT, *FP32, *UNTRAINED, "--teacher", str(folder / "sft")]
    return {
        "sft": [*SFT, *FP32],
        "sft-bfloat16": [*SFT, *BF16],
        "sft-packed": [*SFT, *FP32, "--packing", "--max-length", "256"],
        "sft-accumulated": [*SFT, *FP32, "--batch-size", "3", "--grad-accum", "2"],
        "sft-dora": [*SFT, *FP32, "--method", "dora"],
        "sft-full": [*SFT, *FP32, "--method", "full"],
        "sft-nf4": [*SFT, *BF16, "--quantize", "nf4"],
        "dpo": ["dpo", "--data", str(pairs), *SHORT, *FP32],
        "dpo-full": ["dpo", "--data", str(pairs), *SHORT, *FP32, "--method", "full"],
        "kto": ["kto", "--data", str(labeled), *SHORT, *FP32],
        "distill": ["distill", *teacher],
        "distill-online": ["distill", *same, "--online", "--loss", "jsd"],
        "distill-on-policy": ["distill", *same, "--on-policy", "0.5", "--answer-tokens", "16"],
        "distill-hidden": ["distill", *same, "--match-hidden", "cosine"],
        "eval": ["eval", str(folder / "sft"), "--base", "--data", "demo", "--out", str(folder / "eval.json")],
        "quantize": ["quantize", str(folder / "sft"), "--scheme", "int8", "--data", "demo", "--max-tokens", "2000"],
        "merge": ["merge", str(folder / "sft")],
        "chat": ["chat", str(folder / "merge"), "--from", str(questions), "--temperature", "0"],
    }


def record(folder: Path, only: str) -> dict[str, Any]:
    """Run everything; returns the results by the runs' names."""
    write_data(folder)
    save_teacher(folder / "llama")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(folder / "cache")}
    results: dict[str, Any] = {}
    for name, command in runs(folder).items():
        if only not in name and name != "sft":
            continue
        out = {"eval": [], "chat": ["--to", str(folder / "answers.jsonl")]}.get(name, ["--out", str(folder / name)])
        begin = time.monotonic()
        program = [sys.executable, "-c", "from hymba_tune.cli.main import main; main()"]
        process = subprocess.run(
            [*program, *command, *out], env=environment, capture_output=True, text=True, check=False
        )
        console.print(f"{name:<20} {time.monotonic() - begin:5.1f} s")
        if process.returncode:
            raise SystemExit(
                f"{name}: {' '.join(command)} exited with {process.returncode}\n{process.stdout}{process.stderr}"
            )
        results[name] = result_of(folder, name)
    return results


def result_of(folder: Path, name: str) -> dict[str, Any]:
    """The reproducible results of a run."""
    if name == "eval":
        facts = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
        for model in facts["models"]:
            del model["seconds"]
        return {"models": strip(facts)}
    if name == "chat":
        return {"answers": (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()}
    path = folder / name
    result: dict[str, Any] = {}
    if (path / "metrics.jsonl").is_file():
        lines = (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        result["metrics"] = [{key: value for key, value in row.items() if key not in MACHINE} for row in rows]
        result["samples"] = json.loads((path / "samples.json").read_text(encoding="utf-8"))
    weights = sorted(file for file in path.rglob("*.safetensors") if "checkpoints" not in file.parts)
    result["weights"] = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in weights}
    return result


def strip(value: Any) -> Any:
    """The floats of a JSON document in their order, without keys, which may be renamed, and without texts."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [part for part in map(strip, value) if part not in (None, [])]
    return value if isinstance(value, float) else None


def compare(before: Any, after: Any, where: str = "") -> Iterator[str]:
    """The differences between two records, one line each."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in [*before, *(key for key in after if key not in before)]:
            if key not in before or key not in after:
                yield f"{where}/{key}: only {'after' if key in after else 'before'}"
            else:
                yield from compare(before[key], after[key], f"{where}/{key}")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for number, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from compare(one, other, f"{where}/{number}")
    elif before != after:
        yield f"{where}: {before!r} -> {after!r}"


def write_data(folder: Path) -> None:
    """Write preference pairs, labeled answers and questions, derived from the packaged demo."""
    rows = [json.loads(line) for line in (DEMO / "train.jsonl").read_text(encoding="utf-8").splitlines()[:96]]
    conversations = [row["messages"] for row in rows if "messages" in row]
    prompts = [messages[:-1] for messages in conversations]
    answers = [messages[-1:] for messages in conversations]
    others = answers[1:] + answers[:1]
    pairs = [row for row in zip(prompts, answers, others, strict=True) if row[1] != row[2]]
    dump(folder / "pairs.jsonl", [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in pairs])
    both = [(prompt, answer, True) for prompt, answer in zip(prompts, answers, strict=True)]
    both += [(prompt, answer, False) for prompt, answer in zip(prompts, others, strict=True)]
    dump(folder / "labeled.jsonl", [dict(zip(("prompt", "completion", "label"), row, strict=True)) for row in both])
    dump(folder / "questions.jsonl", [{"prompt": prompt} for prompt in prompts[:4]])


def dump(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def save_teacher(folder: Path) -> None:
    """Save a random Llama with a byte-level tokenizer that is trained on the demo."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((DEMO / "train.jsonl").read_text(encoding="utf-8").splitlines(), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    set_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=600, **shape)).save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())
