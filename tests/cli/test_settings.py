from __future__ import annotations

from pathlib import Path

import pytest

from hymba_tune.cli.settings import combine
from hymba_tune.config import SFTConfig, as_mapping
from hymba_tune.errors import ConfigError
from tests.cli.conftest import Command


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return tmp_path / "recipe.yaml"


def test_flags_win_over_a_recipe(recipe: Path) -> None:
    recipe.write_text("rank: 4\nlr: 1.0e-3\ntargets: [mlp]\nmap: {prompt: question}\n")
    config = combine(str(recipe), SFTConfig(rank=16, seed=3))
    assert (config.rank, config.lr, config.seed) == (16, 1e-3, 3)  # also where the flag repeats the default
    assert (config.targets, as_mapping(config.map)) == (["mlp"], {"prompt": "question"})


def test_without_a_recipe_the_flags_are_all() -> None:
    flags = SFTConfig(rank=3)
    assert combine(None, flags) is flags


def test_empty_recipe_changes_nothing(recipe: Path) -> None:
    recipe.write_text("# only a comment\n")
    assert combine(str(recipe), SFTConfig(rank=3)) == SFTConfig(rank=3)


def test_packaged_recipe_is_found_by_name() -> None:
    for name in ("demo", "demo.yaml"):
        assert combine(name, SFTConfig()).model == "hymba-nano"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rnk: 4", r"recipe\.yaml: there is no setting 'rnk'\.\n  to fix     did you mean rank\?"),
        ("qqqq: 4", r"recipe\.yaml: there is no setting 'qqqq'\.\n  to fix     remove it"),
        ("3: 4", r"recipe\.yaml: there is no setting 3\."),
        ("rank: 0", r"recipe\.yaml: --rank 0: must be at least 1 \(common: 8 to 64\)\."),
        ("rank: x\nepochs: -1", r"--rank x: must be a whole number .*\n--epochs -1: must be more than 0\."),
        ("data: a.jsonl", r"--data a\.jsonl: must be a list, \[in, brackets\]\."),
        ("method: full\nquantize: nf4", r"recipe\.yaml: --quantize: --method full trains every weight"),
        ("rank: 1.5", r"--rank 1\.5: must be a whole number"),
        ("packing: maybe", r"--packing maybe: must be true or false"),
        ("map: [a]", r"--map a: 'a' is not a pair such as name=value\."),
        ("data: {a: 1}", r"--data \{'a': 1\}: "),
        ("method: full\ntargets: [mlp]", r"--targets: --method full trains every weight"),
        ("a: [\n", r"recipe\.yaml cannot be read: (.|\n)*line 2(.|\n)*expected   YAML with one setting a line"),
        ("- rank", r"recipe\.yaml holds a list\.\n  expected   YAML with one setting a line"),
        ("rank", r"recipe\.yaml holds a str\."),
    ],
)
def test_recipe_that_cannot_be_used(text: str, message: str, recipe: Path) -> None:
    recipe.write_text(text)
    with pytest.raises(ConfigError, match=message):
        combine(str(recipe), SFTConfig())


def test_recipe_that_is_no_text(recipe: Path) -> None:
    recipe.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"recipe\.yaml cannot be read"):
        combine(str(recipe), SFTConfig())


def test_missing_recipe_suggests_a_packaged_one() -> None:
    with pytest.raises(ConfigError, match=r"There is no recipe dmo\.(.|\n)*demo, (.|\n)*did you mean demo\?$"):
        combine("dmo", SFTConfig())
    with pytest.raises(ConfigError, match=r"There is no recipe some/demo\.yaml"):
        combine("some/demo.yaml", SFTConfig())


def test_missing_recipe_suggests_a_file_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "distill.yaml").touch()
    with pytest.raises(ConfigError, match=rf"did you mean {tmp_path}/distill\.yaml\?$"):
        combine(str(tmp_path / "distil.yaml"), SFTConfig())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"did you mean distill\.yaml\?$"):
        combine("distil.yaml", SFTConfig())


def test_recipe_may_say_its_verb(recipe: Path) -> None:
    recipe.write_text("verb: sft\nrank: 3\n")
    assert combine(str(recipe), SFTConfig()).rank == 3
    recipe.write_text("verb: other\nrank: 3\n")
    with pytest.raises(
        ConfigError, match=r"recipe .* is for hymba-tune other\.\n  to fix     hymba-tune other --config /"
    ):
        combine(str(recipe), SFTConfig())


def test_recipe_then_environment_then_flag(recipe: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[SFTConfig] = []

    def stop(config: SFTConfig, _: object) -> None:
        seen.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr("hymba_tune.train.sft.run_sft", stop)
    recipe.write_text("rank: 1\nseed: 1\nsteps: 1\ndata: [a.jsonl, b.jsonl]\n")
    monkeypatch.chdir(recipe.parent)
    for name in "abc":
        (recipe.parent / f"{name}.jsonl").touch()
    monkeypatch.setenv("HYMBA_TUNE_SFT_RANK", "2")
    monkeypatch.setenv("HYMBA_TUNE_SFT_SEED", "2")
    command("sft", "--config", recipe, "--rank", "3")
    command("sft", "--config", recipe, "--data", "c.jsonl", "--targets", "in_proj", "x_proj.0", "--packing")
    assert (seen[0].rank, seen[0].seed, seen[0].steps) == (3, 2, 1)
    assert (seen[1].rank, seen[1].data, seen[1].targets) == (2, ["c.jsonl"], ["in_proj", "x_proj.0"])
    assert (seen[0].packing, seen[1].packing) == (False, True)


def test_environment_is_checked_like_a_flag(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYMBA_TUNE_SFT_RANK", "0")
    assert command("sft").err == "--rank 0: must be at least 1 (common: 8 to 64).\n"
