"""Fine-tune, distill into, quantize and publish Hymba models.

Importing this package is enough for transformers' Auto classes to load Hymba models.
"""

import importlib
import logging
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

# Bitsandbytes, which PEFT imports, logs a warning about an optional kernel where no logging is configured.
logging.getLogger("bitsandbytes").addHandler(logging.NullHandler())

AUTO_CLASSES = "transformers.models.auto.configuration_auto"
"""The module with the names of the configurations that transformers' Auto classes know."""


class _HymbaOfTransformers(ModuleType):
    """The module in which transformers looks for Hymba, which imports the model when it is first needed."""

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("Hymba"):  # tools that walk all modules ask for other names, and must not import torch
            raise AttributeError(name)
        return getattr(importlib.import_module("hymba_tune.model"), name)


def _register(auto_classes: ModuleType) -> None:
    sys.modules["transformers.models.hymba"] = _HymbaOfTransformers("transformers.models.hymba")
    auto_classes.CONFIG_MAPPING_NAMES["hymba"] = "HymbaConfig"


class _RegisterAfterImport(MetaPathFinder):
    """Registers Hymba once transformers' Auto classes are imported, because importing them takes seconds."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find the module of the Auto classes only, with a loader that registers Hymba."""
        if fullname != AUTO_CLASSES or (spec := PathFinder.find_spec(fullname, path, target)) is None:
            return None
        loader: Any = spec.loader
        execute = loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register(module)

        loader.exec_module = execute_and_register
        return spec


if AUTO_CLASSES in sys.modules:
    _register(sys.modules[AUTO_CLASSES])
else:
    sys.meta_path.insert(0, _RegisterAfterImport())
