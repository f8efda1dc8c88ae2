"""Uploading a folder to the Hugging Face Hub: looked at before, one commit, gone on with after a break."""

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
"""What the Hub puts into a new repository."""
MAIN = "main"
WRITING = ("write", "admin", "fineGrained")
"""Tokens that may write, as far as can be known beforehand: a fine-grained one may or may not."""


@dataclass(frozen=True)
class UploadTarget:
    """Where to upload to.

    Attributes:
        repository: ``USER/NAME``.
        private: Whether a new repository is a private one.
        revision: Branch; main when None.
        update: Whether what it holds may be replaced.
    """

    repository: str
    private: bool = False
    revision: str | None = None
    update: bool = False

    @property
    def branch(self) -> str:
        """The branch."""
        return self.revision or MAIN


def check_target(target: UploadTarget) -> None:
    """See, before anything takes long, that an upload would be let in, and would replace nothing unasked.

    Raises:
        ConfigError: If the name cannot be one.
        HubError: If nobody is logged in, the token may not write there, or the name is taken.
    """
    name = target.repository
    if not is_hub_id(name):
        raise ConfigError(f"--push {name}: this is no name of a repository.", expected="USER/NAME, as me/my-hymba")
    if huggingface_hub.get_token() is None:
        raise HubError(f"--push {name}: nobody is logged in to the Hub.", fix=LOG_IN)
    api = HfApi()
    with refusals_explained(f"ask the Hub who is to write to {name}", "try again"):
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
        raise HubError(f"--push {name}: the token of {user['name']} may only {role}.", fix=LOG_IN)
    with refusals_explained(f"look for {name}", "try again"):
        found = _look(api, target)
    _check_free(found, target)


def push(folder: Path, target: UploadTarget, *, message: str, again: str) -> str:
    """Upload a folder as one commit, so that a reader finds all of it or what was there before.

    Large files that an earlier try has brought over are not sent again.

    Args:
        folder: Whose files are uploaded.
        target: As `check_target` found it.
        message: The message of the commit.
        again: The command that goes on after a break.

    Returns:
        The address of what was uploaded.

    Raises:
        HubError: If it did not end well. The repository is then as it was, or new and empty.
    """
    api, name = HfApi(), target.repository
    disable_progress_bars()  # whoever called shows that it goes on
    with refusals_explained(f"upload to {name}", again):
        found = _look(api, target)
        _check_free(found, target)
        if not found.exists:
            api.create_repo(name, private=target.private or None, exist_ok=True)
        if not found.has_branch:
            api.create_branch(name, branch=target.branch, exist_ok=True)
        files = {file.name: file for file in sorted(folder.iterdir()) if file.is_file()}
        work: list[Any] = [CommitOperationAdd(path_in_repo=file, path_or_fileobj=path) for file, path in files.items()]
        work += [CommitOperationDelete(path_in_repo=old) for old in sorted(found.files - files.keys())]
        api.create_commit(name, work, commit_message=message, revision=target.branch)
    return f"{api.endpoint}/{name}" + ("" if target.branch == MAIN else f"/tree/{target.branch}")


@dataclass(frozen=True)
class _Found:
    """What is there already: a repository, a branch of it, and the files that an upload would replace."""

    exists: bool = False
    private: bool = False
    has_branch: bool = True
    files: frozenset[str] = frozenset()


def _look(api: HfApi, target: UploadTarget) -> _Found:
    try:
        info = api.model_info(target.repository)
    except RepositoryNotFoundError:
        return _Found(has_branch=target.branch == MAIN)
    has_branch, private = True, bool(info.private)
    try:
        info = api.model_info(target.repository, revision=target.branch)
    except RevisionNotFoundError:
        has_branch = False  # a new one begins as main is
    files = {sibling.rfilename for sibling in info.siblings or []}
    return _Found(True, private, has_branch, frozenset(files - EMPTY))


def _check_free(found: _Found, target: UploadTarget) -> None:
    """See that an upload does what the settings say, and no more.

    Raises:
        HubError: If a private upload would be public, or something is there that was not to be replaced.
    """
    name = target.repository
    if found.exists and target.private and not found.private:
        raise HubError(
            f"--push {name}: there is such a repository, and it is public.",
            fix="make it private in its settings on the Hub, or use another name",
        )
    if found.has_branch and found.files and not target.update:
        where = name if target.branch == MAIN else f"The branch {target.branch} of {name}"
        raise HubError(
            f"--push {name}: the name is taken. {where} holds {len(found.files)} files.",
            fix="another name, or --update to replace them, or --revision for a branch of its own",
        )
