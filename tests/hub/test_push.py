"""Uploads by the real client to a local test Hub."""

from __future__ import annotations

from pathlib import Path

import pytest

from hymba_tune.errors import ConfigError, HubError
from hymba_tune.hub.push import UploadTarget, check_target, push
from tests.hub.server import TOKEN, Failure, Hub, Repository

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # from the client's HTTP library
NAME = "me/my-hymba"
RETRY = "hymba-tune export my-hymba --push me/my-hymba"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "my-hymba"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: hymba-nano\n---\n# mine\n")
    (folder / "config.json").write_text("{}")
    for number in (1, 2):
        (folder / f"model-{number}.safetensors").write_bytes(bytes([number]) * 1000)
    return folder


def upload(folder: Path, **options: object) -> str:
    target = UploadTarget(NAME, **options)  # type: ignore[arg-type]
    check_target(target)
    return push(folder, target, message="Upload", retry=RETRY)


def uploaded(hub: Hub, branch: str = "main") -> dict[str, bytes]:
    files = hub.repositories[NAME].branches[branch]
    return {name: content for name, content in files.items() if name != ".gitattributes"}


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("private", [False, True])
def test_uploads_all_files_to_a_new_repository(private: bool, hub: Hub, folder: Path) -> None:
    assert upload(folder, private=private) == f"{hub.address}/{NAME}"
    assert uploaded(hub) == contents(folder)
    assert hub.repositories[NAME].private is private
    assert sum("/commit/" in request for request in hub.requests) == 1


def test_revision_is_a_separate_branch(hub: Hub, folder: Path) -> None:
    upload(folder)
    (folder / "model-2.safetensors").unlink()
    assert upload(folder, revision="small") == f"{hub.address}/{NAME}/tree/small"
    assert uploaded(hub, "small") == contents(folder)
    assert "model-2.safetensors" in uploaded(hub)
    with pytest.raises(HubError, match=r"the name is taken\. The branch small of me/my-hymba contains 3 files\."):
        upload(folder, revision="small")


def test_revision_of_a_new_repository_is_created(hub: Hub, folder: Path) -> None:
    upload(folder, revision="first")
    assert uploaded(hub, "first") == contents(folder)
    assert not uploaded(hub)


def test_existing_repository_is_not_changed(hub: Hub) -> None:
    hub.repositories[NAME] = Repository(branches={"main": {"model.safetensors": b"another"}})
    with pytest.raises(HubError, match=r"the name is taken\. me/my-hymba contains 1 files\.\n  to fix .*--update"):
        check_target(UploadTarget(NAME))
    assert uploaded(hub) == {"model.safetensors": b"another"}


def test_update_replaces_existing_files(hub: Hub, folder: Path) -> None:
    hub.repositories[NAME] = Repository(branches={"main": {"old.safetensors": b"old", "config.json": b"old"}})
    upload(folder, update=True)
    assert uploaded(hub) == contents(folder)


def test_private_upload_does_not_go_to_a_public_repository(hub: Hub, folder: Path) -> None:
    hub.repositories[NAME] = Repository()
    with pytest.raises(HubError, match=r"the repository exists and is public\.\n  to fix .*make it private"):
        upload(folder, private=True)
    assert not uploaded(hub)


def test_interrupted_upload_resumes(hub: Hub, folder: Path) -> None:
    """Uploaded files are not sent again, and readers see no file before all of them are uploaded."""
    hub.failures = [Failure("PUT", "/signed/", times=99, after=1)]
    with pytest.raises(HubError, match=rf"Cannot upload to {NAME}: the connection to the Hub failed(.|\n)*{RETRY}"):
        upload(folder)
    assert len(hub.blobs) == 1
    assert not uploaded(hub)
    hub.failures = []
    hub.requests = []
    upload(folder)
    assert sum(request.startswith("PUT") for request in hub.requests) == 1
    assert uploaded(hub) == contents(folder)


@pytest.mark.parametrize("status", [None, 503, 429])
def test_transient_failure_is_retried(status: int | None, hub: Hub, folder: Path) -> None:
    hub.failures = [Failure("PUT", "/signed/", status=status, times=3)]
    upload(folder)
    assert uploaded(hub) == contents(folder)


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (
            Failure("POST", "/batch", 429, 99),
            r"too many requests to the Hub\.\n  to fix     in a few minutes: hymba",
        ),
        (
            Failure("POST", "/batch", 429, 99, {"Retry-After": "7"}),
            r"too many requests to the Hub\.\n  to fix     in 7 sec",
        ),
        (Failure("POST", "/batch", 503, 99), r"internal error \(503\)\.\n  to fix     later: hymba-tune"),
        (Failure("POST", "/commit/", 401), r"the Hub rejects the token as invalid\.\n  to fix     hf auth login"),
        (Failure("POST", "/create", 403), r"the token does not permit it\.\n  to fix     hf auth login"),
        (Failure("POST", "/commit/", 400), r"Cannot upload to me/my-hymba: .*\(error 400\)\.\n  to fix     hymba-tune"),
        (Failure("POST", "/commit/"), r"the connection to the Hub failed"),
        (Failure("PUT", "/signed/", 403, 99), r"the token does not permit it"),
    ],
    ids=["busy", "busy with delay", "down", "unknown token", "forbidden", "bad request", "disconnected", "expired"],
)
def test_refusal_is_one_message_without_secrets(failure: Failure, message: str, hub: Hub, folder: Path) -> None:
    hub.failures = [failure]
    with pytest.raises(HubError, match=message) as refused:
        upload(folder)
    assert refused.value.__suppress_context__
    assert "secret" not in str(refused.value)
    assert not hub.repositories or not uploaded(hub)


def test_upload_without_a_login_is_refused(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match=r"--push me/my-hymba: nobody is logged in to the Hub\.\n  to fix     hf auth"):
        check_target(UploadTarget(NAME))
    assert not hub.requests


def test_invalid_token_is_refused(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN.replace("secret", "secrets"))
    with pytest.raises(HubError, match=r"check the access to me/my-hymba: the Hub rejects the token") as refused:
        check_target(UploadTarget(NAME))
    assert "secret" not in str(refused.value)
    assert hub.requests == ["GET /api/whoami-v2"]


def test_read_token_is_refused(hub: Hub) -> None:
    hub.role = "read"
    with pytest.raises(HubError, match=r"--push me/my-hymba: the token of me has only read permission\."):
        check_target(UploadTarget(NAME))


def test_name_of_another_owner_is_refused(hub: Hub) -> None:
    with pytest.raises(HubError, match=r"me may not write to you\.\n  expected   a name of me or us\n.*--push me/it"):
        check_target(UploadTarget("you/it"))
    check_target(UploadTarget("us/it"))
    check_target(UploadTarget("Me/it"))
    assert not hub.repositories


@pytest.mark.parametrize("name", ["it", "me/it/v2", "me/../it", "me/it.git", "/me/it", "me/-it", "../it", "me/a b"])
def test_invalid_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"not a valid repository name\.\n  expected   USER/NAME"):
        check_target(UploadTarget(name))


def test_upload_offline_is_refused(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"HF_HUB_OFFLINE is set\.\n  to fix     unset it"):
        check_target(UploadTarget(NAME))
    assert not hub.requests
