"""An adapter of hymba-tune names its base model so that plain PEFT finds it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM

from hymba_tune.config import ExportConfig
from hymba_tune.errors import ConfigError
from hymba_tune.hub import export
from hymba_tune.hub.lineage import trace
from hymba_tune.registry import resolve_model
from tests.hub.inputs import logits, publish
from tests.hub.server import Hub
from tests.hub.silent import silent
from tests.runs import run, settings

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # from the client's HTTP library
]


def plain_logits(adapter: Path) -> torch.Tensor:
    model = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32).eval()
    with torch.inference_mode():
        result: torch.Tensor = model(input_ids=torch.arange(3, 30)[None]).logits
    return result


def named(adapter: Path) -> tuple[str, str | None]:
    config = json.loads((adapter / "adapter_config.json").read_text())
    return config["base_model_name_or_path"], config["revision"]


def exported(model: Path, out: Path, **options: Any) -> Path:
    return export(ExportConfig(model=str(model), out=out, adapter_only=True, **options), silent).folder


@pytest.fixture(scope="module")
def nano_run(questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("nano") / "run"
    return run(settings(Path("hymba-nano"), questions, out, steps=1, eval_split=0.0)).path


def test_plain_peft_finds_the_packaged_model(nano_run: Path, tmp_path: Path) -> None:
    out = exported(nano_run, tmp_path / "out")
    for adapter in (nano_run / "adapter", out):
        assert named(adapter) == (str(resolve_model("hymba-nano").folder), None)
        torch.testing.assert_close(plain_logits(adapter), logits(str(nano_run)), rtol=1e-4, atol=1e-4)
        assert resolve_model(str(adapter)).base == trace(resolve_model(str(adapter))).adapter_base == "hymba-nano"
    assert "assets/hymba-nano" in (out / "README.md").read_text()
    assert str(resolve_model("hymba-nano").folder) not in (out / "README.md").read_text()


def test_uploaded_adapter_names_no_folder(hub: Hub, nano_run: Path, tmp_path: Path) -> None:
    out = exported(nano_run, tmp_path / "out", license="apache-2.0")
    with pytest.raises(ConfigError, match=r"--push: the adapter .*out names a folder of this machine(.|\n)*RUN --adap"):
        export(ExportConfig(model=str(out), push="me/nano"), silent)
    assert not hub.repositories
    again = exported(nano_run, tmp_path / "again", license="apache-2.0", push="me/nano")
    assert named(again) == ("hymba-nano", None)


def test_plain_peft_finds_a_revision(hub: Hub, small_model: Path, questions: Path, tmp_path: Path) -> None:
    publish(hub, small_model, "me/base", branch="v2")
    mine = run(settings(Path("me/base@v2"), questions, tmp_path / "run", steps=1, eval_split=0.0)).path
    out = exported(mine, tmp_path / "out")
    for adapter in (mine / "adapter", out):
        assert named(adapter) == ("me/base", "v2")
        torch.testing.assert_close(plain_logits(adapter), logits(str(mine)), rtol=1e-4, atol=1e-4)
        assert resolve_model(str(adapter)).base == "me/base@v2"
    for card in (mine / "README.md", out / "README.md"):
        assert "\nbase_model: me/base\n" in card.read_text()
    assert 'from_pretrained("me/base", revision="v2")' in (out / "README.md").read_text()


def test_plain_peft_finds_the_result_of_a_run(small_model: Path, questions: Path, tmp_path: Path) -> None:
    full = run(settings(small_model, questions, tmp_path / "full", method="full", steps=1, eval_split=0.0)).path
    upper = run(settings(full, questions, tmp_path / "upper", steps=1, eval_split=0.0)).path
    assert named(upper / "adapter") == (str(full / "model"), None)
    torch.testing.assert_close(plain_logits(upper / "adapter"), logits(str(upper)), rtol=1e-4, atol=1e-4)
