from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hymba_tune.errors import ConfigError
from hymba_tune.files import MODEL, RUN, check_file, check_folder, write_errors

NAMES: dict[str, Callable[[Path], Path]] = {
    "the same name": lambda path: path,
    "a relative name": lambda path: Path(os.path.relpath(path)),
    "a roundabout name": lambda path: path.parent / "sub" / ".." / path.name,
    "a symbolic link": lambda path: linked(path, Path.symlink_to),
    "a hard link": lambda path: linked(path, Path.hardlink_to),
}


def linked(path: Path, link: Callable[[Path, Path], None]) -> Path:
    other = path.parent / "sub" / "other"
    link(other, path)
    return other


@pytest.mark.parametrize("name", NAMES)
def test_input_is_refused_under_any_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "data.jsonl").write_text("mine")
    out = NAMES[name](tmp_path / "data.jsonl")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=r"--out .* is an input of this command, which would be overwritten"):
            check_file("--out", out, overwrite=overwrite, inputs=[tmp_path / "none", tmp_path / "data.jsonl"])


def test_link_to_nothing_is_refused_as_a_folder(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("gone")
    with pytest.raises(ConfigError, match=r"--out .*link is a link to a folder that is not there\."):
        check_folder(tmp_path / "link", RUN, overwrite=True)


def test_file_inside_an_input_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/one.yaml").touch()
    with pytest.raises(ConfigError, match="is an input"):
        check_file("--out", tmp_path / "tasks/one.yaml", overwrite=True, inputs=[tmp_path / "tasks"])
    check_file("--out", tmp_path / "tasks/two.yaml", inputs=[tmp_path / "tasks"])  # which is new


@pytest.mark.parametrize("kind", ["file", "folder", "dangling link", "device"])
def test_what_exists_is_refused(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.touch()
    elif kind == "folder":
        out.mkdir()
    elif kind == "dangling link":
        out.symlink_to("nowhere")
    else:
        out = Path(os.devnull)
    exists = kind in ("file", "dangling link")
    with pytest.raises(ConfigError, match=r"exists\.\n.*--overwrite" if exists else "is not a file"):
        check_file("--out", out)
    if exists:
        check_file("--out", out, overwrite=True)
    else:
        with pytest.raises(ConfigError, match="is not a file"):
            check_file("--out", out, overwrite=True)


def test_folder_of_a_file_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--html .*there is no folder .*no\.\n.*mkdir -p"):
        check_file("--html", tmp_path / "no/page.html")


@pytest.fixture
def a_run(tmp_path: Path) -> Path:
    (tmp_path / "run/adapter").mkdir(parents=True)
    (tmp_path / "run/run.json").write_text('{"verb": "sft"}')
    (tmp_path / "run/adapter/adapter_config.json").write_text('{"peft_type": "LORA"}')
    return tmp_path / "run"


@pytest.mark.parametrize("name", ["run.json", "report.html", "adapter/x.json", "checkpoints/checkpoint-2/x.json"])
def test_part_of_a_run_is_refused(name: str, a_run: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a part of a run, .*run\."):
        check_file("--out", a_run / name, overwrite=True)
    check_file("--out", a_run / "mine.json")


def test_part_of_a_model_is_refused(a_run: Path, tmp_path: Path) -> None:
    a_run.rename(tmp_path / "gone")
    (tmp_path / "config.json").write_text('{"model_type": "hymba"}')
    with pytest.raises(ConfigError, match=r"is a part of a model, "):
        check_file("--out", tmp_path / "config.json", overwrite=True)


def test_folder_of_a_run_is_no_place_for_a_model(a_run: Path, tmp_path: Path) -> None:
    for name in ("model", "adapter", "checkpoints/x"):
        with pytest.raises(ConfigError, match=r"--out .* is a part of a run, "):
            check_folder(a_run / name, MODEL)
    check_folder(a_run / "merged", MODEL)
    (tmp_path / "config.yaml").write_text("data: of another program")
    check_folder(tmp_path / "model", MODEL)


@pytest.mark.parametrize("out", ["run", "run/adapter/..", "link", ""])
def test_folder_that_is_or_contains_an_input_is_refused(out: str, a_run: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(a_run)
    (tmp_path / "run.json").write_text('{"verb": "sft"}')
    for given in (a_run, a_run / "adapter", tmp_path / "link/adapter"):
        with pytest.raises(ConfigError, match=r"--overwrite --out .* would remove .*, an input of this command"):
            check_folder(tmp_path / out, RUN, overwrite=True, inputs=[given])


def test_only_what_looks_like_a_run_is_replaced(a_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"exists and is not empty\.\n.*\n  to fix     or, another --out, or --over"):
        check_folder(a_run, RUN, fix="or, ")
    check_folder(a_run, RUN, overwrite=True)
    (a_run / ".lock").touch()
    (a_run / "adapter.0123abcd.partial").mkdir()
    check_folder(a_run, RUN, overwrite=True)
    (a_run / "notes.txt").touch()
    with pytest.raises(ConfigError, match=r"this is not a run of hymba-tune: it holds notes\.txt\."):
        check_folder(a_run, RUN, overwrite=True)
    (tmp_path / "project").mkdir()
    (tmp_path / "project/config.yaml").write_text("of: another program")
    with pytest.raises(ConfigError, match=r"this is not a run of hymba-tune: it has no config\.yaml or run\.json of"):
        check_folder(tmp_path / "project", RUN, overwrite=True)
    with pytest.raises(ConfigError, match=r"--out .*config\.yaml is a file\.\n  expected   a new or empty directory"):
        check_folder(tmp_path / "project/config.yaml", RUN, overwrite=True)


def test_files_that_checksums_list_are_known(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for name in ("config.json", "code.py"):
        (tmp_path / "out" / name).write_text('"model_type": "hymba"')
    with pytest.raises(ConfigError, match=r"holds code\.py"):
        check_folder(tmp_path / "out", MODEL, overwrite=True)
    (tmp_path / "out/SHA256SUMS").write_text("00  code.py\n")
    check_folder(tmp_path / "out", MODEL, overwrite=True)


def test_reasons_why_nothing_can_be_written(tmp_path: Path) -> None:
    for error, message in (
        (OSError(errno.ENOSPC, "full"), "--html .*: its disk is full"),
        (PermissionError(errno.EACCES, "Permission denied"), r"--html .*page cannot be written: Permission denied\."),
    ):
        with pytest.raises(ConfigError, match=message), write_errors("--html", tmp_path / "page"):
            raise error
