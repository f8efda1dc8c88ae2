"""A local test Hub: the endpoints that the client uses for downloads and uploads, with failures on demand."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "secret" * 6
LARGE = (".safetensors", "tokenizer.json", ".png")
"""Suffixes of files that are uploaded separately from the commit, like LFS files on the Hub."""


@dataclass
class Repository:
    """A repository. The name of a commit is a hash of its files."""

    private: bool = False
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {".gitattributes": b""}})

    def files(self, revision: str) -> dict[str, bytes] | None:
        for name, files in self.branches.items():
            if revision in (name, commit_of(files)):
                return files
        return None


@dataclass
class Failure:
    """A failure of the server instead of a response.

    Attributes:
        method: The method of the requests that fail.
        path: A pattern of their paths.
        status: The status of the response; None to close the connection.
        times: The number of requests that fail.
        headers: The headers of the response.
        after: The number of requests that succeed before.
    """

    method: str
    path: str
    status: int | None = None
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    after: int = 0


class Hub:
    """The server. Its attributes may be changed while it runs."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.failures: list[Failure] = []
        self.requests: list[str] = []
        self.role = "write"
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def failure_of(self, method: str, path: str) -> Failure | None:
        for failure in self.failures:
            if failure.method == method and re.search(failure.path, path) and failure.times:
                if failure.after:
                    failure.after -= 1
                    return None
                failure.times -= 1
                return failure
        return None


def commit_of(files: dict[str, bytes]) -> str:
    """Return the name of the commit with these files."""
    return hashlib.sha1(b"".join(name.encode() + files[name] for name in sorted(files))).hexdigest()


class RefusalError(Exception):
    """A request that the server answers with an error."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def handle_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.read_body()
        if path != "/api/agent-harnesses":  # some versions of the client request this once
            self.hub.requests.append(f"{self.command} {path}")
        failure = self.hub.failure_of(self.command, path)
        try:
            if failure is None:
                self.do(path, body)
            elif failure.status is not None:
                self.answer(failure.status, {"error": "failure on demand"}, failure.headers)
            else:
                self.close_connection = True
                self.connection.close()
        except RefusalError as refusal:
            self.answer(refusal.status, {"error": str(refusal)}, {"X-Error-Code": refusal.code})

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def do(self, path: str, body: bytes) -> None:
        if self.command in ("POST", "PUT") and not path.startswith("/signed/"):
            self.check_token()
        for method, pattern, function in ROUTES:
            if method == self.command and (match := re.fullmatch(pattern, path)):
                function(self, self.hub, body, *match.groups())
                return
        raise RefusalError(404, f"{self.command} {path}", "EntryNotFound")

    do_GET = do_POST = do_PUT = do_HEAD = handle_request  # noqa: N815 (the library's names)

    def check_token(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise RefusalError(401, "Invalid credentials in Authorization header")

    def answer(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _repository(hub: Hub, name: str, handler: Any) -> Repository:
    repository = hub.repositories.get(name)
    if repository is None or (repository.private and handler.headers.get("Authorization") != f"Bearer {TOKEN}"):
        raise RefusalError(404, "Repository not found", "RepoNotFound")
    return repository


def _files(hub: Hub, name: str, revision: str, handler: Any) -> dict[str, bytes]:
    files = _repository(hub, name, handler).files(revision)
    if files is None:
        raise RefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return files


def whoami(handler: Any, hub: Hub, _: bytes) -> None:
    handler.check_token()
    handler.answer(200, {"name": "me", "orgs": [{"name": "us"}], "auth": {"accessToken": {"role": hub.role}}})


def create(handler: Any, hub: Hub, body: bytes) -> None:
    settings = json.loads(body)
    name = f"{settings.get('organization') or 'me'}/{settings['name']}"
    if name in hub.repositories:
        raise RefusalError(409, "You already created this model repo")
    hub.repositories[name] = Repository(private=settings.get("visibility") == "private")
    handler.answer(200, {"url": f"{hub.address}/{name}", "name": name})


def validate(handler: Any, _: Hub, body: bytes) -> None:
    assert json.loads(body)["content"].startswith("---")
    handler.answer(200, {"errors": [], "warnings": []})


def info(handler: Any, hub: Hub, _: bytes, name: str, revision: str | None = None) -> None:
    files = _files(hub, name, revision or "main", handler)
    siblings = [{"rfilename": file} for file in files]
    private = hub.repositories[name].private
    handler.answer(200, {"id": name, "sha": commit_of(files), "private": private, "siblings": siblings})


def tree(handler: Any, hub: Hub, _: bytes, name: str, revision: str) -> None:
    files = _files(hub, name, revision, handler)
    entries = [
        {"type": "file", "path": file, "size": len(content), "oid": _oid(content)} for file, content in files.items()
    ]
    handler.answer(200, entries)


def branch(handler: Any, hub: Hub, _: bytes, name: str, new_branch: str) -> None:
    branches = _repository(hub, name, handler).branches
    if new_branch in branches:
        raise RefusalError(409, "Reference already exists")
    branches[new_branch] = dict(branches["main"])
    handler.answer(200, {})


def preupload(handler: Any, hub: Hub, body: bytes, name: str, revision: str) -> None:
    _files(hub, name, revision, handler)
    modes = [
        {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular"}
        for file in json.loads(body)["files"]
    ]
    handler.answer(200, {"files": [mode | {"shouldIgnore": False} for mode in modes]})


def batch(handler: Any, hub: Hub, body: bytes, name: str) -> None:
    _repository(hub, name, handler)
    objects = []
    for wanted in json.loads(body)["objects"]:
        actions = {
            "upload": {"href": f"{hub.address}/signed/{wanted['oid']}?Signature=verysecret"},
            "verify": {"href": f"{hub.address}/verify"},
        }
        objects.append(wanted if wanted["oid"] in hub.blobs else wanted | {"actions": actions})
    handler.answer(200, {"transfer": "basic", "objects": objects})


def put(handler: Any, hub: Hub, body: bytes, oid: str) -> None:
    assert hashlib.sha256(body).hexdigest() == oid
    hub.blobs[oid] = body
    handler.answer(200, {})


def verify(handler: Any, hub: Hub, body: bytes) -> None:
    assert json.loads(body)["oid"] in hub.blobs
    handler.answer(200, {})


def commit(handler: Any, hub: Hub, body: bytes, name: str, revision: str) -> None:
    files = dict(_files(hub, name, revision, handler))
    for line in map(json.loads, body.splitlines()):
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            files[value["path"]] = hub.blobs[value["oid"]]
        elif line["key"] == "deletedFile":
            del files[value["path"]]
    hub.repositories[name].branches[revision] = files
    oid = commit_of(files)
    handler.answer(200, {"success": True, "commitOid": oid, "commitUrl": f"{hub.address}/{name}/commit/{oid}"})


def resolve(handler: Any, hub: Hub, _: bytes, name: str, revision: str, file: str) -> None:
    files = _files(hub, name, revision, handler)
    if file not in files:
        raise RefusalError(404, "Entry not found", "EntryNotFound")
    content = files[file]
    begin = int(match[1]) if (match := re.match(r"bytes=(\d+)-", handler.headers.get("Range", ""))) else 0
    headers = {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": commit_of(files), "Accept-Ranges": "bytes"}
    if begin:
        headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
    handler.send(206 if begin else 200, content[begin:], headers)


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


MODEL = r"/api/(?:models|datasets)/([^/]+/[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", "/api/whoami-v2", whoami),
    ("POST", "/api/repos/create", create),
    ("POST", "/api/validate-yaml", validate),
    ("GET", MODEL, info),
    ("GET", MODEL + r"/revision/(.+)", info),
    ("GET", MODEL + r"/tree/([^/]+)", tree),
    ("POST", MODEL + r"/branch/(.+)", branch),
    ("POST", MODEL + r"/preupload/(.+)", preupload),
    ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", batch),
    ("PUT", r"/signed/(\w+)", put),
    ("POST", "/verify", verify),
    ("POST", MODEL + r"/commit/(.+)", commit),
    ("GET", r"/(?:datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", resolve),
    ("HEAD", r"/(?:datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", resolve),
]
