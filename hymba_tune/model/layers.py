"""One layer of Hymba: attention heads and Mamba heads on one projection, then an MLP (arXiv 2411.13676, section 2).

Hidden states are packed, ``(rows, d)``: the M meta tokens once, then the T tokens of all texts (see `Documents`).

Each parameter is read only while the module that owns it is called, because offloaded and sharded weights are in memory
only then.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import cached_attention, packed_attention
from .attention_token import attend
from .autocast import at_least_float32, without_autocast
from .cache import HymbaCache
from .configuration_hymba import HymbaConfig
from .convolution import packed_conv1d
from .documents import Documents
from .elementwise import add_rms_norm, gated_silu, mean_of_norms, norm_rotate, rms_norm, rotate
from .few_rows import gate_up, has_few_rows, is_plain, project
from .one_token import prepare, update
from .one_token_inputs import StateInputs, TokenInputs
from .scan import packed_scan


class HymbaRMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension; see `rms_norm`.

    Args:
        shape: The shape of the weight, which broadcasts over the input.
        eps: The number added to the mean square.
    """

    def __init__(self, shape: int | tuple[int, ...], eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``(rows, width)``."""
        return rms_norm(x, self.weight, self.eps)


class HymbaSumNorm(HymbaRMSNorm):
    """The norm of the residual stream after an update, which is added in the same pass over memory."""

    def forward(self, x: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return the sum of x and the update, both ``(rows, width)``, and its norm."""
        return add_rms_norm(x, update, self.weight, self.eps)


class HymbaHeadNorm(HymbaRMSNorm):
    """A norm of each head, with a weight ``(width,)`` for all heads or ``(1, heads, 1, width)``."""

    @property
    def head_weight(self) -> Tensor:
        """Return the weight as ``(width,)`` or ``(heads, width)``."""
        return self.weight[0, :, 0] if self.weight.ndim > 1 else self.weight

    def forward(  # type: ignore[override]
        self, x: Tensor, tables: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Normalize ``(rows, heads, width)``, then rotate by the tables if there are any."""
        if tables is None:
            return rms_norm(x, self.head_weight, self.eps)
        return norm_rotate(x, self.head_weight, self.eps, tables)


class HymbaHeadNorms(nn.Module):
    """The norms of the queries and keys, before RoPE. A layer that reuses keys also has a key norm, as released."""

    def __init__(self, config: HymbaConfig) -> None:
        super().__init__()
        heads = (config.num_attention_heads, config.num_key_value_heads)
        per_head = config.kq_norm == "perhead-rms"
        shapes: list[Any] = [(1, count, 1, config.head_dim) if per_head else config.head_dim for count in heads]
        self.q_norm, self.k_norm = (HymbaHeadNorm(shape, config.rms_norm_eps) for shape in shapes)

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        """Return the weights of both norms, ``(width,)`` or ``(heads, width)``."""
        return self.q_norm.head_weight, self.k_norm.head_weight


class HymbaFirstNorm(HymbaRMSNorm):
    """The norm of the attention heads' output, averaged with that of the SSM heads in one pass over memory."""

    def forward(  # type: ignore[override]
        self, a: Tensor, average: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Call ``average``, a `HymbaSecondNorm` with its input bound, with ``(rows, width)`` and the weight."""
        return average(a, self.weight)


class HymbaSecondNorm(HymbaRMSNorm):
    """The norm of the SSM heads' output, which computes the average of both norms."""

    def forward(self, b: Tensor, a: Tensor, a_weight: Tensor) -> Tensor:  # type: ignore[override]
        """Return the mean of both norms, ``(rows, width)``."""
        return mean_of_norms(a, a_weight, b, self.weight, self.eps)


class HymbaConvolution(nn.Conv1d):
    """The causal depthwise convolution in front of the SSM, and the silu after it."""

    def forward(  # type: ignore[override]
        self, x: Tensor, documents: Documents, tails: Tensor | None, *, keep: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Convolve each text; see `packed_conv1d`."""
        return packed_conv1d(x, self.weight.squeeze(1).to(x.dtype), self.bias, documents, tails, keep=keep)


class HymbaTimeStep(nn.Linear):
    """The projection to time steps, computed in float32 whatever the dtype of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        """Project ``(..., in)`` to ``(..., out)`` in float32."""
        with without_autocast(x.device.type):
            bias = None if self.bias is None else at_least_float32(self.bias)
            return nn.functional.linear(at_least_float32(x), at_least_float32(self.weight), bias)


class HymbaParameter(nn.ParameterList):
    """One parameter under its released name, ``.0``."""

    # A ParameterList refuses to be called, but offloading and sharding load a parameter when its module is called.
    __call__ = nn.Module.__call__


class HymbaDecay(HymbaParameter):
    """The logarithm of -A, ``(E, N)``: the rate at which each state decays."""

    def forward(self) -> Tensor:
        """Return A, in float32 or wider."""
        return -torch.exp(at_least_float32(self[0]))


class HymbaSkip(HymbaParameter):
    """The weight D of the skip connection, ``(E,)``. The module computes the scan, since only it may read D."""

    def forward(
        self,
        u: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        z: Tensor,
        documents: Documents,
        states: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Scan each text; see `packed_scan`."""
        return packed_scan(u, dt, A, B, C, self[0], z, documents, states)


class HymbaMLP(nn.Module):
    """``down(silu(gate(x)) * up(x))``, or ``down(relu(up(x)) ** 2)``."""

    def __init__(self, config: HymbaConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        gated = config.mlp_hidden_act == "silu"
        self.gate_proj = nn.Linear(width, inner, bias=False) if gated else None
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Map ``(rows, d)`` to ``(rows, d)``; a residual stream is added to, possibly in place."""
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        if gate is None:
            inner = torch.relu(project(up, x)).square()
        elif has_few_rows(x) and is_plain(gate, nn.Linear) and is_plain(up, nn.Linear):
            inner = gate_up(x, gate.weight, up.weight)
        else:
            inner = gated_silu(gate(x), up(x))
        return project(down, inner, residual)


class HymbaExperts(nn.Module):
    """The only expert, under its name in released checkpoints."""

    def __init__(self, config: HymbaConfig) -> None:
        super().__init__()
        self.experts = nn.ModuleList([HymbaMLP(config)])

    def forward(self, x: Tensor, *residual: Tensor) -> Tensor:
        """Map ``(rows, d)`` to ``(rows, d)``; see `HymbaMLP`."""
        output: Tensor = self.experts[0](x, *residual)
        return output


class HymbaMixer(nn.Module):
    """Attention heads and SSM heads on one input projection, averaged after one norm each.

    The projection of a layer that reuses the keys and values of another layer has no rows for them.
    """

    def __init__(self, config: HymbaConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.source = config.kv_source(layer)
        self.window = None if config.is_global(layer) else config.sliding_window
        self.head_dim, self.value_dim = config.head_dim, config.value_dim

        inner, state, rank = config.ssm_size, config.mamba_d_state, int(config.mamba_dt_rank)
        groups = config.num_key_value_heads if self.source == layer else 0
        self.widths = [config.hidden_size, groups * self.head_dim, groups * self.value_dim, inner, inner]
        self.state_widths = [rank, state, state]

        self.eps = eps = config.rms_norm_eps
        bias = config.mamba_proj_bias
        self.in_proj = nn.Linear(config.hidden_size, sum(self.widths), bias=bias)
        self.self_attn = HymbaHeadNorms(config) if config.kq_norm != "none" else None
        self.conv1d = HymbaConvolution(inner, inner, config.mamba_d_conv, groups=inner, bias=config.mamba_conv_bias)
        self.x_proj = nn.ModuleList([nn.Linear(inner, sum(self.state_widths), bias=False)])
        inner_norms = config.mamba_inner_layernorms
        self.dt_layernorm = HymbaRMSNorm(rank, eps) if inner_norms else None
        self.B_layernorm = HymbaRMSNorm(state, eps) if inner_norms else None
        self.C_layernorm = HymbaRMSNorm(state, eps) if inner_norms else None
        self.dt_proj = nn.ModuleList([HymbaTimeStep(rank, inner)])
        self.A_log = HymbaDecay([nn.Parameter(torch.empty(inner, state))])
        self.D = HymbaSkip([nn.Parameter(torch.empty(inner))])
        self.pre_avg_layernorm1 = HymbaFirstNorm(inner, eps)
        self.pre_avg_layernorm2 = HymbaSecondNorm(inner, eps)
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=bias)

    def forward(
        self,
        hidden: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        documents: Documents,
        tables: tuple[Tensor, Tensor] | None,
        cache: HymbaCache | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mix the tokens of each text.

        Args:
            hidden: Normalized hidden states, ``(rows, d)``.
            key: The keys that this layer reuses, or None if it computes its own.
            value: The values that this layer reuses, or None if it computes its own.
            documents: The layout of the packed texts.
            tables: The cosines and sines from `rotary_tables`, or None without RoPE.
            cache: The cache of generation, or None.

        Returns:
            ``(rows, d)``, and the keys and values used.
        """
        if cache is not None and self._continues_by_one_token(documents):
            return self._one_token(hidden, documents, tables, cache)
        query, new_key, new_value, x, gate = self.in_proj(hidden).split(self.widths, -1)

        query = self._heads(query, self.head_dim, "q_norm", tables)
        if key is None or value is None:
            key = self._heads(new_key, self.head_dim, "k_norm", tables)
            value = new_value.unflatten(-1, (-1, self.value_dim))
            if cache is not None:
                self._store(key, value, documents, cache)

        if cache is None or documents.past is None:
            attended = packed_attention(query, key, value, documents, self.window)
        else:
            visible = cache.seen(self.source)
            hidden_keys = cache.hidden(self.source, documents, self.window)
            meta = cache.meta.get(self.source)
            grid = cached_attention(documents.to_grid(query), meta, visible.key, visible.value, hidden_keys)
            attended = documents.from_grid(grid)

        scanned = self._ssm(x, gate, documents, cache)
        joined = self.pre_avg_layernorm1(attended, partial(self.pre_avg_layernorm2, scanned))
        return self.out_proj(joined), key, value

    small_modules = (
        ("conv1d", HymbaConvolution),
        ("dt_layernorm", HymbaRMSNorm),
        ("B_layernorm", HymbaRMSNorm),
        ("C_layernorm", HymbaRMSNorm),
        ("A_log", HymbaDecay),
        ("D", HymbaSkip),
    )

    def _continues_by_one_token(self, documents: Documents) -> bool:
        """Return whether `_one_token` applies: no gradients, and small modules that nothing adapts or moves."""
        if torch.is_grad_enabled() or documents.past is None or not documents.has_one_token_each:
            return False
        own: dict[str, Any] = self._modules  # attributes of a module take much longer
        for name, kind in self.small_modules:
            if name in own and not is_plain(own[name], kind):
                return False
        heads = self.self_attn
        return (
            is_plain(own["dt_proj"]._modules["0"], HymbaTimeStep)
            and (heads is None or is_plain(heads.q_norm, HymbaHeadNorm))
            and (heads is None or is_plain(heads.k_norm, HymbaHeadNorm))
        )

    def _one_token(
        self, hidden: Tensor, documents: Documents, tables: tuple[Tensor, Tensor] | None, cache: HymbaCache
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mix one new token of each text, with all that is between the matrix products in a few operations."""
        assert documents.past is not None
        new_key, new_value = cache.reserve(self.layer) if self.source == self.layer else (None, None)
        key, value = cache.keys[self.source], cache.values[self.source]

        projected = project(self.in_proj, hidden)
        q_norm, k_norm = (None, None) if self.self_attn is None else self.self_attn.weights
        heads = self.head_dim, q_norm, k_norm, self.eps, tables, new_key, new_value, documents.past
        convolution = self.conv1d.weight.squeeze(1), self.conv1d.bias, cache.tails[self.layer]
        query, x = prepare(TokenInputs(projected, *heads, *convolution))
        attended = attend(query, cache.meta.get(self.source), key, value, documents.past, self.window)

        modules = self.dt_layernorm, self.B_layernorm, self.C_layernorm
        dt_norm, B_norm, C_norm = (None if module is None else module.weight for module in modules)
        inputs = x, project(self.x_proj[0], x), projected[:, -x.shape[1] :], dt_norm, B_norm, C_norm, self.eps
        step: Any = self.dt_proj[0]
        scanned = update(
            StateInputs(*inputs, step.weight, step.bias, self.A_log[0], self.D[0], cache.states[self.layer])
        )
        joined = self.pre_avg_layernorm1(attended, partial(self.pre_avg_layernorm2, scanned))
        return project(self.out_proj, joined), key, value

    def _heads(self, flat: Tensor, width: int, norm: str, tables: tuple[Tensor, Tensor] | None) -> Tensor:
        heads = flat.unflatten(-1, (-1, width))
        if self.self_attn is not None:
            normed: Tensor = getattr(self.self_attn, norm)(heads, tables)
            return normed
        return heads if tables is None else rotate(heads, tables)

    def _store(self, key: Tensor, value: Tensor, documents: Documents, cache: HymbaCache) -> None:
        meta = documents.num_meta
        if meta:
            cache.store_meta(self.layer, key[:meta], value[:meta])
        cache.extend(self.layer, key[meta:], value[meta:], documents)

    def _ssm(self, x: Tensor, gate: Tensor, documents: Documents, cache: HymbaCache | None) -> Tensor:
        tails = cache.tails.get(self.layer) if cache is not None else None
        states = cache.states.get(self.layer) if cache is not None else None
        x, tails = self.conv1d(x, documents, tails, keep=cache is not None)

        dt, B, C = self.x_proj[0](x).split(self.state_widths, -1)
        if self.dt_layernorm is not None and self.B_layernorm is not None and self.C_layernorm is not None:
            dt, B, C = self.dt_layernorm(dt), self.B_layernorm(B), self.C_layernorm(C)

        y: Tensor
        y, states = self.D(x, self.dt_proj[0](dt), self.A_log(), B, C, gate, documents, states)
        if cache is not None:
            cache.store_ssm(self.layer, tails, states)
        return y


class HymbaDecoderLayer(GradientCheckpointingLayer):
    """The mixer, then the MLP, each after a norm and added to the residual stream."""

    def __init__(self, config: HymbaConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = HymbaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mamba = HymbaMixer(config, layer)
        self.pre_moe_layernorm = HymbaSumNorm(config.hidden_size, config.rms_norm_eps)
        self.moe = HymbaExperts(config)

    def forward(
        self,
        hidden: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        documents: Documents,
        tables: tuple[Tensor, Tensor] | None,
        cache: HymbaCache | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Apply the layer to the residual stream; see `HymbaMixer.forward` for the arguments."""
        documents.check_device(hidden.device)
        mixed, key, value = self.mamba(self.input_layernorm(hidden), key, value, documents, tables, cache)
        hidden, normed = self.pre_moe_layernorm(hidden, mixed)
        if hidden.is_cpu or torch.is_grad_enabled() or not self._adds_unobserved():
            return hidden + self.moe(normed), key, value
        # One launch less: the last product of the layer adds its result to the residual stream.
        return self.moe(normed, hidden), key, value

    def _adds_unobserved(self) -> bool:
        """Return whether no hook sees the sum of the residual stream and its update."""
        own: dict[str, Any] = self._modules  # attributes of a module take much longer
        return (
            is_plain(own["pre_moe_layernorm"], HymbaSumNorm)
            and is_plain(own["moe"], HymbaExperts)
            and is_plain(own["moe"]._modules["experts"]._modules["0"], HymbaMLP)
        )
