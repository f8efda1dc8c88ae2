from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hymba_tune.adapters import open_model
from hymba_tune.errors import CheckpointError
from hymba_tune.registry import resolve_model
from tests.tiny import random_texts

CPU = torch.device("cpu")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(input_ids=torch.stack(random_texts([19, 19], 4000))).logits
    return result


def test_adapter_that_does_not_name_its_base_is_refused(finished_run: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(finished_run / "adapter", tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(CheckpointError, match=r"adapter does not name its base model\.\n  expected   base_mod"):
        open_model(resolve_model(str(adapter)), dtype=torch.float32, device=CPU)


def test_adapter_folder_opens_as_the_same_model_as_its_run(finished_run: Path) -> None:
    run, adapter = (
        open_model(resolve_model(str(folder)), dtype=torch.float32, device=CPU)
        for folder in (finished_run, finished_run / "adapter")
    )
    assert torch.equal(logits(run), logits(adapter))
