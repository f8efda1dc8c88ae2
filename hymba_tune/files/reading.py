"""Reads YAML that people write, within limits that no honest file comes near."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 4 * 2**20
MAX_VALUES = 100_000
"""Maximum number of values in a file, each counted as often as aliases repeat it."""
DATES = "tag:yaml.org,2002:timestamp"


class _Loader(yaml.SafeLoader):
    """Reads dates as text, because they are names of files and folders."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != DATES]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file.

    Raises:
        ValueError: If it cannot be read; with the reason.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES // 2**20} MB")
        loader = _Loader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if node is None:
            return None
        if _count(node, {}) > MAX_VALUES:
            raise ValueError(f"it has more than {MAX_VALUES:,} values, or aliases that repeat them as often")
        _refuse_repeated_keys(node)
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start + 1} is not UTF-8") from None
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except (KeyError, TypeError, AttributeError) as error:  # the constructors of explicit tags: !!bool maybe
        raise ValueError("a value does not fit its tag") from error


def _count(node: yaml.Node, counts: dict[int, int]) -> int:
    """Count the values of a node without expanding its aliases."""
    if id(node) not in counts:
        counts[id(node)] = MAX_VALUES  # stands if the node is inside itself
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        pairs = isinstance(node, yaml.MappingNode)
        flat = [child for pair in children for child in pair] if pairs else children
        counts[id(node)] = 1 + sum(_count(child, counts) for child in flat)
    return counts[id(node)]


def _refuse_repeated_keys(node: yaml.Node) -> None:
    """Raise an error for a key that a mapping has twice: YAML would use the last one and drop the others."""
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if repeated := [key for key in keys if keys.count(key) > 1]:
            raise ValueError(f"the key {reprlib.repr(repeated[0])} is there twice")
