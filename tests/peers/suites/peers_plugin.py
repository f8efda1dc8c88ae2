"""A plugin of pytest for the suites: stands in for missing modules, leaves tests of other models out, keeps results."""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

NEEDED = {
    # PEFT's helpers import it for tests with images.
    "diffusers": {"StableDiffusionPipeline": type("StableDiffusionPipeline", (), {})},
    # These are missing in the source package of transformers, and present in a checkout.
    "tests.exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "tests.generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
}
RESULTS: dict[str, dict[str, str]] = {}

for module, names in NEEDED.items():
    package = module.rpartition(".")[0] or module
    try:
        missing = importlib.util.find_spec(package) is None
    except ModuleNotFoundError:  # there is no package `tests` either
        missing = True
    if missing:
        sys.modules[package] = ModuleType(package)
        sys.modules[module] = ModuleType(module)
        vars(sys.modules[module]).update(names)
pytest.register_assert_rewrite("tests")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Function]) -> None:
    """Leave out the tests that name a model of the Hub, since they are about that model."""
    others = [item for item in items if "-testing/" in inspect.getsource(item.function)]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]
    for item in items:
        RESULTS[item.name] = {"outcome": "passed", "reason": "", "method": _method(item)}


def _method(item: pytest.Function) -> str:
    """Return the method of PEFT that a test is about, by PEFT's name; empty if it is about none."""
    params: dict[str, Any] = item.callspec.params if hasattr(item, "callspec") else {}
    if "config_cls" not in params:
        return ""
    settings = params["config_kwargs"]
    method = str(params["config_cls"](**settings).peft_type.value).lower()
    if "alora_invocation_tokens" in settings:
        return f"{method}, activated"
    return f"{method}, trainable tokens" if "trainable_token_indices" in settings else method


def pytest_runtest_logreport(report: Any) -> None:
    """Keep the worst outcome of a test, of its phases and of its subtests."""
    result = RESULTS[report.nodeid.rpartition("::")[2]]
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        result.update(outcome="failed", reason=crash.message if crash else str(report.longrepr))
    elif report.skipped and result["outcome"] == "passed" and type(report) is pytest.TestReport:
        result.update(outcome="skipped", reason=str(report.longrepr[2]))


def pytest_sessionfinish() -> None:
    """Write the results of all tests."""
    Path("results.json").write_text(json.dumps(RESULTS, indent=1))
