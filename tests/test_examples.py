"""The examples: recipes load, pages work line by line, scripts and the notebook run; all on hymba-nano."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from hymba_tune.cli.main import main
from hymba_tune.cli.settings import combine
from hymba_tune.config import TrainingConfig
from tests.conftest import ROOT

# Examples run like programs of their own, in which warnings are no errors.
pytestmark = [pytest.mark.end_to_end, pytest.mark.filterwarnings("default")]

EXAMPLES = ROOT / "examples"
RECIPES = sorted(EXAMPLES.glob("*/*.yaml"))
SCRIPTS = sorted(EXAMPLES.glob("python/*.py"))
LINES = 60
"""Scripts on the Python API are shorter than this."""
SHORTER: dict[str, Mapping[str, str]] = {
    "support-desk": {
        "recipe.yaml": "recipe.yaml --steps 2 --eval-max-rows 4",
        "--max-new-tokens 40 --out": "--max-new-tokens 4 --max-rows 4 --out",
    },
    "gsm8k": {
        "make_data.py": "make_data.py .",
        "recipe.yaml": "recipe.yaml --steps 2 --eval-max-rows 4",
        "--max-rows 50": "--max-rows 2",
        "--max-new-tokens 120": "--max-new-tokens 4",
    },
    "distill-bytes": {
        "--out teacher.json": "--out teacher.json --steps 40",
        "distill.yaml": "distill.yaml --steps 2 --eval-max-rows 4 --caps 16 --data data/eval.jsonl --loss auto "
        "--min-teacher-probability 0 --min-end-probability 0",
        "sft.yaml": "sft.yaml --steps 2 --eval-max-rows 4",
        "--max-new-tokens 40": "--max-new-tokens 4 --max-rows 4",
    },
}
"""What makes the commands of a page short, by its folder. Each text occurs once among its commands."""

Shell = Callable[[str], str]


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Shell:
    """Runs a line of a page and returns what it printed: cd, a Python script or hymba-tune, all in this process."""

    def run(line: str) -> str:
        words = shlex.split(line)
        capfd.readouterr()
        if words[0] == "cd":
            monkeypatch.chdir(words[1])
        elif words[0] == "python":
            monkeypatch.setattr(sys, "argv", words[1:])
            runpy.run_path(words[1], run_name="__main__")
        else:
            assert words[0] == "hymba-tune", line
            with pytest.raises(SystemExit) as ended:
                main(words[1:])
            assert ended.value.code == 0, line + "".join(capfd.readouterr())
        return capfd.readouterr().out

    return run


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_recipe_sets_only_known_settings(path: Path) -> None:
    given = yaml.safe_load(path.read_text())
    kind = TrainingConfig.of(given.pop("verb"))
    assert combine(str(path), kind()) == kind(**given)


@pytest.mark.parametrize("name", SHORTER)
def test_page_works_line_by_line(name: str, shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "examples" / name
    shutil.copytree(EXAMPLES / name, folder, ignore=shutil.ignore_patterns("data", "runs"))
    for split in ("train", "test"):
        row = {"question": "How much is 2+3?", "answer": "2+3 = <<2+3=5>>5.\n#### 5"}
        (folder / f"{split}.jsonl").write_text(f"{json.dumps(row)}\n" * 16)
    (walk,) = re.findall(r"^```bash\n(.*?)^```$", (folder / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    for old, new in SHORTER[name].items():
        assert walk.count(old) == 1, old
        walk = walk.replace(old, new)
    monkeypatch.chdir(tmp_path)
    for line in walk.splitlines():
        shell(line)
    assert all(json.loads(path.read_text()) for path in folder.glob("*.json"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_script_on_the_python_api_is_short_and_runs(
    path: Path, shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < LINES
    monkeypatch.chdir(tmp_path)
    flags = {"fine_tune": "--steps 2", "generate": "--max-new-tokens 8", "align_tokenizers": '"The ferry leaves."'}
    printed = {"fine_tune": "sky → ", "generate": "ended by", "align_tokenizers": "1 of 1 rows"}
    assert printed[path.stem] in shell(f"python {shlex.quote(str(path))} {flags[path.stem]}")


def test_notebook_runs_from_top_to_bottom(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = json.loads((EXAMPLES / "hymba_tune.ipynb").read_text(encoding="utf-8"))
    assert not any(cell.get("outputs") for cell in notebook["cells"])
    program = "\n".join(notebook_lines(notebook))
    for old, new in {"STEPS = 420": "STEPS = 2", " --answers exact": " --eval-max-rows 8"}.items():
        assert program.count(old) == 1
        program = program.replace(old, new)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    exec(compile(program, "hymba_tune.ipynb", "exec"), {"shell": shell})
    assert (tmp_path / "my-model" / "model.safetensors").is_file()


def notebook_lines(notebook: Mapping[str, list[dict[str, Any]]]) -> Iterator[str]:
    """The lines of the cells with code, without the installation; those for the shell as calls, as IPython has them."""
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code" and cell["id"] != "install":
            for line in "".join(cell["source"]).splitlines():
                yield f"shell(f{line[1:]!r})" if line.startswith("!") else line
