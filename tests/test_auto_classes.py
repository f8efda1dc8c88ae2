"""Importing the package is enough for the Auto classes of transformers, and takes no time until they are used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
{before}
import hymba_tune
assert {loaded} or not set(sys.modules) & {{"torch", "transformers"}}, "importing hymba_tune imports transformers"
getattr(sys.modules.get("transformers.models.hymba"), "__path__", None)  # as tools do that walk all modules
assert "hymba_tune.model" not in sys.modules

from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({folder!r})
print(type(tokenizer).__name__, tokenizer("two cats").input_ids)
print(type(AutoModelForCausalLM.from_pretrained({folder!r})).__module__)
"""


@pytest.mark.parametrize("before", ["", "from transformers import AutoConfig"], ids=["first", "after_transformers"])
def test_importing_the_package_registers_hymba(before: str, small_model: Path) -> None:
    program = PROGRAM.format(before=before, loaded=bool(before), folder=str(small_model))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tokenizer, model = done.stdout.splitlines()
    assert tokenizer.startswith("TokenizersBackend [")
    assert model == "hymba_tune.model.modeling_hymba"


def test_the_mappings_of_transformers_can_be_listed() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    import hymba_tune.model

    assert list(CONFIG_MAPPING.keys()).count("hymba") == 1
    assert CONFIG_MAPPING["hymba"] is hymba_tune.model.HymbaConfig
    assert list(MODEL_FOR_CAUSAL_LM_MAPPING.values()).count(hymba_tune.model.HymbaForCausalLM) >= 1
    with pytest.raises(AttributeError, match="__path__"):
        sys.modules["transformers.models.hymba"].__path__  # noqa: B018
