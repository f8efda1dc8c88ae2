"""An exported folder loads with only torch and transformers installed, and is the same model."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hymba_tune.checkpoint import load_tokenizer
from hymba_tune.config import ExportConfig
from hymba_tune.data import Conversation, Message, encode_prompt, with_chat_template
from hymba_tune.hub import export
from tests.cli.conftest import Command
from tests.hub.elsewhere import Elsewhere
from tests.hub.silent import silent
from tests.runs import SMALL, run, save_model, settings
from tests.tiny import tiny_model

pytestmark = pytest.mark.end_to_end

PROMPTS = [" Two spaces  and a line\n", "Hello", "naïve ☃ </s> x = [1, 2]"]
PROGRAM = """
import json, sys
from importlib.util import find_spec
from pathlib import Path

folder, *prompts = sys.argv[1:]
assert not [name for name in ("hymba_tune", "peft", "trl", "datasets") if find_spec(name)]

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
batch = tokenizer(prompts, return_tensors="pt", padding=True)
with torch.inference_mode():
    logits = model(**batch).logits
written = model.generate(**batch, max_new_tokens=5, do_sample=False)
chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
backends = sys.modules[type(model).__module__.rpartition(".")[0] + ".backends"]
taken = {name: choice.taken for name, choice in backends.survey(backends.Task("cpu", torch.float32)).items()}
save_file({"logits": logits, "written": written}, "result.safetensors")
print(json.dumps({"ids": tokenizer(prompts)["input_ids"], "chat": chat["input_ids"], "taken": taken}))
if not hasattr(model.config, "quantization_config"):  # transformers cannot save such a model
    model.save_pretrained("again")  # as for further training
    assert AutoModelForCausalLM.from_pretrained("again", trust_remote_code=True).config.auto_map
"""

TRAINER = """
import json, sys

from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

folder, *prompts = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
rows = [{"input_ids": ids, "labels": ids} for ids in tokenizer(prompts)["input_ids"]]
arguments = TrainingArguments("out", per_device_eval_batch_size=1, use_cpu=True, report_to="none", disable_tqdm=True)
trainer = Trainer(model, arguments, eval_dataset=rows)
loss = trainer.evaluate()["eval_loss"]
shapes = [list(trainer.predict(rows[:1]).predictions.shape)]
batch = tokenizer(prompts[:1], return_tensors="pt")
layers = AutoModel.from_pretrained(folder, trust_remote_code=True)
assert type(layers).__module__.startswith("transformers_modules."), type(layers).__module__
same = bool((layers(**batch).last_hidden_state == model.model(**batch).last_hidden_state).all())
print(json.dumps({"loss": loss, "shapes": shapes, "kind": type(layers).__name__, "same": same}))
"""

HEADS = """
import sys

import torch
import transformers

folder, head = sys.argv[1:]
auto_class = getattr(transformers, "AutoModelFor" + head)
model = auto_class.from_pretrained(folder, trust_remote_code=True, num_labels=3)
logits = model(torch.tensor([[5, 6, 7, 8], [9, 6, 7, 8]])).logits
print(type(model).__module__, tuple(logits.shape))
"""
QUIET = """
import logging

from transformers.utils import logging as transformers_logging


class Refuse(logging.Handler):
    def emit(self, record):
        raise AssertionError(record.getMessage())


transformers_logging.add_handler(Refuse(logging.WARNING))
"""
OLD = ("transformers==4.44.2", "tokenizers==0.19.1", "numpy<2", "jinja2")
"""The libraries of NVIDIA's code. Without torch they read tokenizers and configurations, and generate nothing."""
READER = """
import json, sys

import tokenizers, transformers
from transformers import AutoTokenizer, GenerationConfig

folder, *prompts = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
batch = tokenizer(prompts, padding=True)
chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
print(json.dumps({
    "versions": [transformers.__version__, tokenizers.__version__],
    "batch": dict(batch),
    "texts": tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True),
    "chat": tokenizer.apply_chat_template(chat, add_generation_prompt=True),
    "prompt": list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)),
    "special": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
    "end": GenerationConfig.from_pretrained(folder).eos_token_id,
}))
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Elsewhere:
    return Elsewhere(tmp_path_factory.mktemp("elsewhere") / "env", "torch", "transformers")


@pytest.fixture(scope="module")
def old_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Elsewhere:
    return Elsewhere(tmp_path_factory.mktemp("old") / "env", downloaded=OLD)


@pytest.fixture(scope="module")
def exported(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "small"
    return export(ExportConfig(model=str(small_model), out=out), silent).folder


@pytest.mark.parametrize("compiler", ["c++", "/no/such/compiler"])
def test_export_loads_with_only_torch_and_transformers(
    compiler: str, elsewhere: Elsewhere, exported: Path, small_model: Path
) -> None:
    variables = {} if compiler == "c++" else {"CXX": compiler}
    output = json.loads(elsewhere.run(PROGRAM, exported, *PROMPTS, **variables).splitlines()[-1])
    tokenizer = with_chat_template(load_tokenizer(small_model))
    assert output["ids"] == tokenizer(PROMPTS)["input_ids"]
    assert output["chat"] == encode_prompt(Conversation((Message("user", "Hi"),)), tokenizer)
    assert ("native" in output["taken"].values()) == (compiler == "c++"), output["taken"]

    model = AutoModelForCausalLM.from_pretrained(small_model)
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    with torch.inference_mode():
        logits = model(**batch).logits
    saved = load_file(elsewhere.folder / "result.safetensors")
    assert torch.equal(saved["written"], model.generate(**batch, max_new_tokens=5, do_sample=False))
    torch.testing.assert_close(saved["logits"], logits, rtol=0, atol=0 if compiler == "c++" else 1e-4)


def test_export_is_evaluated_by_transformers_trainer(exported: Path, small_model: Path, tmp_path: Path) -> None:
    environment = Elsewhere(tmp_path / "env", "torch", "transformers", "accelerate")
    output = json.loads(environment.run(TRAINER, exported, *PROMPTS).splitlines()[-1])
    tokenizer, model = load_tokenizer(small_model), AutoModelForCausalLM.from_pretrained(small_model)
    rows = [torch.tensor([ids]) for ids in tokenizer(PROMPTS)["input_ids"]]
    with torch.inference_mode():
        losses = [model(row, labels=row).loss.item() for row in rows]
    assert output["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert output["shapes"] == [[1, rows[0].shape[1], model.config.vocab_size]]
    assert (output["kind"], output["same"]) == ("HymbaModel", True)


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info >= (3, 13), reason="tokenizers 0.19 has no wheels for this Python")
@pytest.mark.parametrize("model", ["small", "released"])
def test_libraries_of_nvidias_code_read_the_tokenizer(
    model: str, old_elsewhere: Elsewhere, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Needs the package index. The released tokenizer is a Llama's, whose texts start with a space."""
    folder = save_model(tmp_path / "small", torch.bfloat16)
    if model == "released":
        reference = request.getfixturevalue("shared") / "reference/hymba-1.5b-base"
        tiny_model(torch.bfloat16, **SMALL | {"vocab_size": 32001, "pad_token_id": 0}).save_pretrained(folder)
        load_tokenizer(reference).save_pretrained(folder)
    exported = export(ExportConfig(model=str(folder), out=tmp_path / "out", format="hymba"), silent).folder
    output = json.loads(old_elsewhere.run(READER, exported, *PROMPTS).splitlines()[-1])

    tokenizer = with_chat_template(load_tokenizer(folder))
    batch = tokenizer(PROMPTS, padding=True)
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert output == {
        "versions": ["4.44.2", "0.19.1"],
        "batch": dict(batch),
        "texts": tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True),
        "chat": tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"],
        "prompt": ["input_ids", "attention_mask"],
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
        "end": tokenizer.eos_token_id,
    }


def test_trained_merged_quantized_and_exported_model_loads_without_hymba_tune(
    command: Command, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run(settings(Path("hymba-nano"), questions, tmp_path / "run", quantize="nf4", steps=2, eval_split=0))
    for words in (
        ("merge", "run", "--out", "merged", "--dtype", "float32"),
        ("quantize", "merged", "--scheme", "nf4", "--out", "small"),
        ("export", "small", "--out", "mine"),
    ):
        done = command(*words)
        assert done.code == 0, done.err
    environment = Elsewhere(tmp_path / "env", "torch", "transformers", "accelerate", "bitsandbytes")
    output = json.loads(environment.run(PROGRAM, tmp_path / "mine", *PROMPTS).splitlines()[-1])
    saved = load_file(environment.folder / "result.safetensors")

    tokenizer = load_tokenizer(tmp_path / "mine")
    model = AutoModelForCausalLM.from_pretrained("mine")  # loaded alike, as bitsandbytes may compute in bfloat16
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    with torch.inference_mode():
        torch.testing.assert_close(saved["logits"], model(**batch).logits, rtol=0, atol=1e-4)
    assert torch.equal(saved["written"], model.generate(**batch, max_new_tokens=5, do_sample=False))
    assert output["chat"] == encode_prompt(Conversation((Message("user", "Hi"),)), tokenizer)

    answered = command("chat", "mine", "--prompt", "I see two cats. What do I see?", "--max-new-tokens", 4)
    assert answered.code == 0, answered.err
    assert answered.out.strip()


def test_the_example_of_the_card_asks_nothing_and_warns_of_nothing(exported: Path, elsewhere: Elsewhere) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (exported / "README.md").read_text(), re.S)
    program = example.replace('"small"', repr(str(exported))).replace("max_new_tokens=200", "max_new_tokens=3")
    assert elsewhere.run(QUIET + program)  # a question would end it, as there is nobody to answer


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification"])
def test_exported_layers_carry_a_new_head(head: str, exported: Path, elsewhere: Elsewhere) -> None:
    written = elsewhere.run(HEADS, exported, head).splitlines()[-1]
    assert written.startswith("transformers_modules.")
    assert written.endswith("(2, 3)" if head.startswith("Sequence") else "(2, 4, 3)")
