"""Tokenizers for every test of the data layer."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tests.data.small_tokenizers import BUILDERS


@pytest.fixture(scope="session")
def hymba() -> PreTrainedTokenizerFast:
    """A small tokenizer of the same type as the released one."""
    return BUILDERS["hymba"]()


@pytest.fixture(scope="session", params=BUILDERS)
def any_tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return BUILDERS[request.param]()


@pytest.fixture(scope="session")
def released(shared: Path) -> PreTrainedTokenizerFast:
    """NVIDIA's tokenizer as released: AutoTokenizer would rebuild it with other ids."""
    return PreTrainedTokenizerFast.from_pretrained(shared / "reference" / "hymba-1.5b-base")
