from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hymba_tune.serve import Server
from tests.serve.servers import serving


@pytest.fixture(scope="session")
def server(small_model: Path) -> Iterator[Server]:
    """A server of a small random model."""
    with serving(small_model) as server:
        yield server
