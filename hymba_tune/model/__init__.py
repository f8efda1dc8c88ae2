"""The Hymba model for transformers. Importing this package registers it with the Auto classes.

The package needs only torch and transformers, because `export` copies it next to exported weights as their code.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from .backends import use_kernels
from .cache import HymbaCache
from .configuration_hymba import HymbaConfig
from .modeling_hymba import HymbaForCausalLM, HymbaModel

AutoConfig.register("hymba", HymbaConfig, exist_ok=True)
AutoModel.register(HymbaConfig, HymbaModel, exist_ok=True)
AutoModelForCausalLM.register(HymbaConfig, HymbaForCausalLM, exist_ok=True)
# The released folder names LlamaTokenizer, which AutoTokenizer rebuilds with ids that differ from its tokenizer.json.
TOKENIZER_MAPPING_NAMES["hymba"] = "TokenizersBackend"

__all__ = ["HymbaCache", "HymbaConfig", "HymbaForCausalLM", "HymbaModel", "use_kernels"]
