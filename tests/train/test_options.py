"""Training settings have their documented effect, in complete runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hymba_tune.config import SFTConfig
from hymba_tune.errors import ConfigError, TrainingError
from hymba_tune.files import seal
from hymba_tune.model.layers import HymbaMLP
from hymba_tune.model.modeling_hymba import HymbaModel
from hymba_tune.train.optimizers import OPTIMIZERS
from hymba_tune.train.resuming import resume_config
from hymba_tune.train.run import Run
from hymba_tune.train.screen import Screen
from hymba_tune.train.trainer import HymbaTrainer
from tests.runs import SMALL, run, same_tensors, settings, tensors


class Banner(Screen):
    """Remembers the lines before the run."""

    def __init__(self) -> None:
        self.lines: dict[str, str] = {}

    def banner(self, lines: dict[str, str]) -> None:
        self.lines = lines


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_trains(optimizer: str, small_model: Path, questions: Path, tmp_path: Path) -> None:
    rates = {"lion": 1e-3, "lion8bit": 1e-3, "sgd": 1.0}
    changes = {"optimizer": optimizer, "lr": rates.get(optimizer, 1e-2), "steps": 3, "lr_ssm": 1e-3, "eval_split": 0}
    banner = Banner()
    finished = run(settings(small_model, questions, tmp_path / "out", **changes), banner)
    losses = [row.loss for row in finished.rows() if row.loss is not None]
    assert losses[-1] < losses[0]
    assert finished.facts()["optimizer"]["name"] == optimizer
    assert banner.lines["optimizer"].startswith(optimizer)
    assert ("not paged: there is no GPU" in banner.lines["optimizer"]) is optimizer.startswith("paged")


@pytest.mark.parametrize("changes", [{"optimizer": "adamw8bit", "method": "full"}, {"neftune_alpha": 10.0}])
def test_resumed_equals_uninterrupted(
    changes: dict[str, Any], small_model: Path, questions: Path, tmp_path: Path
) -> None:
    whole = run(settings(small_model, questions, tmp_path / "whole", steps=4, eval_every=2, **changes))
    run(settings(small_model, questions, tmp_path / "parts", steps=4, eval_every=2, **changes))
    (tmp_path / "parts/checkpoints/checkpoint-4/whole").unlink()
    finished = run(resume_config(SFTConfig(resume=tmp_path / "parts")))
    folder = "model" if "method" in changes else "adapter"
    assert same_tensors(finished.path / folder, whole.path / folder)


def test_groups_learn_at_their_own_rates(small_model: Path, questions: Path, tmp_path: Path) -> None:
    """With SGD and one step the weights show the rate: those of a rate of nearly nothing stay."""
    changes = {"optimizer": "sgd", "lr": 1.0, "warmup": 0.0, "steps": 1, "eval_split": 0, "method": "full"}
    plain, grouped = (
        run(settings(small_model, questions, tmp_path / name, **changes, **own))
        for name, own in {"plain": {}, "grouped": {"lr_meta": 1e-30, "lr_ssm": 2.0}}.items()
    )
    before, one, other = tensors(small_model), tensors(plain.model), tensors(grouped.model)
    for name in before:
        step, own = before[name] - one[name], before[name] - other[name]
        if "memory_tokens" in name:
            assert own.abs().max() == 0 < step.abs().max()
        elif re.search(r"A_log|\.D\.|conv1d|x_proj|dt_proj|(dt|B|C)_layernorm", name):
            torch.testing.assert_close(own, 2 * step, rtol=1e-3, atol=1e-6)
        else:
            assert torch.equal(own, step), name
    rates = {group["name"]: group["lr"] for group in grouped.facts()["optimizer"]["groups"]}
    assert rates == {
        "all others": 1.0,
        "all others, no decay": 1.0,
        "meta tokens": 1e-30,
        "ssm": 2.0,
        "ssm, no decay": 2.0,
    }


def test_rates_fall_as_the_schedule_says(small_model: Path, questions: Path, tmp_path: Path) -> None:
    changes = {"lr_schedule": "wsd", "lr_decay": 0.5, "lr_min": 0.1, "warmup": 0.2, "steps": 10, "eval_split": 0}
    finished = run(settings(small_model, questions, tmp_path / "out", lr=1e-2, **changes))
    rates = [row.learning_rate for row in finished.rows()]
    assert rates[2:6] == [1e-2] * 4
    assert rates[0] < rates[1] < rates[2]
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[9] > 1e-3


class TestNeftune:
    @pytest.fixture
    def embedded(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[bool, Tensor, Tensor]]]:
        """Of each pass: whether it trains, how far the text's embeddings are off the table, and the meta tokens'."""
        seen: list[tuple[bool, Tensor, Tensor]] = []
        forward = HymbaModel.forward

        def watched(self: HymbaModel, input_ids: Tensor, **kwargs: Any) -> Any:
            handles, far = [], {}
            for name in ("embed_tokens", "memory_tokens"):
                module = getattr(self, name)

                def look(module: Any, inputs: Any, output: Tensor, name: str = name) -> None:
                    table = module.get_base_layer() if hasattr(module, "get_base_layer") else module
                    far[name] = (output - torch.nn.functional.embedding(inputs[0], table.weight)).abs().detach()

                handles.append(module.register_forward_hook(look))
            output = forward(self, input_ids, **kwargs)
            for handle in handles:
                handle.remove()
            # With a cache the meta tokens are read once.
            seen.append((self.training, far["embed_tokens"], far.get("memory_tokens", torch.zeros(1))))
            return output

        monkeypatch.setattr(HymbaModel, "forward", watched)
        return seen

    def test_noise_is_on_the_text_alone_and_only_in_training(
        self, embedded: list[tuple[bool, Tensor, Tensor]], small_model: Path, questions: Path, tmp_path: Path
    ) -> None:
        changes = {"neftune_alpha": 5.0, "method": "full"}
        run(settings(small_model, questions, tmp_path / "out", **changes))
        passes = {training: [seen for seen in embedded if seen[0] is training] for training in (True, False)}
        assert len(passes[True]) == 2
        assert len(passes[False]) > 2  # evaluations, and answers before and after
        for training, text, meta in embedded:
            assert meta.max() == 0
            limit = 5.0 / (text.shape[1] * text.shape[2]) ** 0.5  # alpha / sqrt(L d), arXiv 2310.05914
            assert (0.9 * limit < text.max() <= limit * 1.0001) if training else text.max() == 0


class LargestTensor(TorchDispatchMode):
    """Notices the most elements that a tensor has."""

    largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        for made in output if isinstance(output, tuple | list) else [output]:
            if isinstance(made, Tensor):
                self.largest = max(self.largest, made.numel())
        return output


@pytest.mark.parametrize("chunked", [True, False])
def test_evaluation_never_holds_the_logits_of_all_tokens(
    chunked: bool, small_model: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control is a loss with chunks as large as the batch, which does hold all logits."""
    monkeypatch.setattr("hymba_tune.model.loss.CHUNK", 8 if chunked else 2**20)
    monkeypatch.setattr("hymba_tune.train.arguments.EVALUATED_BATCHES", 1)
    largest: list[int] = []
    evaluate = HymbaTrainer.evaluation_loop

    def evaluation_loop(self: HymbaTrainer, *args: Any, **kwargs: Any) -> Any:
        with LargestTensor() as seen:
            output = evaluate(self, *args, **kwargs)
        largest.append(seen.largest)
        return output

    monkeypatch.setattr(HymbaTrainer, "evaluation_loop", evaluation_loop)
    run(settings(small_model, questions, tmp_path / "out", steps=1, eval_split=0.3, batch_size=8))
    weights = SMALL["vocab_size"] * SMALL["hidden_size"]
    assert len(largest) == 2
    assert (max(largest) <= weights) is chunked


def test_packing_says_how_full_its_rows_are(small_model: Path, questions: Path, tmp_path: Path) -> None:
    banner = Banner()
    changes = {"packing": True, "max_length": 100, "batch_size": 1, "eval_split": 0, "steps": None, "epochs": 1}
    finished = run(settings(small_model, questions, tmp_path / "out", **changes), banner)
    facts = finished.facts()
    # One step a row, one pass over all tokens.
    assert facts["packed_share"] == pytest.approx(facts["data"]["tokens"] / (facts["steps"] * 100))
    assert facts["packed_share"] > 0.7
    assert f"packed to 100, {facts['packed_share']:.1%} full" in banner.lines["batch"]
    assert facts["tokens_per_s"] > 0


def test_activation_offload_needs_a_gpu(small_model: Path, questions: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"--activation-offload moves activations from a GPU to the CPU, and this run is on cpu"
    ):
        run(settings(small_model, questions, tmp_path / "out", activation_offload=True))


def test_cuda_graphs_need_a_gpu(small_model: Path, questions: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--cuda-graphs replays steps on a GPU, and the model is on cpu"):
        run(settings(small_model, questions, tmp_path / "out", cuda_graphs=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"lr_schedule": "linear", "lr_min": 0.1},
            "lr_min: linear has no lowest rate; use --lr-schedule cosine or wsd",
        ),
        ({"method": "full", "loraplus_ratio": 4}, "loraplus_ratio: --method full has no factors"),
        ({"meta_tokens": "frozen", "lr_meta": 1e-3}, "lr_meta: the meta tokens are not trained"),
        ({"targets": ["mlp"], "lr_ssm": 1e-3}, "lr_ssm: the targets have no module of the SSM: mlp"),
    ],
)
def test_rates_that_nothing_would_take_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SFTConfig(**changes)


def test_account_of_a_run_goes_over_its_lives(small_model: Path, questions: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = run(settings(small_model, questions, out, steps=4, eval_every=2)).facts()
    (out / "checkpoints/checkpoint-4/whole").unlink()
    state = (out / "checkpoints/checkpoint-2/trainer_state.json").read_text()
    assert '"seconds": ' in state
    # As if the first life had taken an hour and a terabyte to its checkpoint.
    state = re.sub(r'"seconds": [\d.e-]+', '"seconds": 3600.0', state)
    state = re.sub(r'"step_seconds": [\d.e-]+', '"step_seconds": 1800.0', state)
    state = re.sub(r'"peak_memory_bytes": \d+', f'"peak_memory_bytes": {2**40}', state)
    (out / "checkpoints/checkpoint-2/trainer_state.json").write_text(state)
    seal(out / "checkpoints/checkpoint-2")
    facts = run(resume_config(SFTConfig(resume=out))).facts()
    assert 3600 < facts["seconds"] < 3700
    assert facts["peak_memory_bytes"] == 2**40
    assert facts["tokens_seen"] == first["tokens_seen"]
    assert facts["tokens_per_s"] == pytest.approx(facts["tokens_seen"] / 1800, abs=0.1)


def test_modules_that_stop_moving_are_seen_after_resuming(
    small_model: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    # SGD: AdamW would still move parameters without a gradient, by their moments.
    run(settings(small_model, questions, out, steps=2, save_every=2, optimizer="sgd", lr_schedule="constant"))

    def stops_gradients(self: HymbaMLP, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = torch.nn.functional.silu(self.gate_proj(x))
        return self.down_proj(gate * self.up_proj(x))

    monkeypatch.setattr(HymbaMLP, "forward", stops_gradients)
    with pytest.raises(TrainingError, match=r"3 adapted modules did not move .*gate_proj"):
        run(resume_config(SFTConfig(resume=out, steps=4)))
    assert Run(out).last_checkpoint().name == "checkpoint-2"
