"""Hymba with a head that classifies whole texts, as reward models do, or each of their tokens."""

from __future__ import annotations

import copy
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

from .autocast import at_least_float32, without_autocast
from .cache import CACHE_NAME, HymbaCache
from .configuration_hymba import HymbaConfig
from .modeling_hymba import HymbaForCausalLM, HymbaModel
from .pretrained import HymbaPreTrainedModel

# Pipelines use these names to decide whether a model has their head.
MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES["hymba"] = "HymbaForSequenceClassification"
MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES["hymba"] = "HymbaForTokenClassification"


def _with_named_outputs(_: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, Any]:
    """Let the layers return a dictionary whatever the configuration says: the generic heads read its attributes."""
    return inputs, options | {"return_dict": True}


class HymbaScore(nn.Linear):
    """The output layer of a classifier, in float32: in bfloat16, texts of nearly the same score would be equal."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the scores ``(..., num_labels)`` of hidden states, in float32."""
        with without_autocast(hidden.device.type):
            bias = None if self.bias is None else at_least_float32(self.bias)
            return linear(at_least_float32(hidden), at_least_float32(self.weight), bias)


class HymbaForSequenceClassification(GenericForSequenceClassification, HymbaPreTrainedModel):
    """Hymba that classifies or scores a text by its last token."""

    def __init__(self, config: HymbaConfig) -> None:
        # The generic class makes its layers through AutoModel, which does not know code that lies beside weights.
        super(GenericForSequenceClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = HymbaModel(config)
        self.model.register_forward_pre_hook(_with_named_outputs, with_kwargs=True)
        self.score = HymbaScore(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @classmethod
    def on_layers_of(cls, model: HymbaForCausalLM, num_labels: int) -> Self:
        """Return a classifier that has the layers of another model, not copies of them, and a new head.

        Args:
            model: The other model, on any device; its weights may be quantized.
            num_labels: The number of classes, or of scores.
        """
        config = copy.deepcopy(model.config)
        config.num_labels = num_labels
        with torch.device("meta"):
            classifier = cls(config)
        classifier.model = model.model
        classifier.model.register_forward_pre_hook(_with_named_outputs, with_kwargs=True)
        classifier.score.to_empty(device=model.device)
        classifier._init_weights(classifier.score)
        return classifier

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: HymbaCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **others: Any,
    ) -> SequenceClassifierOutputWithPast | tuple[Any, ...]:
        """Score each row; see `HymbaForCausalLM.forward` for the inputs.

        Args:
            input_ids: ``(B, L)``, one text per row.
            attention_mask: ``(B, L)``, 0 at padding, on either side.
            position_ids: ``(B, L)``.
            cache: The cache of the texts to continue.
            inputs_embeds: ``(B, L, d)`` instead of ``input_ids``, padded on the left.
            labels: ``(B,)``, a class or a number for each row.
            use_cache: Whether to return a cache.
            **others: Inputs that libraries pass to every model.

        Returns:
            The loss, and logits ``(B, num_labels)``.

        Raises:
            ValueError: If an input is malformed, or there are several rows and the configuration has no padding token.
        """
        pad = self.config.pad_token_id
        if input_ids is not None and attention_mask is not None and pad is not None:
            # transformers finds the last token by the padding id of the configuration, and the tokenizer's is another.
            input_ids = input_ids.masked_fill(attention_mask[:, -input_ids.shape[1] :] == 0, pad)
        output: SequenceClassifierOutputWithPast | tuple[Any, ...] = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            **{CACHE_NAME: others.pop("past_key_values", None) if cache is None else cache},
            **others,
        )
        return output


class HymbaForTokenClassification(GenericForTokenClassification, HymbaPreTrainedModel):
    """Hymba that classifies every token by the text before it."""

    def __init__(self, config: HymbaConfig) -> None:
        super(GenericForTokenClassification, self).__init__(config)  # for the same reason
        self.num_labels = config.num_labels
        self.model = HymbaModel(config)
        self.model.register_forward_pre_hook(_with_named_outputs, with_kwargs=True)
        dropout = getattr(config, "classifier_dropout", None)
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()
