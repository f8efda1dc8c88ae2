"""The full 1.5B size, with random weights: does it load in little memory, and take a step?"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME as ADAPTER_WEIGHTS
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from hymba_tune.adapters import add_adapter
from hymba_tune.checkpoint import load_tokenizer
from hymba_tune.registry import resolve_model
from tests.adapters.small import config_for
from tests.conftest import ROOT
from tests.tiny import RELEASED

LAYERS_A_SHARD = 8

LOAD = """
import json, resource, sys
from pathlib import Path
import torch
from hymba_tune.checkpoint import load_weights
from hymba_tune.registry import resolve_model

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
model = load_weights(resolve_model(sys.argv[1]), dtype=torch.bfloat16, device=torch.device("cpu"))
checksum = sum(float(p.float().sum()) for p in model.parameters())
print(json.dumps({"bytes": peak() - before, "parameters": model.num_parameters(), "finite": checksum == checksum}))
"""

STEP = """
import json, sys
import torch
from hymba_tune.adapters import AdapterWatch, add_adapter, lora_config, open_model
from hymba_tune.config import MetaTokens, Method
from hymba_tune.registry import resolve_model

base = open_model(resolve_model(sys.argv[1]), dtype=torch.bfloat16, device=torch.device("cpu"))
config = lora_config(
    base,
    targets=["all"],
    method=Method.lora,
    rank=8,
    alpha=None,
    dropout=0.0,
    rslora=False,
    meta_tokens=MetaTokens.lora,
)
model = add_adapter(base, config, ["all"]).train()
ids = torch.randint(3, 32000, (1, 8), generator=torch.Generator().manual_seed(0))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
watch = AdapterWatch(model)
loss = model(input_ids=ids, labels=ids, skip_logits=True).loss
loss.backward()
optimizer.step()
print(json.dumps({"loss": loss.item(), "unmoved": watch.unmoved()}))
"""

MERGE = """
import json, sys
from pathlib import Path
import torch
from hymba_tune.config import MergeConfig
from hymba_tune.hub import merge
from hymba_tune.memory import peak_memory
from tests.hub.silent import silent

before = peak_memory(torch.device("cpu"))
done = merge(MergeConfig(model=sys.argv[1], out=Path(sys.argv[2]), dtype="bfloat16", device="cpu"), silent)
facts = {onto: drift.divergence for onto, drift in done.drifts.items()}
share = (peak_memory(torch.device("cpu")) - before) / done.size
print(json.dumps({"share": share, "size": done.size, "divergence": facts}))
"""


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model in the released layout, written shard by shard."""
    folder = tmp_path_factory.mktemp("hymba-1.5b")
    RELEASED.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(RELEASED)
    shapes = {n.replace("memory_tokens.weight", "memory_tokens"): p.shape for n, p in model.named_parameters()}
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, shape in shapes.items():
        layer = int(name.split(".")[2]) // LAYERS_A_SHARD + 1 if ".layers." in name else 0
        shards.setdefault(f"model-{layer}.safetensors", {})[name] = shape
    for file, names in shards.items():
        save_file({name: _random(name, shape) for name, shape in names.items()}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, names in shards.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _random(name: str, shape: torch.Size) -> torch.Tensor:
    if "norm" in name or name.endswith(".D.0"):
        return torch.ones(shape, dtype=torch.bfloat16)
    if name.endswith("A_log.0"):
        return torch.arange(1, shape[1] + 1).log().expand(shape).to(torch.bfloat16).contiguous()
    return torch.randn(shape, dtype=torch.bfloat16) * 0.02


def _run(code: str, folder: Path) -> dict[str, object]:
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_full_size_loads_within_a_third_more_than_its_file(full_size: Path) -> None:
    size = sum(file.stat().st_size for file in full_size.glob("*.safetensors"))
    loaded = _run(LOAD, full_size)
    assert loaded["parameters"] == 1_522_797_824
    assert loaded["finite"]
    assert loaded["bytes"] < 1.3 * size


@pytest.mark.slow
def test_full_size_takes_a_lora_step_in_bfloat16_on_a_cpu(full_size: Path) -> None:
    stepped = _run(STEP, full_size)
    assert stepped["unmoved"] == []
    # Random weights give every token about the same probability.
    assert stepped["loss"] == pytest.approx(math.log(RELEASED.vocab_size), rel=0.1)


@pytest.mark.slow
def test_merging_takes_less_than_one_and_a_third_of_the_model(full_size: Path, tmp_path: Path) -> None:
    """Beside what the libraries take, while both ways are measured and one of them is written."""
    run = tmp_path / "run"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(RELEASED)
        adapted = add_adapter(model, config_for(model), ["all"])
    adapted.peft_config["default"].save_pretrained(run / "adapter")
    factors = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    save_file({name: 0.01 * torch.randn(t.shape) for name, t in factors.items()}, run / "adapter" / ADAPTER_WEIGHTS)
    load_tokenizer(resolve_model("hymba-nano").folder).save_pretrained(run / "adapter")
    facts = {"model": str(full_size), "quantized": "nf4", "dtype": "torch.bfloat16"}
    (run / "run.json").write_text(json.dumps(facts))
    output = subprocess.check_output([sys.executable, "-c", MERGE, str(run), str(tmp_path / "merged")], cwd=ROOT)
    found = json.loads(output)
    assert found["size"] > 3e9
    assert found["share"] < 1.3, found
    assert found["divergence"]["dequantized"] < found["divergence"]["original"]
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) == 2
