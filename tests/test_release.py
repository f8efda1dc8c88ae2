"""A release: one address, notes of its version, and distributions that hold everything."""

from __future__ import annotations

import re
import shutil
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from release.address import address, files, replace_address
from release.distributions import problems, sources
from release.notes import notes
from tests.conftest import ROOT

CHANGELOG = """\
# Changelog

## [Unreleased]

## [0.2.0] - 2027-01-31

### Added
- One.

## [0.1.0] - 2026-12-01

### Fixed
- Two.

[0.1.0]: https://example.org/releases/v0.1.0
"""


def test_every_file_has_the_projects_address_of_the_metadata() -> None:
    found = {match for path in files() for match in re.findall(r"https://[\w.]+/\w{2,}/hymba-tune\b", path.read_text())}
    assert found == {address()}


def test_one_command_sets_the_address_everywhere(tmp_path: Path) -> None:
    for path in files():
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    old, new = address(), "https://example.org/group/kit"
    changed = replace_address(f"{new}/", tmp_path)
    assert {"pyproject.toml", "CITATION.cff", "SECURITY.md", ".github/ISSUE_TEMPLATE/config.yml"} <= {*changed}
    assert address(tmp_path) == new
    assert not [path for path in files(tmp_path) if old in path.read_text()]


@pytest.mark.parametrize("wrong", ["", "github.com/me/hymba-tune", "https://github.com", "https://github.com/a b/c"])
def test_an_address_that_is_none_is_refused(wrong: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not an address such as"):
        replace_address(wrong, tmp_path)


def test_notes_are_the_section_of_the_version() -> None:
    assert notes("v0.2.0", CHANGELOG, version="0.2.0") == "### Added\n- One.\n"
    assert notes("v0.1.0", CHANGELOG, version="0.1.0") == "### Fixed\n- Two.\n"


def test_notes_need_the_tag_of_the_version() -> None:
    with pytest.raises(ValueError, match=r"The tag is 'v0.3.0', and the version in hymba_tune/__init__.py is 0.2.0"):
        notes("v0.3.0", CHANGELOG, version="0.2.0")


def test_notes_need_a_dated_section() -> None:
    with pytest.raises(ValueError, match=r"no section '## \[0.3.0\] - YYYY-MM-DD'"):
        notes("v0.3.0", CHANGELOG, version="0.3.0")


def test_a_file_that_a_distribution_lacks_is_found() -> None:
    wheel = {"hymba_tune/__init__.py": b"1", "METADATA": b"2"}
    assert problems({"README.md", "PKG-INFO"}, {"README.md"}, wheel, wheel) == []
    found = problems({"README.md"}, {"README.md", "tests/tiny.py"}, wheel, {**wheel, "METADATA": b"3"})
    assert found == [
        "the sdist lacks tests/tiny.py",
        "METADATA is not the same in the wheels of the sdist and the repository",
    ]


def test_sources_are_the_files_of_the_repository() -> None:
    assert {"pyproject.toml", ".github/workflows/ci.yml", "tests/tiny.py", "cli/main.py"} <= sources()
    assert not [name for name in sources() if name.startswith((".git/", ".venv/", "build/"))]


def test_changelog_has_the_sections_of_keep_a_changelog() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall("^## (.*)$", text, re.M)[0] == "[Unreleased]"
    assert {*re.findall("^### (.*)$", text, re.M)} <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_lock_has_a_fitting_version_of_every_direct_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = ("dev", "docs", "eval", "serve", "deepspeed")
    wanted = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    lines = (ROOT / "constraints-full.txt").read_text(encoding="utf-8").splitlines()[1:]
    pinned = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    for requirement in map(Requirement, wanted):
        if requirement.name not in ("torch", "triton"):  # constraints.txt; PyTorch's own
            assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, requirement
