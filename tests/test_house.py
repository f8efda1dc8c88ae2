"""The house stands as it was drawn: imports point one way, and every folder of code is a declared package."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

from transformers.dynamic_module_utils import get_imports

import hymba_tune
from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGE_DIRS: dict[str, str] = {"hymba_tune": "hymba_tune", **PROJECT["tool"]["setuptools"]["package-dir"]}

FLOORS = [
    {"errors", "formatting", "significance"},
    {"config", "files", "memory", "pages"},
    {"distributed", "registry"},
    {"model", "schemes"},
    {"checkpoint"},
    {"adapters", "data"},
    {"inputs"},
    {"assets", "generate"},
    {"evaluate", "footprint", "report", "serve"},
    {"quant"},
    {"hub"},
    {"train"},
    {"distill"},
    {"doctor", "plan", "recipes"},
    {"cli"},
]
"""Rooms from the ground up: each may import those below, never one above or beside it."""
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
STRANGERS = {("data", "registry"), ("data", "model"), ("data", "checkpoint")}
"""Rooms that know nothing of one below them: data knows no models."""
MODEL_LIBRARIES = {"torch", "transformers", "huggingface_hub"}
"""What the model's folder may need where it is copied beside weights; transformers brings the last."""

KERNEL_LIBRARIES = {"triton", "kernels", "flash_attn", "flash_attn_interface"}
KERNEL_LIBRARIES |= {"mamba_ssm", "selective_scan_cuda", "causal_conv1d"}
"""What it uses where it is there."""


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name, wherever its folder lies."""
    found = {}
    for package, folder in PACKAGE_DIRS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


MODULES = modules()


def room_of(module: str) -> str:
    """``hymba_tune.train.sft`` lies in ``train``; ``hymba_tune`` itself in no room."""
    return module.removeprefix("hymba_tune").removeprefix(".").split(".")[0]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Each import anywhere in a module: its dots, and the name in full; ``from a import b`` counts as ``a.b``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.level, ".".join(filter(None, [node.module, alias.name]))) for alias in node.names)


def rooms_imported(path: Path) -> set[str]:
    """Rooms of the package that a module imports; a name of the package itself, as its version, is none."""
    names = [name for level, name in imports(path) if not level and name.split(".")[0] == "hymba_tune"]
    return {
        room_of(name) for name in names if any(name == m or name.startswith(f"{m}.") for m in MODULES if room_of(m))
    }


def test_imports_point_down() -> None:
    for module, path in MODULES.items():
        room = room_of(module)
        assert not room or room in FLOOR, f"{room} has no floor: give it one in FLOORS"
        for imported in rooms_imported(path) - {room}:
            assert room, f"{module} imports {imported}; the package itself imports nothing"
            assert FLOOR[imported] < FLOOR[room], f"{module} imports {imported}, which is not below {room}"
            assert (room, imported) not in STRANGERS, f"{module} imports {imported}, which {room} must not know"


def test_only_the_model_imports_relatively() -> None:
    libraries = MODEL_LIBRARIES | KERNEL_LIBRARIES | sys.stdlib_module_names
    for module, path in MODULES.items():
        for level, name in imports(path):
            if room_of(module) == "model":
                assert level <= 1, f"{module} imports {name} from above its folder"
                assert level or name.split(".")[0] in libraries, f"{module} imports {name}; the folder must stand alone"
            else:
                assert not level, f"{module} imports {name} relatively"


def test_transformers_finds_no_need_of_kernel_libraries() -> None:
    """It refuses to run code beside weights whose imports are not installed, unless they are tried."""
    for module, path in MODULES.items():
        if room_of(module) == "model":
            assert not set(get_imports(path)) & KERNEL_LIBRARIES, module


def test_mapped_folders_are_imported_under_the_package_only() -> None:
    folders = set(PACKAGE_DIRS.values()) - {"hymba_tune"}
    for module, path in MODULES.items():
        wrong = [name for level, name in imports(path) if not level and name.split(".")[0] in folders]
        assert not wrong, f"{module} imports {wrong}"


def test_a_public_class_name_means_one_thing() -> None:
    homes: dict[str, list[str]] = {}
    for module, path in MODULES.items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(module)
    assert not {name: modules for name, modules in homes.items() if len(modules) > 1}


def test_names_in_printed_commands_are_quoted_for_the_shell() -> None:
    """They go through `hymba_tune.errors.command`; only the verb of a command may be put into it as it is."""
    unquoted = [
        f"{module}:{text.lineno}"
        for module, path in modules().items()
        for text in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(text, ast.JoinedStr)
        if re.search(
            r"hymba-tune (?:[^{.,;(`]|\{[\w.]*(verb|version__)\})*\{(?![\w.]*(verb|version__)\})", ast.unparse(text)
        )
    ]
    assert unquoted == []


def test_no_test_module_imports_another() -> None:
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        names = [name.split(".") for _, name in imports(path)]
        wrong = [
            ".".join(parts) for parts in names if parts[0] == "tests" and any(p.startswith("test_") for p in parts)
        ]
        assert not wrong, f"{path} imports {wrong}"


def test_declared_packages_are_the_folders() -> None:
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages


def test_every_module_lies_in_a_package() -> None:
    for path in MODULES.values():
        assert (path.parent / "__init__.py").is_file(), f"{path} lies in a folder without __init__.py"


def test_nothing_is_installed_beside_the_package() -> None:
    assert (distribution("hymba-tune").read_text("top_level.txt") or "").split() == ["hymba_tune"]


def test_badges_say_what_the_metadata_says() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    badges = dict(
        re.findall(r"^\[!\[(\w+(?: \w+)*): ([^\]]+)\]", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    )
    versions = [entry.rpartition(" ")[2] for entry in project["classifiers"] if "Python :: 3." in entry]
    assert badges["Python"] == f"{versions[0]} to {versions[-1]}"
    assert badges["License"] == project["license"]
    assert any(entry.lower().endswith(badges["Status"]) for entry in project["classifiers"])


def test_version_is_one() -> None:
    assert "version" in PROJECT["project"]["dynamic"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "hymba_tune.__version__"}
    assert distribution("hymba-tune").version == hymba_tune.__version__
