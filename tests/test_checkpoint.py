from __future__ import annotations

import json
import pickle
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hymba_tune.checkpoint import (
    INDEX,
    SINGLE,
    check_weights,
    choose_device,
    choose_dtype,
    describe_choice,
    load_config,
    load_tokenizer,
    load_weights,
)
from hymba_tune.errors import CheckpointError, ConfigError
from hymba_tune.registry import ModelSource
from tests.runs import rewrite, tensors

CPU = torch.device("cpu")
EMBEDDING, SCAN = "model.embed_tokens.weight", "model.layers.1.mamba.A_log.0"


@pytest.fixture
def model(small_model: Path, tmp_path: Path) -> Path:
    """A copy of the small model that a test may damage."""
    return Path(shutil.copytree(small_model, tmp_path / "broken"))


@pytest.fixture
def sharded(model: Path) -> Path:
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(model, max_shard_size="100KB")
    (model / SINGLE).unlink(missing_ok=True)
    return model


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return load_weights(ModelSource("broken", folder), dtype=dtype, device=CPU)


def assert_loads_as(folder: Path, original: Path) -> None:
    expected = AutoModelForCausalLM.from_pretrained(original).state_dict()
    loaded = load(folder).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_single_file_loads(small_model: Path) -> None:
    assert_loads_as(small_model, small_model)


def test_shards_load(sharded: Path, small_model: Path) -> None:
    assert len(list(sharded.glob("model-*.safetensors"))) == 3
    assert_loads_as(sharded, small_model)


def test_weights_load_in_the_requested_dtype(small_model: Path) -> None:
    assert {parameter.dtype for parameter in load(small_model, torch.bfloat16).parameters()} == {torch.bfloat16}


def test_tied_head_written_by_other_tools_is_accepted(model: Path, small_model: Path) -> None:
    rewrite(model, {"lm_head.weight": tensors(model)[EMBEDDING].clone()})
    assert_loads_as(model, small_model)


def test_tied_head_of_another_shape_is_refused(model: Path) -> None:
    rewrite(model, {"lm_head.weight": torch.zeros(5, 32)})
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor lm_head\.weight is not part"):
        load(model)


@pytest.mark.parametrize("name", [SCAN, "model.memory_tokens", EMBEDDING])
def test_missing_tensor_is_named(name: str, model: Path) -> None:
    shape = list(tensors(model)[name].shape)
    rewrite(model, {}, removed=[name])
    with pytest.raises(CheckpointError) as error:
        load(model)
    assert f"tensor {name} is missing.\n  expected   a tensor of shape {shape}" in str(error.value)


@pytest.mark.parametrize("name", [SCAN, "model.memory_tokens", EMBEDDING])
def test_misshapen_tensor_is_named_with_both_shapes(name: str, model: Path) -> None:
    shape = list(tensors(model)[name].shape)
    rewrite(model, {name: torch.zeros(3, 7)})
    with pytest.raises(CheckpointError) as error:
        load(model)
    assert f"model.safetensors: tensor {name} has shape [3, 7].\n  expected   the shape {shape}" in str(error.value)


def test_unknown_tensors_are_named_and_counted(model: Path) -> None:
    rewrite(model, {"model.layers.7.norm": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"tensor model\.layers\.7\.norm is not part of the model\.\n"):
        load(model)
    rewrite(model, {"model.layers.8.norm": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"tensor model\.layers\.\d\.norm is not part .*, nor are 1 others\."):
        load(model)


def test_misshapen_tensor_in_a_shard_is_named_with_its_file(sharded: Path) -> None:
    file = sharded / json.loads((sharded / INDEX).read_text())["weight_map"][SCAN]
    save_file(load_file(file) | {SCAN: torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match=rf"{file.name}: tensor {SCAN} has shape \[1\]"):
        load(sharded)


def test_truncated_weights_are_reported_with_the_last_tensor(model: Path) -> None:
    file = model / SINGLE
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(
        CheckpointError, match=rf"model\.safetensors is truncated: it has {len(whole) - 1:,} bytes, and"
    ):
        load(model)


def test_weights_with_trailing_bytes_are_refused(model: Path) -> None:
    with (model / SINGLE).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(model)


def test_truncated_shard_is_named(sharded: Path) -> None:
    file = sorted(sharded.glob("model-*.safetensors"))[2]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=rf"{file.name} is truncated"):
        load(sharded)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x10",
        (10**9).to_bytes(8, "little"),
        (2).to_bytes(8, "little") + b"[]",
        (1).to_bytes(8, "little") + b"3",
        (14).to_bytes(8, "little") + b'{"a":{"b":[]}}',
        (36).to_bytes(8, "little") + b'{"a":{"data_offsets":[],"shape":[]}}',
        b"<html>not found</html>" * 10,
    ],
    ids=["empty", "no_length", "long_header", "a_list", "a_number", "no_offsets", "empty_offsets", "a_page"],
)
def test_file_in_another_format_is_named(content: bytes, model: Path) -> None:
    (model / SINGLE).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a safetensors file: (.|\n)*download or copy"):
        load(model)


def test_weights_truncated_within_the_header_are_refused(model: Path) -> None:
    (model / SINGLE).write_bytes((model / SINGLE).read_bytes()[:200])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a safetensors file: the header is longer"):
        load(model)


def test_missing_shard_is_named(sharded: Path) -> None:
    file = min(sharded.glob("model-*.safetensors"))
    file.unlink()
    with pytest.raises(CheckpointError, match=rf"the shard {file.name} is missing\."):
        load(sharded)


def test_index_that_points_outside_its_folder_is_refused(sharded: Path, small_model: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    outside = f"../{small_model.name}/{SINGLE}"
    (sharded / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(index["weight_map"], outside)}))
    with pytest.raises(CheckpointError, match=rf"{INDEX} points outside its folder: \.\./small/model\.safetensors"):
        load(sharded)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1, "b": "c"}}'])
def test_unreadable_index_is_refused(text: str, sharded: Path) -> None:
    (sharded / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=rf"{INDEX} is not a valid index of shards"):
        load(sharded)


def test_folder_without_weights_is_refused(model: Path) -> None:
    (model / SINGLE).unlink()
    with pytest.raises(CheckpointError, match=r"no weights\.\n  expected   model\.safetensors, or shards with"):
        load(model)


@pytest.mark.parametrize("name", ["/etc/passwd", "../model.safetensors", "sub/model.safetensors", 3])
def test_shard_that_lies_elsewhere_is_not_read(name: Any, sharded: Path) -> None:
    (sharded / INDEX).write_text(json.dumps({"weight_map": {EMBEDDING: name}}))
    with pytest.raises(CheckpointError, match=rf"points outside its folder: {name}\n  expected   plain file names"):
        load(sharded)


class Evil:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_pickles_are_never_opened(name: str, model: Path, tmp_path: Path) -> None:
    (model / name).write_bytes(pickle.dumps(Evil(tmp_path / "was here")))
    load(model)
    (model / SINGLE).unlink()
    with pytest.raises(CheckpointError, match=rf"no weights except pickled ones, {name}, which can run code\.\n"):
        load(model)
    assert not (tmp_path / "was here").exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_next_to_weights_is_never_run(file: str, model: Path, tmp_path: Path) -> None:
    (model / "evil.py").write_text(f"open({str(tmp_path / 'was here')!r}, 'w')")
    names = {"AutoConfig": "evil.A", "AutoModelForCausalLM": "evil.B", "AutoTokenizer": ["evil.C", "evil.C"]}
    settings = json.loads((model / file).read_text()) | {"auto_map": names}
    (model / file).write_text(json.dumps(settings))
    load(model)
    with suppress(CheckpointError):  # a tokenizer that names code may be refused, or be read without it
        load_tokenizer(model)
    assert not (tmp_path / "was here").exists()


def test_only_headers_are_read(sharded: Path) -> None:
    """A full-size folder is checked at once, because the contents of the tensors are not read."""
    for file in sharded.glob("model-*.safetensors"):
        content = bytearray(file.read_bytes())
        header = 8 + int.from_bytes(content[:8], "little")
        file.write_bytes(content[:header])
        with file.open("ab") as stream:
            stream.truncate(len(content))
    check_weights(sharded, load_config(ModelSource("broken", sharded)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "config.json"),
        ("{", "not a valid JSON file"),
        ("[]", "model_type"),
        ("{}", "model_type"),
        ('{"model_type": "no-such-kind"}', "no-such-kind"),
        ('{"model_type": "hymba", "hidden_size": "wide"}', "hidden_size"),
        ('{"model_type": "hymba", "num_attention_heads": 7}', r"hidden_size \(1600\) must be a multiple of"),
        ('{"model_type": "hymba", "kv_reuse_group": [[99]]}', r"kv_reuse_group names layers \[99\]"),
    ],
)
def test_unusable_config_is_named(text: str | None, message: str, model: Path) -> None:
    (model / "config.json").unlink()
    if text is not None:
        (model / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"config\.json cannot be used: (.|\n)*{message}"):
        load_config(ModelSource("broken", model))


def test_another_kind_of_model_is_refused(model: Path) -> None:
    (model / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match=r"mine is a llama model\.\n  expected   a Hymba model"):
        load_config(ModelSource("mine", model))


@pytest.mark.parametrize("text", [None, "{", "{}"])
def test_folder_without_a_tokenizer_is_refused(text: str | None, model: Path) -> None:
    (model / "tokenizer.json").unlink()
    if text is not None:
        (model / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"No tokenizer can be read from .*broken"):
        load_tokenizer(model)


def test_released_tokenizer_keeps_its_ids_in_every_folder_it_is_saved_to(shared: Path, tmp_path: Path) -> None:
    """The adapter folder of a run has no config.json that would identify the tokenizer."""
    tokenizer = load_tokenizer(shared / "reference/hymba-1.5b-base")
    tokenizer.save_pretrained(tmp_path)
    saved = load_tokenizer(tmp_path)
    for text in (" hello", "</s>x", "def f():\n    return 1", "naïve ☃"):
        assert saved(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert tokenizer(" hello")["input_ids"] == [1, 29871, 22172]


def test_default_device_is_the_cpu_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == CPU


def test_default_device_is_the_first_cuda_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    chosen = [choose_device(name) for name in ("auto", "cuda", "cuda:1", "cpu")]
    assert list(map(str, chosen)) == ["cuda:0", "cuda:0", "cuda:1", "cpu"]
    assert current == chosen[:3]  # Triton's kernels start on the current device, wherever their tensors are
    sentence = "2 GPUs are visible and one is used, cuda:{}; --device chooses another"
    assert [describe_choice(device) for device in chosen[1:]] == [sentence.format(0), sentence.format(1), None]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert describe_choice(chosen[0]) is None


def test_unknown_device_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--device gpu: no such device\.\n  expected   auto, cpu, cuda or cuda:1"):
        choose_device("gpu")


@pytest.mark.parametrize(("name", "count"), [("cuda", 0), ("cuda:0", 0), ("cuda:2", 2)])
def test_missing_cuda_device_is_refused(name: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(ConfigError, match=rf"--device {name}: this machine has {count} CUDA devices\.\n.*--device cpu"):
        choose_device(name)


def test_float16_needs_cuda() -> None:
    with pytest.raises(ConfigError, match=r"--dtype float16 needs a CUDA device\.\n.*--dtype bfloat16 or"):
        choose_dtype("float16", CPU)
    assert choose_dtype("float16", torch.device("cuda")) is torch.float16


@pytest.mark.parametrize(("avx512", "amx"), [(False, False), (True, False), (False, True)])
def test_bfloat16_is_the_default_if_the_cpu_supports_it(
    avx512: bool, amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert choose_dtype("auto", CPU) is (torch.bfloat16 if avx512 or amx else torch.float32)
    assert choose_dtype("bfloat16", CPU) is torch.bfloat16


@pytest.mark.parametrize("supported", [False, True])
def test_bfloat16_is_the_default_if_the_gpu_supports_it(supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: supported)
    assert choose_dtype("auto", torch.device("cuda")) is (torch.bfloat16 if supported else torch.float32)
