"""The Hymba model for transformers. Importing this package registers its models with the Auto classes.

`hymba_tune` itself registers the configuration, which leads the Auto classes to this package.

The package needs only torch and transformers, because `export` copies it next to exported weights as their code.
"""

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from .backends import use_kernels
from .cache import HymbaCache
from .classification import HymbaForSequenceClassification, HymbaForTokenClassification
from .configuration_hymba import HymbaConfig
from .modeling_hymba import HymbaForCausalLM, HymbaModel

AutoModel.register(HymbaConfig, HymbaModel, exist_ok=True)
AutoModelForCausalLM.register(HymbaConfig, HymbaForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(HymbaConfig, HymbaForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(HymbaConfig, HymbaForTokenClassification, exist_ok=True)
# The released folder names LlamaTokenizer, which AutoTokenizer rebuilds with ids that differ from its tokenizer.json.
TOKENIZER_MAPPING_NAMES["hymba"] = "TokenizersBackend"

__all__ = [
    "HymbaCache",
    "HymbaConfig",
    "HymbaForCausalLM",
    "HymbaForSequenceClassification",
    "HymbaForTokenClassification",
    "HymbaModel",
    "use_kernels",
]
