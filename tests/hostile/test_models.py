"""Models, adapters, templates and runs that are torn, that lie or that belong to something else."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hymba_tune.cli.main import main
from tests.hostile.trying import Attempt, check

pytestmark = pytest.mark.end_to_end

Damage = Callable[[Path], object]


def write(name: str, content: bytes | str) -> Damage:
    """Replace a file."""
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def remove(name: str) -> Damage:
    """Delete a file."""
    return lambda folder: (folder / name).unlink()


def cut(name: str, size: int) -> Damage:
    """Cut a file to its first bytes, or by some bytes if the size is negative."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def change(name: str, **values: Any) -> Damage:
    """Change values of a JSON object."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | values))

    return damage


def header(change_entry: Callable[[dict[str, Any]], object]) -> Damage:
    """Change the header of the weights, all of its bytes kept in their places."""

    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        entries = json.loads(content[8 : 8 + length])
        change_entry(entries)
        changed = json.dumps(entries).encode()
        path.write_bytes(struct.pack("<Q", len(changed)) + changed + content[8 + length :])

    return damage


def entry(**values: Any) -> Damage:
    """Change the entry of the final norm's weight."""
    return header(lambda entries: entries["model.final_layernorm.weight"].update(values))


CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "num_memory_tokens", "mamba_d_conv")
MODELS: dict[str, Damage] = {
    "no config": remove(CONFIG),
    "empty config": write(CONFIG, ""),
    "config of nothing": write(CONFIG, "{}"),
    "config is a list": write(CONFIG, "[]"),
    "config is a text": write(CONFIG, '"hymba"'),
    "config is torn": cut(CONFIG, 100),
    "config is binary": write(CONFIG, bytes(range(256))),
    "another model": change(CONFIG, model_type="llama"),
    "no model type": change(CONFIG, model_type=None),
    "quantized by another": change(CONFIG, quantization_config={"quant_method": "gptq", "bits": 4}),
    "quantized as a text": change(CONFIG, quantization_config="nf4"),
    **{f"{size} {value}": change(CONFIG, **{size: value}) for size in SIZES for value in (-1, "many", 2.5, 10**12)},
    **{f"sliding_window {value}": change(CONFIG, sliding_window=value) for value in (0, -1, "wide", 2.5)},
    "layers of attention beyond the last": change(CONFIG, global_attn_idx=[99]),
    "layers of attention as a text": change(CONFIG, global_attn_idx="all"),
    "groups that overlap": change(CONFIG, kv_reuse_group=[[0, 1], [1, 2]]),
    "no weights": remove(WEIGHTS),
    "empty weights": write(WEIGHTS, b""),
    "eight bytes": write(WEIGHTS, b"\0" * 8),
    "text as weights": write(WEIGHTS, "version https://git-lfs.github.com/spec/v1"),
    "header longer than the file": write(WEIGHTS, struct.pack("<Q", 2**62) + b"{}"),
    "header is a list": write(WEIGHTS, struct.pack("<Q", 2) + b"[]"),
    "header is not UTF-8": write(WEIGHTS, struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc"),
    "weights cut short": cut(WEIGHTS, -100),
    "another name": header(lambda entries: entries.update(other=entries.pop("model.final_layernorm.weight"))),
    "no offsets": header(lambda entries: entries["model.final_layernorm.weight"].pop("data_offsets")),
    "negative offsets": entry(data_offsets=[-128, 0]),
    "backward offsets": entry(data_offsets=[128, 0]),
    "offsets past the end": entry(data_offsets=[0, 2**50]),
    "offsets of others": entry(data_offsets=[0, 128]),
    "fractional offsets": entry(data_offsets=[0.5, 128.5]),
    "offsets as a text": entry(data_offsets="all"),
    "a wrong shape": entry(shape=[31]),
    "a negative shape": entry(shape=[-32]),
    "a huge shape": entry(shape=[2**62, 4]),
    "integers": entry(dtype="I32"),
    "booleans": entry(dtype="BOOL", shape=[128]),
    "no such number format": entry(dtype="F31"),
    "an index of nothing": lambda folder: (
        (folder / WEIGHTS).unlink(),
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc/passwd"}}'),
    ),
    "no tokenizer": lambda folder: [file.unlink() for file in folder.glob("tokenizer*")],
    "torn tokenizer": cut(TOKENIZER, 1000),
    "tokenizer of nothing": write(TOKENIZER, "{}"),
    "template that is torn": write("chat_template.jinja", "{% for message in messages %}"),
    "template that divides by zero": write("chat_template.jinja", "{{ 1 / 0 }}"),
    "template that recurses": write("chat_template.jinja", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}"),
    "template that reads files": write("chat_template.jinja", "{% include '/etc/passwd' %}"),
    "template without an end": write(
        "chat_template.jinja",
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ '' }}{% endfor %}{% endfor %}",
    ),
    "template that calls Python": write("chat_template.jinja", "{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    "template of undefined": write("chat_template.jinja", "{{ nothing.at.all }}"),
}


def copy(folder: Path, out: Path) -> Path:
    """A copy of a folder that may be damaged."""
    shutil.copytree(folder, out)
    return out


def test_models_that_cannot_be_used(small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attempts = []
    for number, (name, damage) in enumerate(MODELS.items()):
        damage(copy(small_model, tmp_path / f"model-{number}"))
        words = ["chat", str(tmp_path / f"model-{number}"), "--prompt", "a", "--max-new-tokens", "1"]
        attempts.append((name, Attempt(words, "(?i)model|config|weights|tokenizer|template")))
    check(attempts, capsys)


ADAPTER, RUN = "adapter/adapter_config.json", "run.json"
RUNS: dict[str, tuple[Damage, str]] = {
    **{
        f"adapter with {key} {value!r}": (change(ADAPTER, **{key: value}), "chat")
        for key, value in (
            *(("r", value) for value in (0, -1, "eight", 2.5, None, [4])),
            *(("lora_alpha", value) for value in ("much", [8], 1e308)),
            *(("target_modules", value) for value in (3, [], ["nothing"], {"a": 1}, [1, 2])),
            *(("peft_type", value) for value in ("NONSENSE", 3, None, "PREFIX_TUNING")),
            *(("base_model_name_or_path", value) for value in (3, ["a"])),
            *(("rank_pattern", value) for value in (3, {"a": "b"})),
            *(("modules_to_save", value) for value in (3, ["nothing"])),
            ("bias", "perhaps"),
            ("init_lora_weights", "nonsense"),
            ("layers_to_transform", "all"),
        )
    },
    "adapter settings torn": (cut(ADAPTER, 30), "chat"),
    "adapter settings are a list": (write(ADAPTER, "[]"), "chat"),
    "no adapter settings": (remove(ADAPTER), "chat"),
    "no adapter weights": (remove("adapter/adapter_model.safetensors"), "chat"),
    "adapter weights cut": (cut("adapter/adapter_model.safetensors", -50), "chat"),
    "adapter weights empty": (write("adapter/adapter_model.safetensors", b""), "chat"),
    "adapter settings torn, merged": (cut(ADAPTER, 30), "merge"),
    "adapter weights cut, merged": (cut("adapter/adapter_model.safetensors", -50), "merge"),
    "no settings": (remove("config.yaml"), "resume"),
    "settings torn": (cut("config.yaml", 40), "resume"),
    "settings are a list": (write("config.yaml", "[]"), "resume"),
    "settings of another verb": (write("config.yaml", "verb: nonsense\n"), "resume"),
    "settings of an older version": (write("config.yaml", "verb: kto\ngood_weight: 2.0\n"), "resume"),
    "settings with a bad value": (write("config.yaml", "verb: sft\nrank: -3\n"), "resume"),
    "no checkpoints": (lambda folder: shutil.rmtree(folder / "checkpoints"), "resume"),
}
OPEN = {"adapter with target_modules []"}
COMMANDS = {
    "chat": ["chat", "{}", "--prompt", "a", "--max-new-tokens", "1"],
    "merge": ["merge", "{}", "--out", "{}-merged"],
    "resume": ["sft", "--resume", "{}", "--steps", "99"],
}


def test_runs_that_cannot_be_used(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attempts = []
    for number, (name, (damage, verb)) in enumerate(RUNS.items()):
        folder = copy(finished_run, tmp_path / f"run-{number}")
        damage(folder)
        words = [word.replace("{}", str(folder)) for word in COMMANDS[verb]]
        attempts.append((name, Attempt(words, "(?i)adapter|config|checkpoint|run|model", refused=name not in OPEN)))
    check(attempts, capsys)


TORN: dict[str, Damage] = {
    "facts torn": cut(RUN, 50),
    "facts empty": write(RUN, ""),
    "facts are a list": write(RUN, "[]"),
    "no facts": remove(RUN),
    "facts NUL": write(RUN, b"\0" * 100),
    "metrics torn": cut("metrics.jsonl", -20),
    "metrics empty": write("metrics.jsonl", ""),
    "metrics NUL": write("metrics.jsonl", b"\0" * 1000),
    "metrics of texts": write("metrics.jsonl", '{"step": "one", "loss": "big"}\n'),
    "metrics of lists": write("metrics.jsonl", "[1]\n3\nnull\n"),
    "metrics NaN": write("metrics.jsonl", '{"step": 1, "loss": NaN}\n'),
    "no metrics": remove("metrics.jsonl"),
    "samples torn": cut("samples.json", 20),
    "samples are numbers": write("samples.json", "[1, 2]"),
    "samples are a map": write("samples.json", "{}"),
    "updates torn": cut("updates.json", 20),
    "settings torn": cut("config.yaml", 40),
    "escape sequences": write(
        "samples.json", '[{"prompt": "\\u001b[2J", "before": "\\u001b]0;x\\u0007", "after": "a"}]'
    ),
}


def test_reports_of_torn_runs(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attempts = []
    for number, (name, damage) in enumerate(TORN.items()):
        folder = copy(finished_run, tmp_path / f"run-{number}")
        damage(folder)
        attempts.append((name, Attempt(["report", str(folder)], f"run-{number}", refused=False)))
    check(attempts, capsys)


CACHED: dict[str, Damage] = {
    **{
        f"{name} {kind}": damage
        for name in ("rows.arrow", "report.json", "dropped.jsonl")
        for kind, damage in {
            "cut": cut(name, -9),
            "empty": write(name, ""),
            "NUL": write(name, b"\0" * 1000),
            "of something else": write(name, "[1, 2]"),
            "gone": remove(name),
            "is a folder": lambda folder, name=name: ((folder / name).unlink(), (folder / name).mkdir()),
        }.items()
    },
    "a byte in the middle": lambda folder: flip(folder / "rows.arrow"),
    "no seal": remove("whole"),
}


def flip(path: Path) -> None:
    """Change one byte in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def test_damaged_cache_is_made_anew(
    small_model: Path,
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    words = ["sft", "--model", str(small_model), "--data", str(questions), "--dry-run", "--out", str(tmp_path / "new")]
    with pytest.raises(SystemExit):
        main(words)
    tokens = re.search(r"conversations · [\d,]+ tokens, \d+% learned", capsys.readouterr().out)
    assert tokens is not None
    (entry_folder,) = (tmp_path / "hymba-tune" / "data").iterdir()
    for name, damage in CACHED.items():
        damage(entry_folder)
        check([(name, Attempt(words, re.escape(tokens[0]), refused=False))], capsys)
