"""Exports are complete, equal to the original model, and written as a whole or not at all."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hymba_tune.adapters import open_model
from hymba_tune.config import ChatConfig, ExportConfig
from hymba_tune.errors import CheckpointError, ConfigError
from hymba_tune.generate import Chat
from hymba_tune.hub import export
from hymba_tune.hub.checks import SUMS, check_sums
from hymba_tune.hub.layout import released_config
from hymba_tune.registry import resolve_model
from tests.hub.silent import silent
from tests.model.inputs import expected_names
from tests.runs import save_model, tensors

CPU = torch.device("cpu")
SINGLE = "model.safetensors"


def exported(model: Path | str, out: Path, **options: Any) -> Path:
    done = export(ExportConfig(model=str(model), out=out, **options), silent)
    assert done.folder == out
    assert done.difference == 0
    return out


def logits(folder: Path) -> torch.Tensor:
    model = open_model(resolve_model(str(folder)), dtype=torch.float32, device=CPU).eval()
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.arange(3, 30)[None]).logits
    return logits


def head(folder: Path) -> dict[str, Any]:
    return dict(yaml.safe_load((folder / "README.md").read_text().split("---")[1]))


@pytest.fixture(scope="module")
def folder(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a run, shared by the tests of this module, which must not change it."""
    out = tmp_path_factory.mktemp("exports") / "mine"
    return exported(finished_run, out, license="apache-2.0", base_model="hymba-nano")


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """A copy of the export that a test may damage."""
    return Path(shutil.copytree(folder, tmp_path / "broken"))


def test_exported_run_is_its_model_with_the_released_names(folder: Path, finished_run: Path) -> None:
    assert tensors(folder).keys() == expected_names(AutoConfig.from_pretrained(folder))
    assert torch.equal(logits(folder), logits(finished_run))
    assert [path.name for path in folder.parent.iterdir()] == ["mine"]


def test_answers_end_with_the_stop_token_and_prompts_follow_the_template(folder: Path, finished_run: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    generation = AutoModelForCausalLM.from_pretrained(folder).generation_config
    assert generation.eos_token_id == tokenizer.eos_token_id == 2
    assert generation.pad_token_id == tokenizer.pad_token_id
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(finished_run / "adapter").chat_template
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"is_local", "local_files_only"} & settings.keys()


def test_card_describes_the_model_and_not_the_machine(folder: Path, finished_run: Path) -> None:
    card = (folder / "README.md").read_text()
    facts = json.loads((finished_run / "run.json").read_text())
    assert head(folder) == {
        "license": "apache-2.0",
        "base_model": "hymba-nano",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["hymba", "hymba-tune"],
    }
    assert facts["data"]["fingerprint"] in card
    assert f"{facts['data']['rows']:,} rows" in card
    assert "questions.jsonl" in card
    assert "held-out loss before" in card
    assert "rank: 4" in card
    assert 'from_pretrained("mine", trust_remote_code=True)' in card
    assert "\nThe weights: apache-2.0.\n" in card
    assert "![Loss: " in card
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert str(finished_run.parent.parent) not in card
    assert str(Path.home()) not in card


def test_card_of_a_base_model_states_its_license_and_its_own_base(small_model: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(small_model, tmp_path / "base"))
    metadata = {"license": "other", "license_name": "mine", "license_link": "https://a.b/c", "base_model": ["me/it"]}
    (base / "README.md").write_text(f"---\n{yaml.safe_dump(metadata)}---\n# base\n")
    out = exported(base, tmp_path / "out")
    assert {name: head(out)[name] for name in metadata} == metadata | {"base_model": "me/it"}
    assert "The weights: [mine](https://a.b/c)." in (out / "README.md").read_text()
    (base / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(CheckpointError, match=r"The metadata of .*README\.md cannot be read"):
        exported(base, tmp_path / "other")


@pytest.fixture(scope="module")
def released_format(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export for NVIDIA's code, which tests must not change."""
    out = tmp_path_factory.mktemp("released") / "out"
    return exported(small_model, out, format="hymba", dtype="bfloat16", base_model="nvidia/Hymba-1.5B-Instruct@v2")


def test_hymba_format_suits_nvidias_code(released_format: Path, small_model: Path) -> None:
    out = released_format
    assert not list(out.glob("*.py"))
    assert not (out / "chat_template.jinja").exists()
    assert tensors(out).keys() == tensors(small_model).keys()
    config = json.loads((out / "config.json").read_text())
    assert config["auto_map"]["AutoConfig"] == "nvidia/Hymba-1.5B-Instruct--configuration_hymba.HymbaConfig"
    assert config["conv_dim"] == {"0": 64, "1": 64, "2": 64}
    assert config["torch_dtype"] == "bfloat16"


def test_hymba_format_has_a_tokenizer_for_tokenizers_0_19(released_format: Path, small_model: Path) -> None:
    settings = json.loads((released_format / "tokenizer_config.json").read_text())
    assert "chat_template" in settings
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    written, original = (
        json.loads((folder / "tokenizer.json").read_text()) for folder in (released_format, small_model)
    )
    pairs = original["model"]["merges"]
    assert written["model"].pop("merges") == [" ".join(pair) for pair in pairs]
    original["model"].pop("merges")
    assert written == original


def test_card_for_nvidias_code_loads_what_that_code_can_run(released_format: Path) -> None:
    card = (released_format / "README.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    compile(snippet, "README.md", "exec")
    assert 'from_pretrained("out", torch_dtype=torch.bfloat16, trust_remote_code=True).cuda()' in snippet
    assert 'tokenizer = AutoTokenizer.from_pretrained("out")\n' in snippet
    assert ').to("cuda")\nanswer = model.generate(**prompt' in snippet
    assert head(released_format)["base_model"] == "nvidia/Hymba-1.5B-Instruct"
    assert "@" not in card


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        ("float32", r"small would be written in float32, and NVIDIA's code cannot compute in it\.\n.*--dtype bfloat16"),
        ("no meta tokens", r"has no meta tokens, and the attention of NVIDIA's code fails without them"),
        ("space", r"tokenizer of .* merges \['a', ' b'\], and tokenizers 0\.19 reads no piece with a space"),
    ],
)
def test_what_nvidias_code_cannot_run_is_refused_before_the_weights_load(
    problem: str, message: str, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hymba_tune.hub.exports.open_model", lambda *_, **__: pytest.fail("the weights are loaded"))
    model = small_model
    if problem == "no meta tokens":
        model = save_model(tmp_path / "model", num_memory_tokens=0)
    if problem == "space":
        model = Path(shutil.copytree(small_model, tmp_path / "model"))
        tokenizer = json.loads((model / "tokenizer.json").read_text())
        tokenizer["model"]["vocab"] |= {" b": 4096, "a b": 4097}
        tokenizer["model"]["merges"].insert(0, ["a", " b"])
        (model / "tokenizer.json").write_text(json.dumps(tokenizer))
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"vocab_size": 4098}))
    dtype = "auto" if problem == "float32" else "bfloat16"
    with pytest.raises(ConfigError, match=rf"--format hymba: .*{message}"):
        exported(model, tmp_path / "out", format="hymba", dtype=dtype)
    assert not (tmp_path / "out").exists()


def test_float32_for_nvidias_code_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dtype: NVIDIA's code cannot compute in float32; use --dtype bfloat16"):
        ExportConfig(format="hymba", dtype="float32")


def test_hymba_format_has_the_released_keys_and_values(shared: Path) -> None:
    folder = shared / "reference/hymba-1.5b-base"
    released = json.loads((folder / "config.json").read_text())
    written = released_config(AutoConfig.from_pretrained(folder), "a/b")
    assert written.keys() == released.keys()
    differ = {name for name in released if written[name] != released[name]}
    # The repository of the code differs, and a coefficient that has no effect with one expert.
    assert differ == {"auto_map", "router_aux_loss_coef"}


def test_adapter_is_exported_without_its_base(finished_run: Path, small_model: Path, tmp_path: Path) -> None:
    out = exported(finished_run, tmp_path / "adapter", adapter_only=True)
    assert {file.name for file in out.iterdir()} >= {"adapter_model.safetensors", "tokenizer.json", "README.md", SUMS}
    assert not (out / SINGLE).exists()
    assert torch.equal(logits(out), logits(finished_run))
    with pytest.raises(CheckpointError, match=r"--adapter-only: .*small has no adapter\."):
        export(ExportConfig(model=str(small_model), out=tmp_path / "no", adapter_only=True), silent)


def test_adapter_of_another_run_is_not_exported_without_its_base(finished_run: Path, tmp_path: Path) -> None:
    upper = Path(shutil.copytree(finished_run / "adapter", tmp_path / "upper"))
    settings = json.loads((upper / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(finished_run)}
    (upper / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"the adapter .*upper is useless without its base model"):
        export(ExportConfig(model=str(upper), out=tmp_path / "out", adapter_only=True), silent)


def test_adapter_of_another_base_is_refused(finished_run: Path, tmp_path: Path) -> None:
    wrong = Path(shutil.copytree(finished_run / "adapter", tmp_path / "wrong"))
    settings = json.loads((wrong / "adapter_config.json").read_text()) | {"base_model_name_or_path": "hymba-nano"}
    (wrong / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"does not fit this model"):
        export(ExportConfig(model=str(wrong), out=tmp_path / "out"), silent)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("damage", ["cut", "zeroed"])
def test_corrupted_weights_are_refused_before_anything_is_written(damage: str, copied: Path, tmp_path: Path) -> None:
    whole = (copied / SINGLE).read_bytes()
    (copied / SINGLE).write_bytes(whole[:-9] if damage == "cut" else whole[:100] + bytes(len(whole) - 100))
    with pytest.raises(CheckpointError, match=r"model\.safetensors is (truncated|not a safetensors file)"):
        export(ExportConfig(model=str(copied), out=tmp_path / "out"), silent)
    assert not list(tmp_path.glob("out*"))


def test_folder_whose_model_differs_is_removed(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hymba_tune.hub import layout

    def damaged(model: Any, tokenizer: Any, folder: Path, *more: Any) -> None:
        layout.write_model(model, tokenizer, folder, *more)
        held = load_file(folder / SINGLE)
        save_file(held | {"model.memory_tokens": held["model.memory_tokens"] + 1}, folder / SINGLE, {"format": "pt"})

    monkeypatch.setattr("hymba_tune.hub.exports.write_model", damaged)
    with pytest.raises(CheckpointError, match=r"reloaded model differs from the one that was written: (.|\n)*at most"):
        export(ExportConfig(model=str(small_model), out=tmp_path / "out"), silent)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("problem", ["in use", "unwritable"])
def test_output_folder_is_checked_before_the_weights_load(
    problem: str, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hymba_tune.hub.exports.open_model", lambda *_, **__: pytest.fail("the weights are loaded"))
    (tmp_path / "file").write_text("mine")
    out = tmp_path if problem == "in use" else tmp_path / "file/out"
    with pytest.raises(ConfigError, match="exists and is not empty" if problem == "in use" else "cannot be written"):
        export(ExportConfig(model=str(small_model), out=out), silent)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_checksums_find_every_change(folder: Path, copied: Path) -> None:
    check_sums(folder)
    assert len((folder / SUMS).read_text().splitlines()) == len(list(folder.iterdir())) - 1
    (copied / "scan.py").write_text("import os")
    with pytest.raises(CheckpointError, match=r"scan\.py has changed since the export: its checksum differs"):
        check_sums(copied)
    (copied / "scan.py").unlink()
    with pytest.raises(CheckpointError, match=r"scan\.py is missing"):
        check_sums(copied)
    (copied / SUMS).write_text(f"{'0' * 64}  ../outside\n")
    with pytest.raises(CheckpointError, match=r"SHA256SUMS points outside its folder: 0+  \.\./outside"):
        check_sums(copied)


def test_default_folder_is_named_after_the_model(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert export(ExportConfig(model=str(small_model)), silent).folder == Path("exports/small")


def test_exported_model_gives_the_same_answers(folder: Path, finished_run: Path) -> None:
    answers = [
        Chat(ChatConfig(model=str(model), dtype="float32", temperature=0, max_new_tokens=6)).reply("I see two cats.")
        for model in (folder, finished_run)
    ]
    assert answers[0] == answers[1]
