"""Hymba for transformers: parallel attention and Mamba heads, after learned meta tokens (arXiv 2411.13676).

Hidden states are packed, ``(M + T, d)``: the M meta tokens once, then the T tokens of all texts (see `Documents`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES
from transformers.utils import logging

from .adapter_errors import adapter_errors_explained
from .autocast import at_least_float32
from .cache import CACHE_NAME, HymbaCache
from .configuration_hymba import HymbaConfig
from .documents import NO_PREFIX, Documents, continue_documents, find_documents
from .head import HymbaHead, head_loss, head_scores
from .layers import HymbaDecoderLayer, HymbaRMSNorm
from .log_probs import TokenScores
from .pretrained import HOW_TO_LOAD, HymbaPreTrainedModel
from .rotary import rotary_base, rotary_tables
from .unread_inputs import check_unread

logger = logging.get_logger(__name__)

# `Trainer` uses the second name to decide whether label smoothing shifts the labels.
MODEL_MAPPING_NAMES["hymba"] = "HymbaModel"
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["hymba"] = "HymbaForCausalLM"


class HymbaModel(HymbaPreTrainedModel):
    """The layers between the embeddings and the head."""

    def __init__(self, config: HymbaConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        meta = config.num_memory_tokens
        self.memory_tokens = nn.Embedding(meta, config.hidden_size) if meta else None
        if (
            self.memory_tokens is not None
            and self.memory_tokens.weight.is_meta
            and torch.get_default_device().type != "meta"
        ):
            # transformers sets the default device; accelerate's init_empty_weights moves each weight instead. What it
            # then fails with, over several devices or the disk, names neither the meta tokens nor a way out.
            logger.warning_once(f"a Hymba without weights: {HOW_TO_LOAD}")
        self.layers = nn.ModuleList(HymbaDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.final_layernorm = HymbaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.register_load_state_dict_pre_hook(_rename_memory_tokens)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: HymbaCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        documents: Documents | None = None,
        return_dict: bool | None = None,
        past_key_values: HymbaCache | None = None,
        **others: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Run the layers over a batch in any layout.

        Args:
            input_ids: ``(B, L)``.
            attention_mask: ``(B, L)``, or ``(B, past + L)`` with a cache; 0 at padding, on either side.
            position_ids: ``(B, L)``, restarting at 0 where another text begins in a row. Meta tokens are not counted.
            cache: The cache of the texts to continue.
            inputs_embeds: ``(B, L, d)`` instead of ``input_ids``.
            use_cache: Whether to return a cache. The default is False.
            output_hidden_states: Whether to return the hidden states before each layer and after the final norm.
            cu_seq_lens_q: The offsets of the texts among the tokens of the batch, without padding.
            documents: The result of `find_documents` for the inputs above, if the caller already has it.
            return_dict: Whether to return a dictionary or a tuple. The configuration has the default of both.
            past_key_values: The name of ``cache`` in transformers before 5.24.
            **others: Inputs that libraries pass to every model; see `check_unread`.

        Returns:
            Hidden states ``(B, L, d)``, zero at padding.

        Raises:
            ValueError: If an input is malformed; the message names the row and what was expected.
        """
        check_unread(HymbaModel.forward, others, output_attentions=self.config.output_attentions)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        embeds: Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = self._choose_cache(cache, past_key_values, use_cache)
        if documents is None:
            documents = self.find_documents(embeds, attention_mask, position_ids, cu_seq_lens_q, cache)

        cached = cache.get_seq_length() if cache is not None else 0
        limit = self.config.max_position_embeddings
        if cached + max(documents.lengths) > limit:
            logger.warning_once(f"a text is longer than max_position_embeddings, {limit} tokens")

        with adapter_errors_explained():
            hidden_states = self._run_by_base(documents.pack(embeds), documents, cache, bool(output_hidden_states))
        if cache is not None:
            cache.advance(documents)
        output = BaseModelOutputWithPast(
            last_hidden_state=hidden_states[-1],
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            **{CACHE_NAME: cache},
        )
        return output if _returns_dict(return_dict, self.config) else output.to_tuple()

    def _choose_cache(
        self, cache: HymbaCache | None, past_key_values: HymbaCache | None, use_cache: bool | None
    ) -> HymbaCache | None:
        """Return the cache to fill: the caller's, a new one if requested, and none under gradient checkpointing.

        Raises:
            ValueError: If the caller's cache is of another type, or gradient checkpointing cannot continue its texts.
        """
        given = [each for each in (cache, past_key_values) if each is not None]
        for each in given:
            if not isinstance(each, HymbaCache):
                raise ValueError(f"the cache is a {type(each).__name__}; expected a HymbaCache. {NO_PREFIX}")
        cache = given[0] if given else HymbaCache(self.config) if use_cache else None
        if cache is None or not (self.gradient_checkpointing and self.training and torch.is_grad_enabled()):
            return cache
        if cache.get_seq_length():
            raise ValueError(
                "gradient checkpointing runs layers again in the backward, which cannot continue the texts of a cache; "
                "pass whole texts, or call gradient_checkpointing_disable()"
            )
        logger.warning_once("use_cache=True has no effect under gradient checkpointing; no cache is returned")
        return None

    def find_documents(
        self,
        inputs: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cu_seq_lens_q: Tensor | None,
        cache: HymbaCache | None,
    ) -> Documents:
        """Return the layout of the texts in ``(B, L, ...)`` inputs; see `forward` for the arguments and errors."""
        shape = (inputs.shape[0], inputs.shape[1])
        meta = self.config.num_memory_tokens
        if cache is not None and self.config.rope_type == "dynamic_ntk":
            raise ValueError(
                "rope_type dynamic_ntk rotates all keys anew as a text grows, so no cache is valid; use_cache=False"
            )
        if cache is not None and cache.lengths is not None:
            return continue_documents(shape, cache.lengths, num_meta=meta, attention_mask=attention_mask)
        documents = find_documents(
            shape,
            inputs.device,
            num_meta=meta,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cu_seqlens=cu_seq_lens_q,
            may_be_empty=cache is not None,
        )
        if cache is not None and len(documents.lengths) != shape[0]:
            raise ValueError(f"{len(documents.lengths)} texts in {shape[0]} rows; a cache needs one text per row")
        return documents

    def _run_by_base(
        self, embeds: Tensor, documents: Documents, cache: HymbaCache | None, keep_all: bool
    ) -> list[Tensor]:
        """Run one packed pass for each RoPE base; with dynamic_ntk, each long text and its meta tokens have one.

        Returns:
            The results of `_run` for the whole batch.
        """
        meta = self.config.num_memory_tokens
        bases = [rotary_base(self.config, meta + length) for length in documents.lengths]
        if len(set(bases)) == 1:
            return self._run(embeds, documents, bases[0], cache, keep_all)

        passes, token_indices = [], []
        for base in dict.fromkeys(bases):
            selected, indices = documents.select([i for i, other in enumerate(bases) if other == base])
            passes.append(self._run(embeds[indices], selected, base, cache, keep_all))
            token_indices.append(indices)
        order = torch.cat(token_indices).argsort()
        joined = [torch.cat(hidden, 1)[0, order] for hidden in zip(*passes, strict=True)]
        return [documents.unpack(hidden) for hidden in joined]

    def _run(
        self, embeds: Tensor, documents: Documents, base: float, cache: HymbaCache | None, keep_all: bool
    ) -> list[Tensor]:
        """Run the layers on ``(T, d)`` embeddings.

        Returns:
            The hidden states ``(B, L, d)`` after the final norm; with ``keep_all``, those before each layer come first.
        """
        hidden = embeds
        meta = documents.num_meta
        if self.memory_tokens is not None and meta:
            tokens = self.memory_tokens(torch.arange(meta, device=embeds.device))
            hidden = torch.cat([tokens.to(embeds.dtype), embeds])
        tables = None
        if self.config.rope:
            tables = rotary_tables(documents.positions, base, self.config.head_dim, hidden.dtype)

        keys_and_values: dict[int, tuple[Tensor | None, Tensor | None]] = {}
        hidden_states = []
        for index, layer in enumerate(self.layers):
            if keep_all:
                # The layer reads what the caller gets, so that the caller can ask for its gradient.
                hidden_states.append(documents.unpack(hidden[meta:]))
                hidden = torch.cat([hidden[:meta], documents.pack(hidden_states[-1])])
            key, value = keys_and_values.get(self.config.kv_source(index), (None, None))
            hidden, key, value = layer(hidden, key, value, documents, tables, cache)
            keys_and_values[index] = key, value
        return [*hidden_states, documents.unpack(self.final_layernorm(hidden[meta:]))]


def _rename_memory_tokens(_: nn.Module, state_dict: dict[str, Tensor], prefix: str, *__: Any) -> None:
    """Apply the conversion mapping to a plain ``load_state_dict`` of a released checkpoint."""
    if (name := f"{prefix}memory_tokens") in state_dict:
        state_dict[f"{name}.weight"] = state_dict.pop(name)


def _returns_dict(return_dict: bool | None, config: HymbaConfig) -> bool:
    return (config.return_dict if return_dict is None else return_dict) is not False


class HymbaForCausalLM(HymbaPreTrainedModel, GenerationMixin):
    """Hymba with its head, for training and generation."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (transformers' way)

    def __init__(self, config: HymbaConfig) -> None:
        super().__init__(config)
        self.model = HymbaModel(config)
        self.lm_head = HymbaHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: HymbaCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        loss_weights: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        skip_logits: bool = False,
        fused_lm_head: bool = False,
        return_dict: bool | None = None,
        past_key_values: HymbaCache | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast | TokenScores | tuple[Any, ...]:
        """Predict the next tokens; see `HymbaModel.forward` for the layouts of the inputs.

        Args:
            input_ids: ``(B, L)``.
            attention_mask: ``(B, L)``, or ``(B, past + L)`` with a cache.
            position_ids: ``(B, L)``.
            cache: The cache of the texts to continue.
            inputs_embeds: ``(B, L, d)`` instead of ``input_ids``.
            labels: ``(B, L)``, -100 at tokens without loss. The first token of a text is never a target.
            loss_weights: ``(B, L)``, the weight of each label. The default is 1.
            use_cache: Whether to return a cache.
            output_hidden_states: Whether to return hidden states.
            cu_seq_lens_q: The offsets of the texts among the tokens of the batch, without padding.
            logits_to_keep: The number of last columns to compute logits for, or their indices; 0 for all columns.
            num_items_in_batch: The divisor of the summed loss. The default is the sum of the weights of the labels.
            skip_logits: Whether to return no logits. With labels, they are then never held for all tokens at once.
            fused_lm_head: Whether to return the `TokenScores` of the labels, as TRL's preference trainers request.
            return_dict: Whether to return a dictionary or a tuple. The default is that of the configuration.
            past_key_values: The name of ``cache`` in transformers before 5.24.
            **others: Inputs that libraries pass to every model; see `check_unread`. One of them may be ``shift_labels``
                ``(B, L)``, the token that each position predicts: trainers that split rows pass it instead of
                ``labels``. It is not a parameter, because `Trainer` would then expect it in every batch.

        Returns:
            The loss in nats per token, and float32 logits ``(B, L, V)``.

        Raises:
            ValueError: If an input is malformed, or if ``fused_lm_head`` is set and the head is adapted or quantized.
        """
        shift_labels = others.pop("shift_labels", None)
        check_unread(HymbaForCausalLM.forward, others, output_attentions=self.config.output_attentions)
        inputs = inputs_embeds if input_ids is None else input_ids
        if inputs is None:
            raise ValueError("give either input_ids or inputs_embeds")
        cache = self.model._choose_cache(cache, past_key_values, use_cache)
        documents = self.model.find_documents(inputs, attention_mask, position_ids, cu_seq_lens_q, cache)
        outputs = self.model(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            cache=cache,
            output_hidden_states=output_hidden_states,
            documents=documents,
            return_dict=True,
        )

        hidden: Tensor = outputs.last_hidden_state
        shifted = shift_labels is not None
        labels = shift_labels if shifted else labels
        if fused_lm_head and labels is not None:
            return head_scores(self.lm_head, hidden, labels, shifted=shifted)
        loss = None
        if labels is not None:
            loss = head_loss(
                self.lm_head, hidden, labels, documents, shifted=shifted, weights=loss_weights, items=num_items_in_batch
            )

        logits = None
        if not skip_logits:
            columns = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = at_least_float32(self.lm_head(hidden[:, columns]))
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, **{CACHE_NAME: cache}
        )
        return output if _returns_dict(return_dict, self.config) else output.to_tuple()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Set the head. `resize_token_embeddings` passes a plain linear layer, which becomes a `HymbaHead`."""
        if type(new_embeddings) is nn.Linear:
            new_embeddings.__class__ = HymbaHead
        super().set_output_embeddings(new_embeddings)

    def adjust_generation_fn(self, *args: Any, **kwargs: Any) -> None:
        """Read the generation settings as transformers does, and enable the cache, which the released ones disable."""
        super().adjust_generation_fn(*args, **kwargs)
        self.generation_config.use_cache = True

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Prepare a step as transformers does, with prompts padded on the left, since `generate` appends."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        # Every row is one text, so the mask suffices; transformers' positions are wrong after padding on the right.
        inputs["position_ids"] = None
        mask = inputs.get("attention_mask")
        if mask is None or mask[:, -1].all():
            return inputs

        name = "input_ids" if inputs.get("inputs_embeds") is None else "inputs_embeds"
        tokens = inputs[name]
        mask = mask[:, -tokens.shape[1] :]
        order = mask.int().argsort(dim=1, stable=True)  # padding first, then the tokens in order
        rows = torch.arange(len(order), device=order.device)[:, None]
        return inputs | {name: tokens[rows, order], "attention_mask": mask[rows, order]}

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *_: Any, **__: Any
    ) -> None:
        """Provide a `HymbaCache`: transformers' caches support neither shared meta tokens nor rows of unequal length.

        Raises:
            ValueError: If the settings name another type of cache.
        """
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation is {generation_config.cache_implementation!r}; "
                "Hymba has its own cache, so leave it out"
            )
        if self.config.rope_type == "dynamic_ntk":
            generation_config.use_cache = False
        if (user_cache := model_kwargs.get(CACHE_NAME)) is not None:
            user_cache._is_user_defined = True  # `generate` returns a cache with this mark to its user
        elif generation_config.use_cache:
            model_kwargs[CACHE_NAME] = HymbaCache(self.config)
