"""A small server that speaks the hub's protocol to the real ``huggingface_hub`` client.

It has models with commits and branches, lists their files, sends them whole or by ranges, and takes
uploads as the hub does without Xet (LFS in one part each). It counts what it sends, and can do what
servers and networks do: cut connections, lie about sizes, refuse.

What it says is written after the client and https://huggingface.co/docs/hub/api; it knows nothing
of this package.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

LARGE = 5000
"""Bytes from which a file is in LFS."""


_NONE: Mapping[str, str] = {}


@dataclass
class Stored:
    """A file: its contents, or a path that has them; its hash may be made up for sparse ones."""

    content: bytes | Path
    sha256: str = ""

    @property
    def size(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    @property
    def large(self) -> bool:
        return self.size >= LARGE

    def read(self, begin: int, end: int) -> bytes:
        if isinstance(self.content, bytes):
            return self.content[begin:end]
        with self.content.open("rb") as file:
            file.seek(begin)
            return file.read(end - begin)

    @property
    def digest(self) -> str:
        if not self.sha256:
            self.sha256 = hashlib.sha256(self.read(0, self.size)).hexdigest()
        return self.sha256

    @property
    def oid(self) -> str:
        """Git's hash of it; of a large file that of its pointer (git-lfs's specification)."""
        content = self.read(0, 0 if self.large else self.size)
        if self.large:
            version = "version https://git-lfs.github.com/spec/v1"
            content = f"{version}\noid sha256:{self.digest}\nsize {self.size}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Model:
    commits: dict[str, dict[str, Stored]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    private: bool = False

    def commit(self, files: dict[str, Stored], branch: str = "main") -> str:
        number = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[number] = dict(files)
        self.branches[branch] = number
        return number

    @property
    def files(self) -> dict[str, Stored]:
        return self.commits[self.branches["main"]]


@dataclass
class Hub:
    """The server's state.

    Attributes:
        url: its address.
        sent: bytes of files that it has sent, by name of the file.
        requests: ``METHOD path`` of each request, in their order.
        cut: by file's name, after how many bytes the next answers break off; one each.
        sizes: by file's name, a size that the list gives instead of the true one.
        refused: by file's name, or for a whole model ``ORG/NAME``, the status and the hub's code.
        renamed: of a model's old name, the new one, and the status of the answer that says so.
        token: only who has it may write; and what is private, read.
        reader: a token with which what is private may be read, and nothing written.
        before: called with ``METHOD path`` before each answer.
        fail_commits: how many of the next commits are answered with a 500.
        lost_answers: how many of the next commits are made, and answered with a 500 all the same.
        refuse_commits: how the next commits are answered: a status, and headers.
        lists_lfs: whether its lists of files say which are in LFS.
        instead: answers that are given in place of its own, by a pattern of ``METHOD path``: their
            type and content.
    """

    url: str = ""
    models: dict[str, Model] = field(default_factory=dict)
    sent: Counter[str] = field(default_factory=Counter)
    requests: list[str] = field(default_factory=list)
    cut: dict[str, list[int]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    renamed: dict[str, tuple[str, int]] = field(default_factory=dict)
    token: str = "hf_secret"
    reader: str = "hf_reader"
    before: Callable[[str], None] = lambda _: None
    fail_commits: int = 0
    lost_answers: int = 0
    refuse_commits: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    lists_lfs: bool = True
    instead: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    uploaded: dict[str, bytes] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def publish(self, name: str, folder: Path, branch: str = "main") -> str:
        """All files of a folder as a new commit of a model; returns the commit."""
        files = {
            file.relative_to(folder).as_posix(): Stored(file.read_bytes())
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        }
        return self.models.setdefault(name, Model()).commit(files, branch)


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def use(hub: Hub, cache: Path, patch: pytest.MonkeyPatch, token: str | None = None) -> None:
    """Have the client in this process, and those that it starts, ask ``hub``."""
    import huggingface_hub.constants as constants

    settings = environment(hub, cache, token)
    for name, value in settings.items():
        patch.setenv(name, value)
    patch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))


def environment(hub: Hub, cache: Path, token: str | None = None) -> dict[str, str]:
    """The same for a process of its own."""
    found = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": "1"}
    found |= {"HF_HOME": str(cache / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return found | ({"HF_TOKEN": token} if token else {})


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                self.body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {path}")
        self.hub.before(f"{self.command} {path}")
        for asked, (kind, content) in self.hub.instead.items():
            if re.fullmatch(asked, f"{self.command} {path}"):
                self._send(kind, content)
                return
        for old, (new, status) in self.hub.renamed.items():
            if f"/{old}/" in f"{path}/":
                self._redirect(self.path.replace(f"/{old}", f"/{new}", 1), status)
                return
        for pattern, what in _ROUTES:
            if match := re.fullmatch(pattern, path):
                try:
                    what(self, *match.groups())
                except _RefusedError as refused:
                    self._send_error(refused.status, refused.code, refused.headers)
                return
        self._send_error(404, "")

    # -- reading -----------------------------------------------------------------------------------

    def _model(self, name: str) -> Model:
        if name in self.hub.refused:
            raise _RefusedError(*self.hub.refused[name])
        model = self.hub.models.get(name)
        if model is None or (model.private and not self._may):
            raise _RefusedError(401 if not self._may else 404, "RepoNotFound")
        return model

    @property
    def _may(self) -> bool:
        return self._has(self.hub.token) or self._has(self.hub.reader)

    def _has(self, token: str) -> bool:
        return self.headers.get("Authorization") == f"Bearer {token}"

    def _commit(self, model: Model, revision: str) -> str:
        commit = model.branches.get(revision, revision)
        if commit not in model.commits:
            raise _RefusedError(404, "RevisionNotFound")
        return commit

    def info(self, name: str, revision: str | None = None) -> None:
        model = self._model(name)
        commit = self._commit(model, revision or "main")
        siblings = [{"rfilename": path} for path in model.commits[commit]]
        self._send_json({"id": name, "modelId": name, "sha": commit, "siblings": siblings})

    def tree(self, name: str, revision: str) -> None:
        model = self._model(name)
        entries = []
        for path, file in model.commits[self._commit(model, revision)].items():
            size = self.hub.sizes.get(path, file.size)
            entry: dict[str, Any] = {"type": "file", "path": path, "size": size, "oid": file.oid}
            if file.large and self.hub.lists_lfs:
                entry["lfs"] = {"oid": file.digest, "size": size, "pointerSize": 134}
            entries.append(entry)
        self._send_json(entries)

    def resolve(self, name: str, revision: str, path: str) -> None:
        model = self._model(name)
        commit = self._commit(model, revision)
        if path in self.hub.refused:
            raise _RefusedError(*self.hub.refused[path])
        if path not in model.commits[commit]:
            raise _RefusedError(404, "EntryNotFound")
        file = model.commits[commit][path]
        begin, end, status = 0, file.size, 200
        if (wanted := self.headers.get("Range")) and self.command == "GET":
            first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted).groups()  # type: ignore[union-attr]
            begin, status = int(first), 206
            end = min(int(last) + 1 if last else file.size, file.size)
        etag = file.digest if file.large else file.oid
        self.send_response(status)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{etag}"')
        if file.large:
            self.send_header("X-Linked-Size", str(file.size))
            self.send_header("X-Linked-Etag", f'"{etag}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(end - begin))
        if status == 206:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{file.size}")
        self.end_headers()
        if self.command == "HEAD":
            return
        with self.hub.lock:
            cuts = self.hub.cut.get(path)
            stop = min(end, begin + cuts.pop(0)) if cuts else end
        for start in range(begin, stop, 2**16):
            piece = file.read(start, min(start + 2**16, stop))
            try:
                self.wfile.write(piece)
            except OSError:  # the client has enough
                self.close_connection = True
                return
            with self.hub.lock:
                self.hub.sent[path] += len(piece)
        if stop < end:
            self.close_connection = True

    # -- writing -----------------------------------------------------------------------------------

    def whoami(self) -> None:
        self._writer()
        self._send_json({"name": "me", "type": "user", "orgs": []})

    def create(self) -> None:
        self._writer()
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else ""
        name = name or f"me/{asked['name']}"
        if name in self.hub.refused:
            raise _RefusedError(*self.hub.refused[name])
        url = f"{self.hub.url}/{name}"
        if name in self.hub.models:
            self._send_json({"error": "You already created this model repo", "url": url}, 409)
            return
        model = self.hub.models[name] = Model()
        model.private = bool(asked.get("private")) or asked.get("visibility") == "private"
        model.commit({".gitattributes": Stored(b"*.safetensors filter=lfs\n")})
        self._send_json({"url": url, "id": name})

    def preupload(self, name: str, revision: str) -> None:
        self._writer()
        self._model(name)
        large = LARGE
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["size"] >= large else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in json.loads(self.body)["files"]
        ]
        self._send_json({"files": files})

    def batch(self, name: str) -> None:
        self._writer()
        objects = []
        for one in json.loads(self.body)["objects"]:
            there = one["oid"] in self.hub.uploaded
            upload = {"href": f"{self.hub.url}/lfs/{one['oid']}", "header": {}}
            objects.append(dict(one) | ({} if there else {"actions": {"upload": upload}}))
        self._send_json({"transfer": "basic", "objects": objects})

    def put(self, oid: str) -> None:
        if oid in self.hub.refused:
            raise _RefusedError(*self.hub.refused[oid])
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.uploaded[oid] = self.body
        self._send_json({})

    def commit(self, name: str, revision: str) -> None:
        self._writer()
        model = self._model(name)
        with self.hub.lock:
            if self.hub.fail_commits:
                self.hub.fail_commits -= 1
                raise _RefusedError(500, "")
            if self.hub.refuse_commits:
                status, headers = self.hub.refuse_commits.pop(0)
                raise _RefusedError(status, "", headers)
        files = dict(model.files)
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                if value.get("parentCommit", model.branches["main"]) != model.branches["main"]:
                    raise _RefusedError(412, "A commit has happened since. Please refresh.")
            elif line["key"] == "file":
                files[value["path"]] = Stored(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                files[value["path"]] = Stored(self.hub.uploaded[value["oid"]])
            elif line["key"] == "deletedFile" and files.pop(value["path"], None) is None:
                raise _RefusedError(404, "EntryNotFound")
        commit = model.commit(files)
        if self.hub.lost_answers:
            self.hub.lost_answers -= 1
            raise _RefusedError(500)
        url = f"{self.hub.url}/{name}/commit/{commit}"
        self._send_json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def yaml(self) -> None:
        self._send_json({"errors": [], "warnings": []})

    def may_write(self, name: str) -> None:
        self._model(name)
        self._writer()
        self._send_json({})

    def _writer(self) -> None:
        if not self._has(self.hub.token):
            raise _RefusedError(403 if self._may else 401, "")

    # -- answers -----------------------------------------------------------------------------------

    def _send_json(self, value: object, status: int = 200) -> None:
        self._send("application/json", json.dumps(value).encode(), status)

    def _send(self, kind: str, body: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _redirect(self, path: str, status: int) -> None:
        self.send_response(status)
        self.send_header("Location", path)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send_error(self, status: int, code: str, headers: Mapping[str, str] = _NONE) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", f"{code or status}: as the test wants it")
        self.send_header("Content-Length", "0")
        self.end_headers()


class _RefusedError(Exception):
    def __init__(self, status: int, code: str = "", headers: Mapping[str, str] = _NONE) -> None:
        self.status, self.code, self.headers = status, code, headers


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES: list[tuple[str, Callable[..., None]]] = [
    (f"/api/models/{_NAME}", _Handler.info),
    (f"/api/models/{_NAME}/revision/(.+)", _Handler.info),
    (f"/api/models/{_NAME}/tree/([^/]+|refs/pr/[0-9]+)", _Handler.tree),
    (f"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
    (f"/api/models/{_NAME}/auth-check/write", _Handler.may_write),
    ("/api/whoami-v2", _Handler.whoami),
    ("/api/repos/create", _Handler.create),
    (f"/api/models/{_NAME}/preupload/(.+)", _Handler.preupload),
    (rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    ("/lfs/([0-9a-f]{64})", _Handler.put),
    (f"/api/models/{_NAME}/commit/(.+)", _Handler.commit),
    ("/api/validate-yaml", _Handler.yaml),
]
