"""The calls of other packages' kernels fit the signatures that these packages publish.

The names of parameters were read from the packages with `ast`; nothing of theirs is imported. To follow a new version,
read its names and run the tests.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from inspect import Parameter, Signature
from types import ModuleType
from typing import Any

import pytest
import torch

from hymba_tune.model import attention_flash, hub_kernels
from hymba_tune.model.attention_flash import flash_attention
from hymba_tune.model.convolution_causal_conv1d import causal_conv1d_run
from hymba_tune.model.scan_inputs import ScanInputs
from hymba_tune.model.scan_mamba_ssm import mamba_ssm_scan
from tests.model.attention_inputs import documents
from tests.reference import fake_kernels

SIGNATURES = {
    "flash_attn 2.8.3 _flash_attn_varlen_forward": (
        "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p softmax_scale causal window_size_left="
        " window_size_right= softcap= alibi_slopes= return_softmax= block_table= leftpad_k= seqused_k= zero_tensors="
    ),
    "flash_attn 2.8.3 _flash_attn_varlen_backward": (
        "dout q k v out softmax_lse dq dk dv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p"
        " softmax_scale causal window_size_left window_size_right softcap alibi_slopes deterministic rng_state="
        " zero_tensors="
    ),
    "flash_attn.cute 4.0.0b36 _flash_attn_fwd": (
        "q k v qv= cu_seqlens_q= cu_seqlens_k= seqused_q= seqused_k= max_seqlen_q= max_seqlen_k= min_seqlen_k="
        " page_table= softmax_scale= causal= softcap= window_size_left= window_size_right= learnable_sink= tile_mn="
        " mma_pv_is_rs= intra_wg_overlap= num_threads= num_splits= pack_gqa= _arch= score_mod= mask_mod="
        " block_sparse_tensors= return_lse= out= lse= aux_tensors= aux_scalars= q_descale= k_descale= v_descale="
        " gather_kv_indices= scheduler_metadata= seqlen_k_per_split= disable_scheduler_metadata="
        " gather_bwd_recompute_p="
    ),
    "flash_attn.cute 4.0.0b36 _flash_attn_bwd": (
        "q k v out dout lse softmax_scale= causal= softcap= window_size_left= window_size_right= m_block_size="
        " n_block_size= num_threads= pack_gqa= num_stages_Q= num_stages_dO= SdP_swapAB= dKV_swapAB= dQ_swapAB="
        " AtomLayoutMSdP= AtomLayoutNdKV= AtomLayoutMdQ= V_in_regs= cu_seqlens_q= cu_seqlens_k= seqused_q= seqused_k="
        " max_seqlen_q= max_seqlen_k= deterministic= dq= dk= dv= score_mod= score_mod_bwd= mask_mod= aux_tensors="
        " aux_scalars= block_sparse_tensors= dlse= learnable_sink="
    ),
    "causal_conv1d 1.7.0 causal_conv1d_fn": (
        "x weight bias= seq_idx= initial_states= return_final_states= final_states_out= activation="
    ),
    "mamba_ssm 2.3.2 selective_scan_fn": "u delta A B C D= z= delta_bias= delta_softplus= return_last_state=",
    "kernels 0.17.2 get_kernel": ("repo_id * revision= version= backend= user_agent= trust_remote_code= check_arch="),
}
"""The parameters of each function, by package, version and name. Those with = are optional; those after * are named."""


def signature(names: str) -> Signature:
    """Return a signature from the notation of `SIGNATURES`."""
    before, _, after = names.partition("* ")
    kinds = ((before, Parameter.POSITIONAL_OR_KEYWORD), (after, Parameter.KEYWORD_ONLY))
    return Signature(
        Parameter(name.rstrip("="), kind, default=None if name.endswith("=") else Parameter.empty)
        for part, kind in kinds
        for name in part.split()
    )


def bind_calls(monkeypatch: pytest.MonkeyPatch, modules: list[ModuleType]) -> list[str]:
    """Install modules whose functions bind their arguments to what is published, and return the names of the called."""
    called: list[str] = []

    def bound(names: str, published: Signature, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            published.bind(*arguments, **named)
            called.append(names)
            return function(*arguments, **named)

        return call

    published = {name.split()[-1]: name for name in SIGNATURES}
    for module in modules:
        for function in published.keys() & vars(module).keys():
            name = published[function]
            setattr(module, function, bound(name, signature(SIGNATURES[name]), getattr(module, function)))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return called


@pytest.mark.parametrize(
    ("modules", "find", "package"),
    [
        (fake_kernels.flash_attn_modules, attention_flash._flash_attn_2, "flash_attn "),
        (fake_kernels.flash_attn_4_modules, attention_flash._flash_attn_4, "flash_attn.cute "),
    ],
    ids=["flash-attn 2", "flash-attn 4"],
)
@pytest.mark.parametrize("window", [None, 7])
def test_flash_attn(
    monkeypatch: pytest.MonkeyPatch, modules: Callable[..., Any], find: Callable[..., Any], package: str, window: int
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    monkeypatch.setattr(attention_flash, "_provider", lambda *_, **__: find())
    called = bind_calls(monkeypatch, modules())
    query, key, value = (torch.randn(35, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    flash_attention(query, key, value, documents([9, 21], 5), window).sum().backward()
    assert {*called} == {name for name in SIGNATURES if name.startswith(package)}


def test_causal_conv1d(monkeypatch: pytest.MonkeyPatch) -> None:
    called = bind_calls(monkeypatch, fake_kernels.causal_conv1d_modules())
    causal_conv1d_run(torch.randn(9, 8), torch.randn(8, 4), torch.randn(8))
    assert {*called} == {name for name in SIGNATURES if name.startswith("causal_conv1d ")}


def test_mamba_ssm(monkeypatch: pytest.MonkeyPatch) -> None:
    called = bind_calls(monkeypatch, fake_kernels.mamba_ssm_modules())
    u, dt, z = torch.randn(3, 9, 4)
    B, C = torch.randn(2, 9, 3)
    offsets = (0, 4, 9)
    mamba_ssm_scan(ScanInputs(u, dt, -torch.rand(4, 3), B, C, torch.randn(4), z, torch.randn(4), None, offsets))
    assert {*called} == {name for name in SIGNATURES if name.startswith("mamba_ssm ")}


def test_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModuleType("kernels")
    package.get_kernel = lambda repo_id, **_: ModuleType(repo_id)
    called = bind_calls(monkeypatch, [package])
    hub_kernels.hub_kernel.cache_clear()
    for name in hub_kernels.VERSIONS:
        kernel = hub_kernels.hub_kernel(name)
        assert kernel is not None
        assert kernel.__name__ == f"kernels-community/{name}"
    hub_kernels.hub_kernel.cache_clear()
    assert len(called) == len(hub_kernels.VERSIONS)


@pytest.mark.parametrize("arguments", [{"x": 1}, {"x": 1, "weight": 2, "length": 3}], ids=["too few", "unknown"])
def test_a_call_that_does_not_fit_is_found(monkeypatch: pytest.MonkeyPatch, arguments: dict[str, int]) -> None:
    (package,) = fake_kernels.causal_conv1d_modules()
    bind_calls(monkeypatch, [package])
    with pytest.raises(TypeError, match=r"missing a required argument: .weight.|unexpected keyword argument .length."):
        package.causal_conv1d_fn(**arguments)
