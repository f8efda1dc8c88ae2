"""Uploads a folder to the Hugging Face Hub: checked first, in one commit, and resumed after an interruption."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils.tqdm import disable_progress_bars

from hymba_tune.errors import ConfigError, HubError
from hymba_tune.hub.refusals import LOG_IN, refusals_explained
from hymba_tune.registry import is_hub_id

EMPTY = {".gitattributes"}
"""The files that the Hub creates in a new repository."""
MAIN = "main"
WRITING = ("write", "admin", "fineGrained")
"""The roles of tokens that may write. Whether a fine-grained token may is known only when it tries."""


@dataclass(frozen=True)
class UploadTarget:
    """The target of an upload.

    Attributes:
        repository: The repository, ``USER/NAME``.
        private: Whether a new repository is private.
        revision: The branch; main if None.
        update: Whether existing files may be replaced.
    """

    repository: str
    private: bool = False
    revision: str | None = None
    update: bool = False

    @property
    def branch(self) -> str:
        """The name of the branch."""
        return self.revision or MAIN


def check_target(target: UploadTarget) -> None:
    """Check, before any long step, that an upload is permitted and would replace nothing without --update.

    Raises:
        ConfigError: If the name is invalid.
        HubError: If nobody is logged in, the token may not write there, or the name is taken.
    """
    name = target.repository
    if not is_hub_id(name):
        raise ConfigError(f"--push {name}: not a valid repository name.", expected="USER/NAME, such as me/my-hymba")
    if huggingface_hub.get_token() is None:
        raise HubError(f"--push {name}: nobody is logged in to the Hub.", fix=LOG_IN)
    api = HfApi()
    with refusals_explained(f"check the access to {name}", "try again"):
        user = api.whoami()
    owners = [user["name"], *(org["name"] for org in user.get("orgs", []))]
    owner = name.partition("/")[0]
    if owner.lower() not in map(str.lower, owners):
        raise HubError(
            f"--push {name}: {user['name']} may not write to {owner}.",
            expected=f"a name of {' or '.join(owners)}",
            fix=f"--push {user['name']}/{name.partition('/')[2]}",
        )
    role = user.get("auth", {}).get("accessToken", {}).get("role")
    if role is not None and role not in WRITING:
        raise HubError(f"--push {name}: the token of {user['name']} has only {role} permission.", fix=LOG_IN)
    with refusals_explained(f"look up {name}", "try again"):
        repository = _read_state(api, target)
    _check_replaceable(repository, target)


def push(folder: Path, target: UploadTarget, *, message: str, retry: str) -> str:
    """Upload a folder in one commit, so that readers see either all new files or all old ones.

    Large files that an earlier attempt has uploaded are not sent again.

    Args:
        folder: The folder whose files are uploaded.
        target: The target, which `check_target` has accepted.
        message: The commit message.
        retry: The command that resumes an interrupted upload.

    Returns:
        The address of the upload.

    Raises:
        HubError: If the upload failed. The repository is then unchanged, or new and empty.
    """
    api = HfApi()
    name = target.repository
    disable_progress_bars()  # the caller shows the progress
    with refusals_explained(f"upload to {name}", retry):
        repository = _read_state(api, target)
        _check_replaceable(repository, target)
        if not repository.exists:
            api.create_repo(name, private=target.private or None, exist_ok=True)
        if not repository.has_branch:
            api.create_branch(name, branch=target.branch, exist_ok=True)
        files = {file.name: file for file in sorted(folder.iterdir()) if file.is_file()}
        operations: list[Any] = [
            CommitOperationAdd(path_in_repo=file, path_or_fileobj=path) for file, path in files.items()
        ]
        operations += [CommitOperationDelete(path_in_repo=old) for old in sorted(repository.files - files.keys())]
        api.create_commit(name, operations, commit_message=message, revision=target.branch)
    return f"{api.endpoint}/{name}" + ("" if target.branch == MAIN else f"/tree/{target.branch}")


@dataclass(frozen=True)
class _RepositoryState:
    """The state of a target before an upload: the repository, its branch, and the files that would be replaced."""

    exists: bool = False
    private: bool = False
    has_branch: bool = True
    files: frozenset[str] = frozenset()


def _read_state(api: HfApi, target: UploadTarget) -> _RepositoryState:
    try:
        info = api.model_info(target.repository)
    except RepositoryNotFoundError:
        return _RepositoryState(has_branch=target.branch == MAIN)
    private = bool(info.private)
    has_branch = True
    try:
        info = api.model_info(target.repository, revision=target.branch)
    except RevisionNotFoundError:
        has_branch = False  # a new branch starts as a copy of main
    files = {sibling.rfilename for sibling in info.siblings or []}
    return _RepositoryState(True, private, has_branch, frozenset(files - EMPTY))


def _check_replaceable(repository: _RepositoryState, target: UploadTarget) -> None:
    """Check that an upload would neither publish a private model nor replace files without --update.

    Raises:
        HubError: If it would.
    """
    name = target.repository
    if repository.exists and target.private and not repository.private:
        raise HubError(
            f"--push {name}: the repository exists and is public.",
            fix="make it private in its settings on the Hub, or use another name",
        )
    if repository.has_branch and repository.files and not target.update:
        place = name if target.branch == MAIN else f"The branch {target.branch} of {name}"
        raise HubError(
            f"--push {name}: the name is taken. {place} contains {len(repository.files)} files.",
            fix="use another name, --update to replace the files, or --revision for another branch",
        )
