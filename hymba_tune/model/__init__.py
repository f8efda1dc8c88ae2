"""The Hymba model for transformers. Importing this registers it with the Auto classes.

The folder needs only torch and transformers, so that it can be copied beside exported weights as their code.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from .cache import HymbaCache
from .configuration_hymba import HymbaConfig
from .modeling_hymba import HymbaForCausalLM, HymbaModel

AutoConfig.register("hymba", HymbaConfig, exist_ok=True)
AutoModelForCausalLM.register(HymbaConfig, HymbaForCausalLM, exist_ok=True)

__all__ = ["HymbaCache", "HymbaConfig", "HymbaForCausalLM", "HymbaModel"]
