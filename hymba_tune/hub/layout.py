"""Writes the files of an exported model: weights, configuration, code and tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import hymba_tune.model as code
from hymba_tune.errors import ConfigError
from hymba_tune.schemes import stored_quantization

Format = Literal["kit", "hymba"]
SHARD = "2GB"
"""The maximum size of a file of weights. An interrupted upload resumes after the last complete file."""
RELEASED = "nvidia/Hymba-1.5B-Base"
"""The Hub repository with NVIDIA's code."""
RELEASED_CLASSES = {
    "AutoConfig": "configuration_hymba.HymbaConfig",
    "AutoModelForCausalLM": "modeling_hymba.HymbaForCausalLM",
}
"""The classes of NVIDIA's code, as in the released config.json."""
CLASSES = RELEASED_CLASSES | {
    "AutoModel": "modeling_hymba.HymbaModel",
    "AutoModelForSequenceClassification": "classification.HymbaForSequenceClassification",
    "AutoModelForTokenClassification": "classification.HymbaForTokenClassification",
}
"""The classes of hymba-tune's code, by Auto class."""
KEYS = (
    *("architectures", "attention_dropout", "attn_hidden_size", "attn_implementation_new", "bos_token_id"),
    *("calc_logits_for_entire_prompt", "eos_token_id", "global_attn_idx", "hidden_act", "hidden_size"),
    *("initializer_range", "intermediate_size", "kq_head_dim", "kq_norm", "kv_reuse_every_i_layer", "kv_reuse_group"),
    *("kv_weight_reuse", "mamba_conv_bias", "mamba_d_conv", "mamba_d_state", "mamba_dt_rank", "mamba_expand"),
    *("mamba_inner_layernorms", "mamba_proj_bias", "max_position_embeddings", "memory_tokens_interspersed_every"),
    *("mlp_hidden_act", "model_type", "num_attention_heads", "num_experts", "num_experts_per_tok", "num_hidden_layers"),
    *("num_key_value_heads", "num_mamba", "num_memory_tokens", "orig_max_position_embeddings", "output_router_logits"),
    *("pad_token_id", "rms_norm_eps", "rope", "rope_theta", "rope_type", "router_aux_loss_coef", "seq_length"),
    *("sliding_window", "tie_word_embeddings", "use_mamba_kernels", "v_head_dim", "vocab_size"),
)
"""Keys of the released config.json with the same meaning in `HymbaConfig`."""


def check_released_format(
    name: str, config: Any, dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase, *, adapter: bool
) -> None:
    """Check that NVIDIA's code can run a model, and that the tokenizers library of its time can read the tokenizer.

    Args:
        name: The name of the model, for messages.
        config: The configuration of the weights, below all adapters.
        dtype: The dtype in which the model will be written.
        tokenizer: The tokenizer.
        adapter: Whether the model has an adapter, which is merged into weights that are not quantized.

    Raises:
        ConfigError: If one of them cannot.
    """
    problem = None
    fix = "leave it out"
    if stored_quantization(config) and not adapter:
        problem = f"{name} is quantized, and NVIDIA's code is untested with quantized weights"
        fix += ", or export the model that it was quantized from"
    elif not config.num_memory_tokens:
        problem = f"{name} has no meta tokens, and the attention of NVIDIA's code fails without them"
    elif dtype is torch.float32:
        problem = f"{name} would be written in float32, and NVIDIA's code cannot compute in it"
        fix = "--dtype bfloat16"
    elif spaced := [pair for pair in _merges(tokenizer) if any(" " in piece for piece in pair)]:
        problem = f"the tokenizer of {name} merges {spaced[0]}, and tokenizers 0.19 reads no piece with a space"
    if problem is not None:
        raise ConfigError(f"--format hymba: {problem}.", fix=fix)


def write_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, layout: Format, base: str | None
) -> None:
    """Write weights under the released names, configuration, generation settings, tokenizer and code.

    Args:
        model: The model, without an adapter.
        tokenizer: The tokenizer, with a chat template.
        folder: An existing folder.
        layout: The format: "kit" with hymba-tune's code, or "hymba" for NVIDIA's code.
        base: The base model, if known. If it is one of NVIDIA's, the configuration refers to the code in its
            repository.
    """
    generation = model.generation_config
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(generation, name, getattr(tokenizer, name))
    model.save_pretrained(folder, max_shard_size=SHARD)
    write_tokenizer(tokenizer, folder, layout)
    if layout == "kit":
        _update(folder / "config.json", auto_map=CLASSES)
        for file in Path(str(code.__file__)).parent.glob("*.py"):
            if file.name != "__init__.py":
                shutil.copyfile(file, folder / file.name)
        return
    released = base if base and base.startswith("nvidia/Hymba") else RELEASED
    _write(folder / "config.json", released_config(model.config, released))
    _update(folder / "generation_config.json", transformers_version="4.44.0", use_cache=False)


def released_config(config: Any, repository: str) -> dict[str, Any]:
    """Return a configuration with the keys of the released config.json, for NVIDIA's code and transformers 4.44.

    Args:
        config: A `HymbaConfig`.
        repository: The Hub repository with NVIDIA's code.
    """
    layers = config.num_hidden_layers
    return {name: getattr(config, name) for name in KEYS} | {
        "attn_implementation": "flex",
        "auto_map": {auto: f"{repository}--{name}" for auto, name in RELEASED_CLASSES.items()},
        "conv_dim": {str(layer): config.ssm_size for layer in range(layers)},
        "layer_type": ["h"] * layers,
        "torch_dtype": str(config.dtype).removeprefix("torch."),
        "transformers_version": "4.44.0",
        "use_cache": False,
    }


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, layout: Format = "kit") -> None:
    """Write a tokenizer that transformers loads with the same ids.

    Args:
        tokenizer: The tokenizer, with a chat template.
        folder: An existing folder.
        layout: The format. For "hymba", transformers 4.44 and tokenizers 0.19 read it: the template is written to
            tokenizer_config.json, and each merge as one text.
    """
    tokenizer.backend_tokenizer.no_padding()  # set by the last batch, and not a property of the tokenizer
    tokenizer.save_pretrained(folder, save_jinja_files=layout == "kit")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    # Every version of transformers has this class, which loads tokenizer.json unchanged. Older ones add token_type_ids,
    # which the model does not take. The removed settings describe how the tokenizer was loaded on this machine.
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
    _write(path, {name: value for name, value in settings.items() if name not in ("is_local", "local_files_only")})
    if layout == "hymba":
        path = folder / "tokenizer.json"
        contents = json.loads(path.read_text(encoding="utf-8"))
        if merges := _merges(tokenizer):
            contents["model"]["merges"] = [" ".join(pair) for pair in merges]
        path.write_text(json.dumps(contents, indent=2, ensure_ascii=False), encoding="utf-8")


def _merges(tokenizer: PreTrainedTokenizerBase) -> list[list[str]]:
    """Return the merges of a byte-pair encoding, as tokenizers writes them since 0.20."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return list(model.get("merges", []))


def _update(path: Path, **values: Any) -> None:
    _write(path, json.loads(path.read_text(encoding="utf-8")) | values)


def _write(path: Path, settings: dict[str, Any]) -> None:
    path.write_text(json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
