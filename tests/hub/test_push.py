"""Uploads, by the real client, to a Hub on loopback."""

from __future__ import annotations

from pathlib import Path

import pytest

from hymba_tune.errors import ConfigError, HubError
from hymba_tune.hub.push import UploadTarget, check_target, push
from tests.hub.server import TOKEN, Hub, Repository, Trouble

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client hears it of its library
NAME = "me/my-hymba"
AGAIN = "hymba-tune export my-hymba --push me/my-hymba"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "my-hymba"
    made.mkdir()
    (made / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: hymba-nano\n---\n# mine\n")
    (made / "config.json").write_text("{}")
    for number in (1, 2):
        (made / f"model-{number}.safetensors").write_bytes(bytes([number]) * 1000)
    return made


def upload(folder: Path, **options: object) -> str:
    target = UploadTarget(NAME, **options)  # type: ignore[arg-type]
    check_target(target)
    return push(folder, target, message="Upload", again=AGAIN)


def held(hub: Hub, branch: str = "main") -> dict[str, bytes]:
    files = hub.repositories[NAME].branches[branch]
    return {name: content for name, content in files.items() if name != ".gitattributes"}


def written(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("private", [False, True])
def test_uploads_all_files_to_a_new_repository(private: bool, hub: Hub, folder: Path) -> None:
    assert upload(folder, private=private) == f"{hub.address}/{NAME}"
    assert held(hub) == written(folder)
    assert hub.repositories[NAME].private is private
    assert sum("/commit/" in asked for asked in hub.asked) == 1


def test_revision_is_a_branch_of_its_own(hub: Hub, folder: Path) -> None:
    upload(folder)
    (folder / "model-2.safetensors").unlink()
    assert upload(folder, revision="small") == f"{hub.address}/{NAME}/tree/small"
    assert held(hub, "small") == written(folder)
    assert "model-2.safetensors" in held(hub)
    with pytest.raises(HubError, match=r"the name is taken\. The branch small of me/my-hymba holds 3 files\."):
        upload(folder, revision="small")


def test_revision_of_a_new_repository(hub: Hub, folder: Path) -> None:
    upload(folder, revision="first")
    assert held(hub, "first") == written(folder)
    assert not held(hub)


def test_name_that_is_taken_is_left_as_it_is(hub: Hub) -> None:
    hub.repositories[NAME] = Repository(branches={"main": {"model.safetensors": b"another"}})
    with pytest.raises(HubError, match=r"the name is taken\. me/my-hymba holds 1 files\.\n  to fix .*--update"):
        check_target(UploadTarget(NAME))
    assert held(hub) == {"model.safetensors": b"another"}


def test_update_replaces_what_was_there(hub: Hub, folder: Path) -> None:
    hub.repositories[NAME] = Repository(branches={"main": {"old.safetensors": b"old", "config.json": b"old"}})
    upload(folder, update=True)
    assert held(hub) == written(folder)


def test_private_upload_does_not_go_to_a_public_repository(hub: Hub, folder: Path) -> None:
    hub.repositories[NAME] = Repository()
    with pytest.raises(HubError, match=r"there is such a repository, and it is public\.\n  to fix .*make it private"):
        upload(folder, private=True)
    assert not held(hub)


def test_half_finished_upload_goes_on(hub: Hub, folder: Path) -> None:
    """What came over is not sent again, and a reader finds nothing before all of it is there."""
    hub.troubles = [Trouble("PUT", "/signed/", times=99, after=1)]
    with pytest.raises(HubError, match=rf"Cannot upload to {NAME}: the connection to the Hub broke(.|\n)*{AGAIN}"):
        upload(folder)
    assert len(hub.blobs) == 1
    assert not held(hub)
    hub.troubles, hub.asked = [], []
    upload(folder)
    assert sum(asked.startswith("PUT") for asked in hub.asked) == 1
    assert held(hub) == written(folder)


@pytest.mark.parametrize("status", [None, 503, 429])
def test_trouble_that_passes_is_waited_for(status: int | None, hub: Hub, folder: Path) -> None:
    hub.troubles = [Trouble("PUT", "/signed/", status=status, times=3)]
    upload(folder)
    assert held(hub) == written(folder)


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        (Trouble("POST", "/batch", 429, 99), r"too many requests\.\n  to fix     in a few minutes: hymba-tune export"),
        (Trouble("POST", "/batch", 429, 99, {"Retry-After": "7"}), r"too many requests\.\n  to fix     in 7 seconds: "),
        (Trouble("POST", "/batch", 503, 99), r"trouble of its own \(error 503\)\.\n  to fix     later: hymba-tune"),
        (Trouble("POST", "/commit/", 401), r"the Hub does not know the token\.\n  to fix     hf auth login"),
        (Trouble("POST", "/create", 403), r"the token may not do that\.\n  to fix     hf auth login"),
        (Trouble("POST", "/commit/", 400), r"Cannot upload to me/my-hymba: .*\(error 400\)\.\n  to fix     hymba-tune"),
        (Trouble("POST", "/commit/"), r"the connection to the Hub broke"),
        (Trouble("PUT", "/signed/", 403, 99), r"the token may not do that"),
    ],
    ids=["busy", "busy for a while", "down", "unknown", "forbidden", "bad", "broken", "expired"],
)
def test_refusal_is_one_message_without_secrets(trouble: Trouble, message: str, hub: Hub, folder: Path) -> None:
    hub.troubles = [trouble]
    with pytest.raises(HubError, match=message) as refused:
        upload(folder)
    assert refused.value.__suppress_context__
    assert "secret" not in str(refused.value)
    assert not hub.repositories or not held(hub)


def test_nobody_is_logged_in(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match=r"--push me/my-hymba: nobody is logged in to the Hub\.\n  to fix     hf auth"):
        check_target(UploadTarget(NAME))
    assert not hub.asked


def test_token_that_the_hub_does_not_know(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN.replace("secret", "secrets"))
    with pytest.raises(HubError, match=r"who is to write to me/my-hymba: the Hub does not know the token\.") as refused:
        check_target(UploadTarget(NAME))
    assert "secret" not in str(refused.value)
    assert hub.asked == ["GET /api/whoami-v2"]


def test_token_that_may_only_read(hub: Hub) -> None:
    hub.role = "read"
    with pytest.raises(HubError, match=r"--push me/my-hymba: the token of me may only read\."):
        check_target(UploadTarget(NAME))


def test_name_of_another(hub: Hub) -> None:
    with pytest.raises(HubError, match=r"me may not write to you\.\n  expected   a name of me or us\n.*--push me/it"):
        check_target(UploadTarget("you/it"))
    check_target(UploadTarget("us/it"))
    check_target(UploadTarget("Me/it"))
    assert not hub.repositories


@pytest.mark.parametrize("name", ["it", "me/it/v2", "me/../it", "me/it.git", "/me/it", "me/-it", "../it", "me/a b"])
def test_name_that_cannot_be_one(name: str) -> None:
    with pytest.raises(ConfigError, match=r"this is no name of a repository\.\n  expected   USER/NAME"):
        check_target(UploadTarget(name))


def test_offline_says_so(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"HF_HUB_OFFLINE forbids all that needs the network\.\n  to fix     unset it"):
        check_target(UploadTarget(NAME))
    assert not hub.asked
