"""Whatever an adapter_config.json says, it is used as PEFT documents it or refused in one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from hymba_tune.adapters import folded_weights, load_adapter, tokenizer_of, weights_of
from hymba_tune.adapters import settings as checks
from hymba_tune.adapters.attach import read_config
from hymba_tune.errors import CheckpointError
from hymba_tune.hub.lineage import trace
from hymba_tune.registry import ModelSource, resolve_model
from tests.adapters.small import adapted_model, merged
from tests.runs import run
from tests.runs import settings as run_settings
from tests.tiny import tiny_model

FIELDS = sorted(get_type_hints(LoraConfig))
ODD = (5, -1, 0, 10**30, 0.5, 1e308, True, None, "x", "(", "", [], ["x"], [1], [[1, 2]], {}, {"x": "y"}, {"x": 1})


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter whose settings tests may change, with `changed`."""
    folder = tmp_path_factory.mktemp("adapter")
    merged(adapted_model(), folder)
    (folder / "adapter/adapter_config.json").rename(folder / "original.json")
    return folder / "adapter"


def changed(adapter: Path, **changes: Any) -> Path:
    original = json.loads((adapter.parent / "original.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(original | changes))
    return adapter


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.filterwarnings("ignore:.* will be ignored when `init_lora_weights` is not")
def test_any_value_of_a_field_is_read_or_refused(field: str, adapter: Path) -> None:
    refused = 0
    for value in ODD:
        try:
            read_config(changed(adapter, **{field: value}))
        except CheckpointError:
            refused += 1
    assert refused or field == "runtime_config"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(field=st.sampled_from(FIELDS), value=st.sampled_from(ODD))
@pytest.mark.filterwarnings("ignore:.* will be ignored when `init_lora_weights` is not", "ignore:.*runtime_config")
def test_any_value_of_a_field_is_loaded_or_refused(field: str, value: Any, adapter: Path) -> None:
    try:
        load_adapter(tiny_model(), changed(adapter, **{field: value}))
    except CheckpointError:
        return


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": "8"}, r"r is '8'(.|\n)*integer"),
        ({"lora_alpha": "much"}, r"lora_alpha is 'much'(.|\n)*number"),
        ({"rank_pattern": {"x_proj.0": "4"}}, r"rank_pattern\.x_proj\.0 is '4'"),
        ({"target_modules": "("}, r"target_modules is no regular expression"),
        ({"exclude_modules": "("}, r"exclude_modules is no regular expression"),
        ({"target_modules": {"x": 1}}, r"target_modules\..* is "),
        ({"r": 10**6}, r"the rank is 1,000,000, and no tensor of the adapter is that large"),
        ({"lora_dropout": 7.0}, r"does not fit this model: dropout"),
        ({"layers_pattern": "layers"}, r"adapter_config\.json cannot be used: When `layers_pattern`"),
    ],
)
def test_wrong_value_is_named(changes: dict[str, Any], message: str, adapter: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_adapter(tiny_model(), changed(adapter, **changes))


@pytest.mark.parametrize("text", ["[]", "3", "[" * 100_000, '"LORA"'])
def test_settings_that_are_no_object_are_refused(text: str, adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json cannot be read"):
        read_config(adapter)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json cannot be read"):
        resolve_model(str(adapter))


KINDS: dict[str, Any] = dict.fromkeys(checks.NOT_MERGEABLE, True) | {
    "target_parameters": ["x"],
    "alora_invocation_tokens": [1],
    "layer_replication": [[0, 1]],
    "megatron_config": {"x": 1},
    "velora_config": {"x": 1},
    "use_bdlora": {},
    "arrow_config": {},
    "kasa_config": {},
    "monteclora_config": {},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_bias": True}, "it trains a bias in lora_B: lora_bias is set"),
        ({"bias": "all"}, "it trains biases: bias is all"),
        ({"bias": "lora_only"}, "it trains biases: bias is lora_only"),
        ({"target_parameters": ["x"]}, "parameters that are not weights of linear layers"),
        ({"alora_invocation_tokens": [1]}, "aLoRA"),
        ({"layer_replication": [[0, 2]]}, "repeats layers"),
        ({"use_qalora": True}, "QALoRA"),
        ({"use_bdlora": {"x": 1}}, "BD-LoRA|use_bdlora"),
        ({"megatron_config": {"x": 1}}, "Megatron"),
    ],
)
def test_adapter_that_cannot_be_merged_is_refused_before_peft_sees_it(
    changes: dict[str, Any], message: str, adapter: Path
) -> None:
    """PEFT's warnings about such an adapter would fail this test."""
    source = ModelSource("mine", changed(adapter, **changes), adapter=adapter, base=str(adapter.parent / "base"))
    with pytest.raises(CheckpointError, match=message):
        folded_weights(source)


@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning", "ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_bias": True, "target_modules": ["x_proj.0"]}, r"x_proj\.0\.weight cannot be merged: Impossible"),
        ({"target_modules": ["lm_head"]}, r"changes lm_head\.weight in a way that cannot be merged"),
    ],
)
def test_unknown_kind_of_adapter_is_not_merged(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later PEFT may have kinds that the table lacks."""
    from hymba_tune.adapters import add_adapter
    from tests.adapters.small import config_for

    monkeypatch.setattr(checks, "NOT_MERGEABLE", {})
    monkeypatch.setattr("hymba_tune.adapters.weights.unties", lambda _: False)
    model = tiny_model()
    config = config_for(model)
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(CheckpointError, match=message):
        merged(add_adapter(model, config, ["mlp"]), tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool])
def test_adapter_that_is_no_floats_is_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    merged(adapted_model(), tmp_path)
    path = tmp_path / "adapter/adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: tensor .* has the dtype (I8|BOOL)"):
        load_adapter(tiny_model(), path.parent)


def test_run_on_a_broken_adapter_ends_before_its_base_is_loaded(
    finished_run: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Path(shutil.copytree(finished_run, tmp_path / "broken"))
    path = broken / "adapter/adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    monkeypatch.setattr("hymba_tune.train.flow.open_model", None)
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is truncated"):
        run(run_settings(broken, questions, tmp_path / "run"))


def circle(adapter: Path, folder: Path, count: int) -> Path:
    """Adapters each of which names the next as its base, and the last the first."""
    names = [folder / str(number) for number in range(count)]
    for name, base in zip(names, [*names[1:], names[0]], strict=True):
        name.mkdir()
        changed(adapter, base_model_name_or_path=str(base))
        (name / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    return names[0]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("find", [weights_of, tokenizer_of, folded_weights, trace])
def test_adapter_below_itself_is_refused(find: Any, count: int, adapter: Path, tmp_path: Path) -> None:
    source = resolve_model(str(circle(adapter, tmp_path, count)))
    with pytest.raises(CheckpointError, match=r"is its own base model"):
        find(source)
