from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hymba_tune.files import read_yaml


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("yaml") / "file.yaml"


def laughs(alias: str) -> str:
    """Ten levels of which each repeats the one before nine times."""
    lines = [f"a0: &a0 {alias.format('1')}"]
    for level in range(1, 10):
        repeated = ", ".join([f"*a{level - 1}"] * 9)
        lines.append(f"a{level}: &a{level} {alias.format(f'[{repeated}]')}")
    return "\n".join(lines)


REFUSED = {
    "nested 5,000 levels": ("a: " + "[" * 5000 + "]" * 5000, "it is nested too deeply"),
    "nested 1,000 mappings": ("\n".join(" " * level + "a:" for level in range(1000)), "it is nested too deeply"),
    "a billion laughs": (laughs("{}").replace("a0: &a0 1", "a0: &a0 [1]"), "more than 100,000 values"),
    "a billion merged keys": (
        laughs("{{<<: {}}}").replace("{<<: 1}", "{b: 1}"),
        "more than 100,000 values",
    ),
    "a list inside itself": ("a: &a [*a]", "more than 100,000 values"),
    "a large file": ("#" * (4 * 2**20 + 1), "it has more than 4 MB"),
    "a number of 5,000 digits": ("a: " + "9" * 5000, "4300 digits"),
    "a truth that is none": ("a: !!bool maybe", "a value does not fit its tag"),
    "a time that is none": ("a: !!timestamp noon", "a value does not fit its tag"),
    "Python": ("a: !!python/object/apply:os.system [id]", "could not determine a constructor"),
    "another encoding": (b"\xff\xfe\x00", "byte 1 is not UTF-8"),
    "two documents": ("a: 1\n---\nb: 1", "expected a single document"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_yaml_that_no_honest_file_holds_is_refused_with_a_short_reason(name: str, file: Path) -> None:
    text, reason = REFUSED[name]
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=reason) as refused:
        read_yaml(file)
    assert len(str(refused.value)) < 400


def test_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^No such file or directory$"):
        read_yaml(tmp_path / "gone.yaml")


def test_dates_are_text_and_empty_files_nothing(file: Path) -> None:
    file.write_text("out: 2024-01-01\nat: 2024-01-01 12:00:00\nrank: 8\nlr: 1.0e-4\n")
    assert read_yaml(file) == {"out": "2024-01-01", "at": "2024-01-01 12:00:00", "rank": 8, "lr": 1e-4}
    file.write_text("# nothing")
    assert read_yaml(file) is None


VALUES = st.none() | st.booleans() | st.integers() | st.text()


@given(st.recursive(VALUES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8))
def test_what_is_written_is_read(file: Path, value: object) -> None:
    file.write_text(yaml.safe_dump(value), encoding="utf-8")
    assert read_yaml(file) == value


@given(st.text(st.sampled_from("ab:-[]{}&*!|>'\"# \n\t1.%@,?<~"), max_size=60))
def test_any_text_is_read_or_refused(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
    with suppress(ValueError):
        read_yaml(file)
