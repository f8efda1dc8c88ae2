"""Headers of safetensors files that lie: about the bytes, the shapes or the dtypes of their tensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from hymba_tune.checkpoint import SINGLE, check_weights, load_config, read_header
from hymba_tune.errors import CheckpointError
from hymba_tune.registry import ModelSource
from tests.runs import rewrite, tensors

ENTRY: dict[str, Any] = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
SECOND: dict[str, Any] = {"dtype": "F32", "shape": [2, 3], "data_offsets": [24, 48]}


def write(path: Path, header: Any, *, data: int = 48, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + bytes(data))
    return path


LIES: dict[str, Any] = {
    "overlapping offsets": {"a": ENTRY, "b": SECOND | {"data_offsets": [20, 48]}},
    "same bytes twice": {"a": ENTRY | {"data_offsets": [0, 48]}, "b": SECOND | {"data_offsets": [0, 48]}},
    "gap": {"a": ENTRY, "b": {"dtype": "F32", "shape": [5], "data_offsets": [28, 48]}},
    "dtype of another size": {"a": ENTRY | {"dtype": "F16"}, "b": SECOND},
    "unknown dtype": {"a": ENTRY | {"dtype": "F31"}, "b": SECOND},
    "negative offset": {"a": ENTRY | {"data_offsets": [-24, 24]}, "b": SECOND},
    "offsets in reverse": {"a": ENTRY | {"data_offsets": [24, 0]}, "b": SECOND},
    "fractional offset": {"a": ENTRY | {"data_offsets": [0.5, 24]}, "b": SECOND},
    "textual offset": {"a": ENTRY, "b": SECOND | {"data_offsets": ["24", "48"]}},
    "three offsets": {"a": ENTRY | {"data_offsets": [0, 24, 48]}, "b": SECOND},
    "shape of another size": {"a": ENTRY | {"shape": [2, 4]}, "b": SECOND},
    "shape that overflows": {"a": ENTRY | {"shape": [2**62, 2**62]}, "b": SECOND},
    "negative shape": {"a": ENTRY | {"shape": [-2, -3]}, "b": SECOND},
    "shape that is a text": {"a": ENTRY | {"shape": "23"}, "b": SECOND},
    "duplicate name": b'{"a":' + json.dumps(ENTRY).encode() + b',"a":' + json.dumps(SECOND).encode() + b"}",
    "list": [ENTRY],
    "entry without offsets": {"a": {"dtype": "F32", "shape": [12]}},
    "no UTF-8": b'{"\xff\xfe":' + json.dumps(ENTRY | {"data_offsets": [0, 48], "shape": [12]}).encode() + b"}",
    "nested deeply": b'{"a":' + b"[" * 100_000,
    "metadata that is no object": {"__metadata__": 3, "a": ENTRY, "b": SECOND},
}


@pytest.mark.parametrize("header", LIES.values(), ids=list(LIES))
def test_header_that_lies_is_refused(header: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", header)
    with pytest.raises(CheckpointError, match=r"a\.safetensors is not a safetensors file: (.|\n)*copy it again"):
        read_header(file)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**9, 0, 7])
def test_length_of_a_header_that_lies_is_refused(length: int, tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", {"a": ENTRY, "b": SECOND}, length=length)
    with pytest.raises(CheckpointError, match=r"a\.safetensors is not a safetensors file: "):
        read_header(file)


def test_huge_header_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    with file.open("wb") as stream:
        stream.write((10**11).to_bytes(8, "little"))
        stream.truncate(2 * 10**11)
    with pytest.raises(CheckpointError, match=r"the header has 100,000,000,000 bytes, more than 100,000,000"):
        read_header(file)


def test_more_bytes_than_described_are_counted(tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", {"a": ENTRY})
    with pytest.raises(CheckpointError, match=r"a\.safetensors has \d+ bytes, 24 more than its header describes"):
        read_header(file)


def test_honest_header_is_read(tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", {"a": ENTRY, "b": SECOND})
    assert read_header(file) == {"a": ([2, 3], "F32"), "b": ([2, 3], "F32")}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=150, deadline=None)
@given(key=st.sampled_from(["dtype", "shape", "data_offsets"]), value=JSON)
def test_any_value_in_a_header_is_read_or_refused(key: str, value: Any, tmp_path_factory: Any) -> None:
    file = write(tmp_path_factory.getbasetemp() / "any.safetensors", {"a": ENTRY | {key: value}, "b": SECOND})
    try:
        assert read_header(file)["a"] == ([2, 3], "F32")
    except CheckpointError:
        return


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.uint8, torch.int64, torch.float8_e4m3fn])
def test_weights_that_are_no_floats_are_refused(dtype: torch.dtype, small_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(small_model, tmp_path / "model"))
    name = "model.layers.1.mamba.out_proj.weight"
    rewrite(model, {name: tensors(model)[name].to(dtype)})
    with pytest.raises(CheckpointError, match=rf"tensor {name} has the dtype \w+\.\n  expected   F64 or F32"):
        check_weights(model, load_config(ModelSource("model", model)))


def test_tensor_in_two_shards_is_refused(small_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(small_model, tmp_path / "model"))
    (model / SINGLE).rename(model / "model-1.safetensors")
    save_file({"model.final_layernorm.weight": torch.ones(32)}, model / "model-2.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model-2.*final_layernorm\.weight is in model-1\.safetensors as well"):
        check_weights(model, load_config(ModelSource("model", model)))
