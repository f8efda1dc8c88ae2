"""What `make` installs, by which index, in a folder whose name has spaces; a script that notes its words is Python."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

CPU = "--index-url https://download.pytorch.org/whl/cpu"
PYTHON = """\
#!/bin/sh
case "$*" in
-c*) exit "$WRONG_VERSION" ;;
"-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
*) echo "$*" >> pip.log
   for pattern in $FAILING; do case "$*" in *$pattern*) exit 1 ;; esac; done ;;
esac
"""


class Checkout:
    """A folder with the Makefile, and a PATH with little on it."""

    def __init__(self, folder: Path) -> None:
        self._root, self.bin = folder / "my check out", folder / "the bin"
        for path in (self._root, self.bin):
            path.mkdir()
        for name in ("Makefile", "constraints.txt", "pyproject.toml"):
            shutil.copy(ROOT / name, self._root)
        for name in ("sh", "mkdir", "cp", "touch"):
            (self.bin / name).symlink_to(str(shutil.which(name)))
        self.program("python3", PYTHON)

    def program(self, name: str, text: str) -> None:
        """Put a program on its PATH."""
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def make(self, *words: str, failing: str = "", wrong_version: bool = False) -> subprocess.CompletedProcess[str]:
        """Run `make`.

        Args:
            words: Its arguments.
            failing: A word of each call of pip that fails.
            wrong_version: Whether Python is too old or too new.
        """
        env = {"PATH": str(self.bin), "FAILING": failing, "WRONG_VERSION": str(int(wrong_version))}
        make = str(shutil.which("make"))
        return subprocess.run([make, *words], cwd=self._root, env=env, capture_output=True, text=True, check=False)

    def installed(self) -> list[str]:
        """What was given to `pip install`, call by call."""
        log = self._root / "pip.log"
        lines = log.read_text().splitlines() if log.is_file() else []
        return [line.removeprefix("-m pip install -qq ") for line in lines]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


TESTED = "--constraint constraints.txt torch"
FROM_CPU_INDEX = f"--no-deps {CPU} --timeout 15 --retries 1 {TESTED}"


def test_pytorch_for_the_cpu_is_installed_where_there_is_no_gpu(checkout: Checkout) -> None:
    assert checkout.make(".venv/installed").returncode == 0
    assert checkout.installed() == [FROM_CPU_INDEX, "--editable ."]


@pytest.mark.parametrize("gpu", [True, False], ids=["gpu", "no-index"])
def test_pytorch_comes_from_the_users_index_with_a_gpu_or_without_an_index(checkout: Checkout, gpu: bool) -> None:
    if gpu:
        checkout.program("nvidia-smi", "#!/bin/sh\n")
    assert checkout.make(".venv/torch", *([] if gpu else ["TORCH_INDEX="])).returncode == 0
    assert checkout.installed() == [TESTED]


def test_users_index_is_taken_where_that_of_pytorch_cannot_be_used(checkout: Checkout) -> None:
    assert checkout.make(".venv/torch", failing="pytorch.org").returncode == 0
    assert checkout.installed() == [FROM_CPU_INDEX, TESTED]


def test_another_pytorch_is_taken_where_the_tested_one_cannot_be_had(checkout: Checkout) -> None:
    done = checkout.make(".venv/torch", failing="constraints.txt")
    assert done.returncode == 0
    assert "The tested PyTorch is not available here." in done.stdout
    assert checkout.installed() == [FROM_CPU_INDEX, TESTED, "torch"]


def test_make_stops_where_no_pytorch_can_be_had(checkout: Checkout) -> None:
    assert checkout.make(".venv/installed", failing="torch").returncode != 0
    assert "--editable ." not in checkout.installed()


def test_tools_of_development_are_installed_for_tests_only(checkout: Checkout) -> None:
    checkout.make(".venv/developing")
    assert checkout.installed()[1:] == ["--editable .", "--editable .[dev]"]


def test_python_that_does_not_fit_is_refused_before_anything_is_installed(checkout: Checkout) -> None:
    done = checkout.make("demo", wrong_version=True)
    assert done.returncode != 0
    assert "python3 is not Python 3.11 to 3.14. Name another: make demo PYTHON=python3.12" in done.stdout
    assert not checkout.installed()
