"""The properties of every Hymba model for transformers: its initialization, and the names of its weights in files."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from .cache import CACHE_NAME
from .configuration_hymba import HymbaConfig
from .layers import HymbaDecay, HymbaSkip, HymbaTimeStep

logger = logging.get_logger(__name__)

HOW_TO_LOAD = (
    "checkpoints store the meta tokens under another name, which only transformers translates; load the model with "
    "from_pretrained(folder, device_map=...) instead of accelerate's load_checkpoint_and_dispatch"
)

# Released checkpoints store the meta tokens as a bare parameter; here they are an embedding, which adapters can target.
# The lookahead does not match names that are already those of an embedding, including those of an adapter.
register_checkpoint_conversion_mapping(
    "hymba", [WeightRenaming(r"memory_tokens(?!\.)", "memory_tokens.weight")], overwrite=True
)


class HymbaPreTrainedModel(PreTrainedModel):
    """The properties and initialization of Hymba models for transformers."""

    config_class = HymbaConfig
    config: HymbaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("HymbaDecoderLayer",)
    _skip_keys_device_placement = (CACHE_NAME,)
    # The packed layout has its own attention; transformers only needs the name of an implementation that it knows.
    _supports_sdpa = True
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = False
    _can_compile_fullgraph = False
    # `generate` then refuses assisted decoding, because an SSM state cannot be reset to an earlier token.
    _is_stateful = True

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move or cast the model as transformers does.

        Raises:
            ValueError: If a library has loaded every weight but the meta tokens, which have another name in files.
        """
        try:
            return super().to(*args, **kwargs)
        except NotImplementedError as error:
            empty = {name: parameter.is_meta for name, parameter in self.named_parameters()}
            if all(empty.values()) or not any(empty[name] for name in empty if "memory_tokens" in name):
                raise
            raise ValueError(f"the meta tokens were not loaded: {HOW_TO_LOAD}") from error

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *_: Any, **__: Any) -> str:
        """Warn once of a request for another implementation than the only one that transformers may record."""
        if attn_implementation not in (None, "sdpa"):
            logger.warning_once(
                f"attn_implementation={attn_implementation!r} has no effect: Hymba computes attention by its own "
                "kernels; use_kernels(attention=...) of this package chooses among them"
            )
        return "sdpa"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers calls this only for modules that own parameters, and considers the others initialized.
        super()._init_weights(module)
        if isinstance(module, nn.Conv1d):
            init.uniform_(module.weight, -(module.kernel_size[0] ** -0.5), module.kernel_size[0] ** -0.5)
        elif isinstance(module, HymbaTimeStep):
            init.uniform_(module.weight, -(module.in_features**-0.5), module.in_features**-0.5)
            # Time steps are spread evenly, on a log scale, from 0.001 to 0.1; the bias is their inverse softplus.
            steps = torch.exp(torch.rand_like(module.bias, dtype=torch.float32) * math.log(100) + math.log(0.001))
            init.copy_(module.bias, steps + torch.log(-torch.expm1(-steps)))
        elif isinstance(module, HymbaDecay):
            rates = torch.arange(1, module[0].shape[1] + 1, dtype=torch.float32, device=module[0].device).log()
            init.copy_(module[0], rates.expand_as(module[0]))
        elif isinstance(module, HymbaSkip):
            init.ones_(module[0])
