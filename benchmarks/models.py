"""The models that benchmarks compare: Hymba, and Falcon-H1 and Llama from transformers of the same width and depth."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Cache,
    FalconH1Config,
    FalconH1ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from hymba_tune.model import HymbaCache, HymbaConfig, HymbaForCausalLM

SHAPE: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 320,
    "intermediate_size": 1104,
    "num_hidden_layers": 8,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
HYMBA: dict[str, Any] = {
    "sliding_window": 256,
    "num_memory_tokens": 32,
    "mamba_dt_rank": 20,
    # The released model's pattern on 8 layers: the first, middle and last are global; pairs share keys and values.
    "global_attn_idx": [0, 4, 7],
    "kv_reuse_group": [[1, 2], [5, 6]],
}
TOY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
}
"""The smaller sizes for `--quick`."""

Step = Callable[[], None]


def hymba(device: torch.device, dtype: torch.dtype, **changes: Any) -> HymbaForCausalLM:
    """Hymba with random weights; 15.75M parameters by default."""
    config = HymbaConfig(**SHAPE | HYMBA | changes)
    model: HymbaForCausalLM = HymbaForCausalLM(config).to(device, dtype)
    return model


def falcon_h1(device: torch.device, dtype: torch.dtype, **changes: Any) -> FalconH1ForCausalLM:
    """Falcon-H1 with an SSM of Hymba's width, and the head and state sizes of Falcon-H1-0.5B."""
    shape = SHAPE | changes
    inner = 2 * shape["hidden_size"]
    head = 64
    ssm = {"mamba_d_ssm": inner, "mamba_d_head": head, "mamba_n_heads": inner // head, "mamba_d_state": 128}
    # The chunk size changes only how the scan is computed; on CPUs this is faster than the default of 256.
    ssm["mamba_chunk_size"] = 128
    return FalconH1ForCausalLM(FalconH1Config(**shape | ssm)).to(device, dtype)


def llama(device: torch.device, dtype: torch.dtype, **changes: Any) -> LlamaForCausalLM:
    """Llama of the same width and depth."""
    return LlamaForCausalLM(LlamaConfig(**SHAPE | changes)).to(device, dtype)


def millions(model: nn.Module) -> float:
    """Millions of parameters, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


def random_ids(model: PreTrainedModel, *shape: int) -> Tensor:
    """Random token ids of this shape, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, model.config.vocab_size, shape, generator=generator).to(model.device)


def training_step(model: PreTrainedModel, ids: Tensor, **more: Any) -> Step:
    """A training step: forward, loss on every token, and backward to all weights, without an optimizer."""

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids, use_cache=False, **more).loss.backward()

    return step


def linear_layers(model: HymbaForCausalLM, tokens: int) -> Step:
    """A training step of the linear layers alone, including the head, each on random inputs."""
    inputs: dict[tuple[int, int], Tensor] = {}
    calls = []
    for layer in (module for module in model.modules() if isinstance(module, nn.Linear)):
        rows = tokens if layer is model.lm_head else tokens + model.config.num_memory_tokens
        shape = rows, layer.in_features
        if shape not in inputs:
            inputs[shape] = torch.randn(shape, device=model.device, dtype=model.dtype, requires_grad=True)
        calls.append((layer, inputs[shape], torch.randn_like(layer(inputs[shape]))))

    def step() -> None:
        for layer, x, d_output in calls:
            torch.autograd.grad(layer(x), [x, *layer.parameters()], d_output)

    return step


class MetaTokensInRows(nn.Module):
    """Hymba in the classic layout: every text has its own meta tokens, which are computed with it.

    If every window reaches back to the meta tokens, this is the same function; the weights are copied.

    Raises:
        ValueError: If the model has no meta tokens.
    """

    def __init__(self, model: HymbaForCausalLM) -> None:
        super().__init__()
        meta = model.model.memory_tokens
        if meta is None:
            raise ValueError("the model has no meta tokens to lay out")
        config = HymbaConfig(**model.config.to_dict() | {"num_memory_tokens": 0})
        self.inner = HymbaForCausalLM(config).to(model.device, model.dtype)
        weights = {name: value for name, value in model.state_dict().items() if "memory_tokens" not in name}
        self.inner.load_state_dict(weights)
        self.meta = nn.Parameter(meta.weight.detach().clone())

    def forward(self, ids: Tensor, lengths: list[int]) -> Tensor:
        """The loss of ``(T,)`` ids of texts with these lengths, equal to `packed_loss`."""
        embeds = self.inner.get_input_embeddings()(ids).split(lengths)
        rows = torch.cat([part for text in embeds for part in (self.meta, text)])
        # The first token of a text has no loss; here the last meta token would predict it.
        ignored = ids.new_full((len(self.meta) + 1,), -100)
        labels = torch.cat([part for text in ids.split(lengths) for part in (ignored, text[1:])])
        offsets = _offsets([len(self.meta) + length for length in lengths], ids.device)
        output = self.inner(
            inputs_embeds=rows[None], labels=labels[None], cu_seq_lens_q=offsets, use_cache=False, skip_logits=True
        )
        loss: Tensor = output.loss
        return loss


def packed_loss(model: HymbaForCausalLM, ids: Tensor, lengths: list[int]) -> Tensor:
    """The loss of ``(T,)`` ids of texts with these lengths, with the meta tokens computed once."""
    loss: Tensor = model(
        input_ids=ids[None],
        labels=ids[None],
        cu_seq_lens_q=_offsets(lengths, ids.device),
        use_cache=False,
        skip_logits=True,
    ).loss
    return loss


def backward_of(loss: Callable[[], Tensor], model: nn.Module) -> Step:
    """A training step with any loss of a model."""

    def step() -> None:
        model.zero_grad(set_to_none=True)
        loss().backward()

    return step


def cache_bytes(cache: Cache) -> int:
    """Bytes of memory that a cache keeps allocated, including whole tensors of which it holds only a view.

    Room for more tokens counts in Hymba's cache only: Llama's has it to be fast, not because it must.
    """
    if not isinstance(cache, HymbaCache):
        used = [part[:, :, : layer.get_seq_length()] for layer in cache.layers for part in (layer.keys, layer.values)]
        return sum(part.nbytes for part in used)
    parts: list[Tensor] = [part for pair in cache.meta.values() for part in pair]
    for held in (cache.keys, cache.values, cache.tails, cache.states):
        parts += held.values()
    storages = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}
    return sum(storages.values())


def _offsets(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], device=device)
