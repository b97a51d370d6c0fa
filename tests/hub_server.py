"""A Hub on loopback: a real HTTP server that speaks what huggingface_hub's client needs, and fails on demand.

Repositories live in memory, as commits that hold all their files. Take the fixture `hub` with
`pytest_plugins = ("hub_server",)` in a test module; in that test, huggingface_hub talks to this server. For other
processes, `hub.environment()` has the variables to set.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml

WRITER, READER = "hf_writer", "hf_reader"
"""A token that may write to `user/...`, and one that may not."""

BASE_MODEL_ID = re.compile(r"(?:[\w.-]+/)?[\w.-]+")


@dataclass(frozen=True)
class Commit:
    oid: str
    files: dict[str, bytes]
    parent: str | None
    title: str


@dataclass
class Repo:
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    """Branches, tags and `refs/pr/{n}` by name."""

    def resolve(self, revision: str) -> Commit | None:
        return self.commits.get(self.refs.get(revision, revision))

    def commit(self, ref: str, parent: str | None, files: Mapping[str, bytes], title: str) -> Commit:
        content = [ref, parent, title, len(self.commits), sorted((n, _sha256(b)) for n, b in files.items())]
        oid = hashlib.sha1(json.dumps(content).encode()).hexdigest()
        self.commits[oid] = Commit(oid, dict(files), parent, title)
        self.refs[ref] = oid
        return self.commits[oid]


@dataclass
class Fault:
    """What goes wrong with requests whose `METHOD /path` matches `where`."""

    kind: str | int
    """A status; `drop`: hang up before the request is read; `drop after`: do what is asked, then hang up; `truncate`:
    hang up in the middle of the answer's body."""

    where: str
    times: int
    headers: dict[str, str]


class LoopbackHub:
    """The server, and what tests ask of it."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.listed_sizes: dict[str, int] = {}
        """Sizes by file that listings tell instead of the true ones, so that no test has to hold gigabytes."""
        self.lfs = False
        """Whether safetensors files are to go up by LFS, as on the Hub; else all within the commit."""
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> LoopbackHub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add_repo(self, repo_id: str, files: Mapping[str, bytes] | None = None, *, private: bool = False) -> Repo:
        repo = self.repos[repo_id] = Repo(private)
        repo.commit("main", None, {".gitattributes": b"", **(files or {})}, "initial commit")
        return repo

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a repository, but for those that the Hub makes itself."""
        commit = self.repos[repo_id].resolve(revision)
        assert commit is not None, f"{repo_id} has no {revision}"
        return {name: data for name, data in commit.files.items() if name != ".gitattributes"}

    def history(self, repo_id: str, revision: str = "main") -> list[str]:
        """The titles of a revision's commits after the first, oldest first."""
        repo, titles = self.repos[repo_id], []
        commit = repo.resolve(revision)
        while commit is not None and commit.parent is not None:
            titles.insert(0, commit.title)
            commit = repo.commits[commit.parent]
        return titles

    def fail(self, kind: str | int, where: str, times: int = 1, **headers: str) -> Fault:
        """Let the next `times` requests fail whose `METHOD /path` matches `where`."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.faults.append(Fault(kind, where, times, named))
        return self.faults[-1]

    def take_fault(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.where, request):
                    fault.times -= 1
                    return fault
        return None

    def writes(self) -> list[str]:
        """The requests so far that asked for a change."""
        return [f"{method} {path}" for method, path in self.requests if method not in ("GET", "HEAD")]

    def environment(self, home: Path, token: str | None = WRITER) -> dict[str, str]:
        """The variables of another process that is to use this Hub."""
        return {
            **os.environ,
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_TOKEN": token or "",
            "NO_PROXY": "127.0.0.1",
        }


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    """A Hub without repositories, which huggingface_hub talks to with the token `WRITER` while the test runs."""
    from huggingface_hub import constants, hf_api
    from transformers.utils import hub as transformers_hub

    with LoopbackHub() as server:
        cache = tmp_path_factory.mktemp("hub_cache")
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(cache),
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(hf_api.api, "endpoint", server.url)
        # transformers keeps a client of its own, which would go on talking to the server of an earlier test.
        monkeypatch.setattr(transformers_hub, "_hf_api", None, raising=False)
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
            monkeypatch.delenv(name.upper(), raising=False)
        monkeypatch.setenv("HF_TOKEN", WRITER)
        yield server


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The client's pauses before it tries again are noted instead of made."""
    import time

    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


# The protocol


class _Refusal(Exception):
    """An answer that is not a success."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append((self.command, path))
        fault = self.hub.take_fault(f"{self.command} {path}")
        if fault is not None and fault.kind == "drop":
            self._hang_up()
            return
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if fault is not None and isinstance(fault.kind, int):
            self._answer(fault.kind, {"error": f"injected {fault.kind}"}, fault.headers)
            return
        try:
            with self.hub.lock:
                status, content, headers = self._route(path, parse_qs(urlsplit(self.path).query))
        except _Refusal as refusal:
            code = {"X-Error-Code": refusal.code} if refusal.code else {}
            status, content = refusal.status, {"error": refusal.message}
            headers = {**code, "X-Error-Message": refusal.message}
        except Exception:
            # A mistake in this file: let the test show it.
            status, content, headers = 500, {"error": traceback.format_exc()[-250:]}, {}
        if fault is not None and fault.kind == "drop after":
            self._hang_up()
            return
        self._answer(status, content, headers, truncate=fault is not None and fault.kind == "truncate")

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _answer(self, status: int, content: Any, headers: Mapping[str, str], truncate: bool = False) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if truncate else data)
        if truncate:
            self.wfile.flush()
            self._hang_up()

    def _route(self, path: str, query: dict[str, list[str]]) -> tuple[int, Any, dict[str, str]]:
        for method, pattern, handle in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split("|"):
                groups = {name: unquote(value) for name, value in match.groupdict(default="").items()}
                return handle(self, query=query, **groups)
        raise _Refusal(404, f"no such route: {self.command} {path}")

    # Who may do what

    @property
    def _token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def _repo_to_read(self, repo: str) -> Repo:
        found = self.hub.repos.get(repo)
        if found is None or (found.private and self._token != WRITER):
            raise _Refusal(404 if self._token else 401, "Repository not found", "RepoNotFound")
        return found

    def _repo_to_write(self, repo: str, query: Mapping[str, list[str]] | None = None) -> Repo:
        # Whoever may read a repository may ask its owner to take something.
        if (query or {}).get("create_pr") != ["1"] or self._token != WRITER:
            self._check_may_write(repo)
        return self._repo_to_read(repo)

    def _check_may_write(self, repo: str) -> None:
        if self._token not in (WRITER, READER):
            raise _Refusal(401, "Invalid credentials in Authorization header")
        if self._token == READER or not repo.startswith("user/"):
            raise _Refusal(403, f"you may not write to {repo}")

    def _commit(self, repo: Repo, revision: str) -> Commit:
        commit = repo.resolve(revision or "main")
        if commit is None:
            raise _Refusal(404, f"no revision {revision}", "RevisionNotFound")
        return commit

    # Reading

    def _info(self, repo: str, rev: str = "", **_: Any) -> tuple[int, Any, dict[str, str]]:
        found = self._repo_to_read(repo)
        commit = self._commit(found, rev)
        siblings = [
            {"rfilename": name, "size": self.hub.listed_sizes.get(name, len(data)), "blobId": _git_oid(data)}
            for name, data in commit.files.items()
        ]
        return 200, {"id": repo, "sha": commit.oid, "private": found.private, "siblings": siblings}, {}

    def _tree(self, repo: str, rev: str, **_: Any) -> tuple[int, Any, dict[str, str]]:
        commit = self._commit(self._repo_to_read(repo), rev)
        files = [
            {"type": "file", "path": name, "size": self.hub.listed_sizes.get(name, len(data)), "oid": _git_oid(data)}
            for name, data in commit.files.items()
        ]
        return 200, files, {}

    def _refs(self, repo: str, **_: Any) -> tuple[int, Any, dict[str, str]]:
        refs = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid}
            for name, oid in self._repo_to_read(repo).refs.items()
            if not name.startswith("refs/")
        ]
        return 200, {"branches": refs, "converts": [], "tags": []}, {}

    def _resolve(self, repo: str, rev: str, name: str, **_: Any) -> tuple[int, Any, dict[str, str]]:
        commit = self._commit(self._repo_to_read(repo), rev)
        if name not in commit.files:
            raise _Refusal(404, f"no file {name}", "EntryNotFound")
        data = commit.files[name]
        headers = {"ETag": f'"{_sha256(data)}"', "X-Repo-Commit": commit.oid}
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if asked is None:
            return 200, data, headers
        start = int(asked[1])
        return 206, data[start:], {**headers, "Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}

    def _whoami(self, **_: Any) -> tuple[int, Any, dict[str, str]]:
        if self._token not in (WRITER, READER):
            raise _Refusal(401, "Invalid credentials in Authorization header")
        return 200, {"name": "user", "type": "user", "orgs": []}, {}

    # Writing

    def _create(self, **_: Any) -> tuple[int, Any, dict[str, str]]:
        asked = json.loads(self.body)
        repo = f"{asked.get('organization') or 'user'}/{asked['name']}"
        self._check_may_write(repo)
        url = f"{self.hub.url}/{repo}"
        if repo in self.hub.repos:
            return 409, {"error": "You already created this model repo", "url": url}, {}
        self.hub.add_repo(repo, private=asked.get("visibility") == "private")
        return 200, {"url": url, "name": repo, "id": repo}, {}

    def _validate(self, **_: Any) -> tuple[int, Any, dict[str, str]]:
        block = re.match(r"\s*---\r?\n(.*?)\r?\n---", json.loads(self.body)["content"], re.DOTALL)
        metadata = yaml.safe_load(block[1]) if block else None
        base = (metadata or {}).get("base_model")
        bases = base if isinstance(base, list) else [base] if base else []
        errors = [
            {"message": f'"base_model" with value "{value}" is not valid. Use a model id from https://hf.co/models.'}
            for value in bases
            if not BASE_MODEL_ID.fullmatch(str(value))
        ]
        warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
        return 400 if errors else 200, {"errors": errors, "warnings": warnings}, {}

    def _preupload(self, repo: str, rev: str, query: dict[str, list[str]]) -> tuple[int, Any, dict[str, str]]:
        files = self._commit(self._repo_to_write(repo, query), rev).files
        answers = []
        for entry in json.loads(self.body)["files"]:
            mode = "lfs" if self.hub.lfs and entry["path"].endswith(".safetensors") else "regular"
            known = files.get(entry["path"])
            oid = None if known is None else _sha256(known) if mode == "lfs" else _git_oid(known)
            answers.append({"path": entry["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return 200, {"files": answers}, {}

    def _lfs_batch(self, repo: str, **_: Any) -> tuple[int, Any, dict[str, str]]:
        self._repo_to_write(repo)
        objects = [
            {
                "oid": entry["oid"],
                "size": entry["size"],
                "actions": {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}", "header": {}}},
            }
            for entry in json.loads(self.body)["objects"]
        ]
        return 200, {"transfer": "basic", "objects": objects}, {}

    def _lfs_put(self, oid: str, **_: Any) -> tuple[int, Any, dict[str, str]]:
        data = self.body or self._chunked_body()
        if _sha256(data) != oid:
            raise _Refusal(400, "the content has another digest")
        self.hub.blobs[oid] = data
        return 200, b"", {}

    def _chunked_body(self) -> bytes:
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _write_commit(self, repo: str, rev: str, query: dict[str, list[str]]) -> tuple[int, Any, dict[str, str]]:
        found = self._repo_to_write(repo, query)
        head = self._commit(found, rev)
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit", head.oid) != head.oid:
            raise _Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for line in (line for line in lines if line["key"] != "header"):
            self._apply(files, line["key"], line["value"])
        pull_request = query.get("create_pr") == ["1"]
        number = sum(name.startswith("refs/pr/") for name in found.refs) + 1
        ref = f"refs/pr/{number}" if pull_request else (rev or "main")
        commit = found.commit(ref, head.oid, files, header["summary"])
        url = f"{self.hub.url}/{repo}"
        answer = {"success": True, "commitOid": commit.oid, "commitUrl": f"{url}/commit/{commit.oid}"}
        return 200, {**answer, **({"pullRequestUrl": f"{url}/discussions/{number}"} if pull_request else {})}, {}

    def _apply(self, files: dict[str, bytes], key: str, value: Mapping[str, Any]) -> None:
        if key == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            if value["oid"] not in self.hub.blobs:
                raise _Refusal(400, f"{value['path']} was not uploaded")
            files[value["path"]] = self.hub.blobs[value["oid"]]
        elif value["path"] in files:
            del files[value["path"]]
        else:
            raise _Refusal(404, f"A file with this name doesn't exist: {value['path']}", "EntryNotFound")

    def _branch(self, repo: str, rev: str, **_: Any) -> tuple[int, Any, dict[str, str]]:
        found = self._repo_to_write(repo)
        if rev in found.refs:
            raise _Refusal(409, f"{rev} exists")
        start = json.loads(self.body or b"{}").get("startingPoint") or "main"
        found.refs[rev] = self._commit(found, start).oid
        return 200, {}, {}

    def _tag(self, repo: str, rev: str, **_: Any) -> tuple[int, Any, dict[str, str]]:
        found = self._repo_to_write(repo)
        found.refs[json.loads(self.body)["tag"]] = self._commit(found, rev).oid
        return 200, {}, {}


_ID = r"(?P<repo>[\w.-]+/[\w.-]+)"
_REV = r"(?P<rev>[^/]+)"
_ROUTES: list[tuple[str, str, Callable[..., tuple[int, Any, dict[str, str]]]]] = [
    ("GET", "/api/whoami-v2", _Handler._whoami),
    ("POST", "/api/repos/create", _Handler._create),
    ("POST", "/api/validate-yaml", _Handler._validate),
    ("GET", f"/api/models/{_ID}", _Handler._info),
    ("GET", f"/api/models/{_ID}/revision/{_REV}", _Handler._info),
    ("GET", f"/api/models/{_ID}/tree/{_REV}", _Handler._tree),
    ("GET", f"/api/models/{_ID}/refs", _Handler._refs),
    ("POST", f"/api/models/{_ID}/preupload/{_REV}", _Handler._preupload),
    ("POST", f"/api/models/{_ID}/commit/{_REV}", _Handler._write_commit),
    ("POST", f"/api/models/{_ID}/branch/{_REV}", _Handler._branch),
    ("POST", f"/api/models/{_ID}/tag/{_REV}", _Handler._tag),
    ("POST", f"/{_ID}.git/info/lfs/objects/batch", _Handler._lfs_batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", _Handler._lfs_put),
    ("GET|HEAD", f"/{_ID}/resolve/{_REV}/(?P<name>.+)", _Handler._resolve),
]
