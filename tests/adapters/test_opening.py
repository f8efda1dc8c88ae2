from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hymba_tune.adapters import load_adapter, merge_into, open_model
from hymba_tune.adapters.opening import base_of
from hymba_tune.config import MergeConfig
from hymba_tune.errors import CheckpointError, ConfigError
from hymba_tune.registry import resolve_model
from tests.tiny import random_texts
from tests.tolerances import BFLOAT16_MODEL, FLOAT32, Tolerance

CPU = torch.device("cpu")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(input_ids=torch.stack(random_texts([19, 19], 4000))).logits
    return result


def unmerged(run: Path, dtype: torch.dtype) -> Any:
    source = resolve_model(str(run))
    assert source.adapter is not None
    return load_adapter(open_model(base_of(source), dtype=dtype, device=CPU), source.adapter)


def merged_folder(run: Path, out: Path, dtype: str = "float32") -> Path:
    return merge_into(MergeConfig(model=str(run), out=out, dtype=dtype))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", FLOAT32), ("bfloat16", BFLOAT16_MODEL)])
def test_merged_folder_is_a_plain_model(dtype: str, tolerance: Tolerance, finished_run: Path, tmp_path: Path) -> None:
    folder = merged_folder(finished_run, tmp_path / "merged", dtype)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert model.dtype is getattr(torch, dtype)
    expected = logits(unmerged(finished_run, model.dtype))
    tolerance.check(logits(model), expected)
    base = logits(open_model(base_of(resolve_model(str(finished_run))), dtype=model.dtype, device=CPU))
    assert (base - expected).norm() > 0.1 * base.norm()


def test_merged_folder_has_the_tokenizer_of_the_run(finished_run: Path, small_model: Path, tmp_path: Path) -> None:
    folder = merged_folder(finished_run, tmp_path / "merged")
    tokenizer, original = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(small_model)
    for text in ("Two  cats\n\tand <extra_id_1>User </s>x", "naïve ☃", "    return self"):
        assert tokenizer(text)["input_ids"] == original(text)["input_ids"]
    assert tokenizer.chat_template
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (original.eos_token_id, original.pad_token_id)


def test_nothing_half_written_is_left(finished_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    out.mkdir()
    (tmp_path / "merged.partial").mkdir()
    (tmp_path / "merged.partial/model.safetensors").write_text("from a merge that was killed")
    (tmp_path / "merged.partial/old").write_text("from a merge that was killed")
    assert merged_folder(finished_run, out) == out
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    assert not (out / "old").exists()


@pytest.mark.parametrize("what", ["a folder with a file", "a file"])
def test_folder_in_use_is_not_written_to(what: str, finished_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if what == "a file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "file").write_text("mine")
    with pytest.raises(ConfigError, match=r"--out .*out exists and is not empty\.\n  expected   a new or empty folder"):
        merged_folder(finished_run, out)
    assert (out if out.is_file() else out / "file").read_text() == "mine"


def test_model_without_an_adapter_has_nothing_to_merge(small_model: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"small has no adapter: it is one model already\."):
        merged_folder(small_model, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_adapter_that_does_not_name_its_base(finished_run: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(finished_run / "adapter", tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(
        CheckpointError, match=r"adapter does not say which model it belongs to\.\n  expected   base_mod"
    ):
        open_model(resolve_model(str(adapter)), dtype=torch.float32, device=CPU)


def test_adapter_folder_opens_as_its_run_does(finished_run: Path) -> None:
    run, adapter = (
        open_model(resolve_model(str(folder)), dtype=torch.float32, device=CPU)
        for folder in (finished_run, finished_run / "adapter")
    )
    assert torch.equal(logits(run), logits(adapter))
