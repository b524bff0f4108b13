"""A stand-in for the Hugging Face Hub on the loopback address: the part of its HTTP API that publishing a model uses.

It keeps repositories in memory, with branches and commits, large files (LFS) apart from small ones, as the Hub does.
``fail(step, ...)`` makes a step go wrong. The steps: ``create``, ``delete``, ``info``, ``validate``, ``preupload``,
``lfs_batch``, ``lfs_upload``, ``lfs_verify``, ``commit``, ``resolve`` (a file's headers), ``download`` (its content).
"""
import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

LARGE = (".safetensors", ".bin", ".png")


@dataclass
class Repo:
    """A repository: its commits in order (each the whole tree, name to content) and where its branches stand."""

    private: bool
    trees: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, tree: dict[str, bytes], message: str) -> str:
        sha = hashlib.sha1(f"{len(self.trees)}{message}".encode()).hexdigest()
        self.trees[sha] = tree
        self.branches[branch] = sha
        self.messages.append(message)
        return sha

    @property
    def files(self) -> dict[str, bytes]:
        return self.trees[self.branches["main"]]


@dataclass
class Fault:
    """How a step goes wrong: an HTTP status, the connection cut (after the work with ``late``; in a download after
    ``after`` bytes), damaged bytes, or something that happens ``meanwhile``; on paths that end in ``only``."""

    status: int | None = None
    message: str = ""
    body: str | None = None
    cut: bool = False
    late: bool = False
    after: int = 1000
    damage: bool = False
    meanwhile: Callable[[], Any] | None = None
    only: str = ""
    times: int = 10 ** 9


class HubServer:
    """The stand-in. Use as a context manager; ``url`` is its address.

    Tokens: ``writer`` may do everything under ``alice/``, ``reader`` may read.
    """

    writer = "hf_" + "AliceWrites0123456789aliceWrites01"
    reader = "hf_" + "AliceReads0123456789aliceReads0123"

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.faults: dict[str, Fault] = {}
        self.requests: list[tuple[str, str]] = []
        self.seen_ranges: list[str] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.cdn = f"http://localhost:{self._server.server_port}"  # another host, as the real one has for large files
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, repo_id: str, files: dict[str, bytes], private: bool = False) -> Repo:
        """Add a repository that is there before the test."""
        repo = self.repos[repo_id] = Repo(private)
        repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n", **files}, "initial commit")
        return repo

    def fail(self, step: str, **how: Any) -> None:
        """Make a step go wrong from now on, ``times`` times."""
        self.faults[step] = Fault(**how)

    def mend(self) -> None:
        """Let everything work again."""
        self.faults.clear()

    def fault(self, step: str, path: str) -> Fault | None:
        fault = self.faults.get(step)
        if fault is None or fault.times <= 0 or not path.endswith(fault.only):
            return None
        fault.times -= 1
        return fault


class _Cut(Exception):
    """The connection is closed without a further byte."""


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str = "") -> None:
        self.status, self.message, self.code = status, message, code


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    routes = (
        ("POST", r"/api/repos/create", "create"),
        ("DELETE", r"/api/repos/delete", "delete"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", "info"),
        ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", "tree"),
        ("POST", r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", "preupload"),
        ("POST", r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", "commit"),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/([0-9a-f]{64})", "lfs_upload"),
        ("POST", r"/lfs/verify", "lfs_verify"),
        ("HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
        ("GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "download"),
        ("GET", r"/cdn/([0-9a-f]{64})", "cdn"),
    )

    def _handle(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append((self.command, path))
        route = next(((re.fullmatch(pattern, path), step) for method, pattern, step in self.routes
                      if method == self.command and re.fullmatch(pattern, path)), None)
        try:
            if route is None:
                raise _Refused(404, f"no route {self.command} {path}")
            match, step = route
            groups = [unquote(group) if group else None for group in match.groups()]
            fault = self.hub.fault("download" if step == "cdn" else step, path)
            if fault and fault.meanwhile:
                fault.meanwhile()
            if fault and fault.cut and not fault.late and step not in ("cdn", "download"):
                if step == "lfs_upload":
                    self.rfile.read(min(1000, int(self.headers.get("Content-Length") or 0)))
                raise _Cut
            if fault and fault.status:
                self._body()
                if fault.body is not None:
                    return self._answer(fault.status, fault.body.encode())
                raise _Refused(fault.status, fault.message)
            if step in ("cdn", "download"):
                return getattr(self, "do_" + step)(fault, *groups)
            body = self._body()
            if fault and fault.damage:
                body = bytes([body[0] ^ 255]) + body[1:]
            getattr(self, "do_" + step)(body, *groups)
            if fault and fault.late:
                raise _Cut
        except _Refused as refused:
            headers = {"X-Error-Message": refused.message, "X-Error-Code": refused.code}
            self._answer(refused.status, json.dumps({"error": refused.message}).encode(),
                         **{name: value for name, value in headers.items() if value})
        except (_Cut, ConnectionError):
            self.close_connection = True
            try:
                self.connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    # --- what each step does -----------------------------------------------------------------------------------------

    def do_create(self, body: bytes) -> None:
        wish = json.loads(body)
        repo_id = f"{wish.get('organization') or 'alice'}/{wish['name']}"
        self._may_write(repo_id)
        if repo_id in self.hub.repos:
            raise _Refused(409, "You already created this model repo")
        private = wish.get("private") or wish.get("visibility") == "private"
        self.hub.add(repo_id, {}, private=bool(private))
        self._json({"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": "1"})

    def do_delete(self, body: bytes) -> None:
        wish = json.loads(body)
        repo_id = f"{wish.get('organization') or 'alice'}/{wish['name']}"
        self._may_write(repo_id)
        self._repo(repo_id)
        del self.hub.repos[repo_id]
        self._json({})

    def do_validate(self, body: bytes) -> None:
        text = json.loads(body)["content"]
        try:
            block = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
            metadata = yaml.safe_load(block[1])
            assert isinstance(metadata, dict)
        except Exception:
            answer = {"errors": [{"message": "the metadata is not valid YAML"}], "warnings": []}
            return self._answer(400, json.dumps(answer).encode(), **{"Content-Type": "application/json"})
        self._json({"errors": [], "warnings": []})

    def do_info(self, _body: bytes, repo_id: str, revision: str | None) -> None:
        repo = self._repo(repo_id)
        sha, tree = self._tree(repo, revision)
        siblings = []
        for name, content in tree.items():
            entry: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": _git_hash(content)}
            if name.endswith(LARGE):
                pointer = b"version https://git-lfs\noid sha256:%s\n" % _sha256(content).encode()
                entry["blobId"] = _git_hash(pointer)
                entry["lfs"] = {"sha256": _sha256(content), "size": len(content), "pointerSize": 134}
            siblings.append(entry)
        self._json({"id": repo_id, "modelId": repo_id, "sha": sha, "private": repo.private, "siblings": siblings,
                    "tags": [], "downloads": 0, "likes": 0})

    def do_tree(self, _body: bytes, repo_id: str, revision: str) -> None:
        _, tree = self._tree(self._repo(repo_id), revision)
        self._json([{"type": "file", "path": name, "size": len(content), "oid": _git_hash(content)}
                    for name, content in tree.items()])

    def do_preupload(self, body: bytes, repo_id: str, revision: str) -> None:
        self._may_write(repo_id)
        self._tree(self._repo(repo_id), revision)
        self._json({"files": [
            {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
             "shouldIgnore": False} for file in json.loads(body)["files"]]})

    def do_lfs_batch(self, body: bytes, repo_id: str) -> None:
        self._may_write(repo_id)
        objects = []
        for wish in json.loads(body)["objects"]:
            entry = {"oid": wish["oid"], "size": wish["size"], "authenticated": True}
            if wish["oid"] not in self.hub.large:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{wish['oid']}"},
                                    "verify": {"href": f"{self.hub.url}/lfs/verify"}}
            objects.append(entry)
        self._json({"transfer": "basic", "objects": objects})

    def do_lfs_upload(self, body: bytes, oid: str) -> None:
        self.hub.large[oid] = body
        self._json({})

    def do_lfs_verify(self, body: bytes) -> None:
        wish = json.loads(body)
        content = self.hub.large.get(wish["oid"], b"")
        if _sha256(content) != wish["oid"] or len(content) != wish["size"]:
            self.hub.large.pop(wish["oid"], None)
            raise _Refused(422, "the uploaded file does not have the checksum it was announced with")
        self._json({})

    def do_commit(self, body: bytes, repo_id: str, branch: str) -> None:
        self._may_write(repo_id)
        repo = self._repo(repo_id)
        if branch not in repo.branches:
            raise _Refused(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, repo.branches[branch]):
            raise _Refused(412, "A commit has happened since. Please refresh and try again.")
        tree = dict(repo.trees[repo.branches[branch]])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.large:
                    raise _Refused(400, "LFS pointer pointed to a file that does not exist")
                tree[value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] == "deletedFile":
                tree.pop(value["path"])
        sha = repo.commit(branch, tree, header["summary"])
        self._json({"commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}", "commitOid": sha, "success": True})

    def do_resolve(self, _body: bytes, repo_id: str, revision: str, name: str) -> None:
        sha, content = self._file(repo_id, revision, name)
        headers = {"X-Repo-Commit": sha, "ETag": f'"{_git_hash(content)}"', "Accept-Ranges": "bytes"}
        if name.endswith(LARGE):
            digest = _sha256(content)
            self.hub.large[digest] = content
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content)),
                        "Location": f"{self.hub.cdn}/cdn/{digest}"}
            return self._answer(302, b"", **headers)
        self._answer(200, content, **headers)

    def do_download(self, fault: Fault | None, repo_id: str, revision: str, name: str) -> None:
        sha, content = self._file(repo_id, revision, name)
        if name.endswith(LARGE):
            return self._answer(302, b"", Location=f"{self.hub.cdn}/cdn/{_sha256(content)}")
        self._send(content, fault, **{"ETag": f'"{_git_hash(content)}"', "X-Repo-Commit": sha})

    def do_cdn(self, fault: Fault | None, digest: str) -> None:
        self._send(self.hub.large[digest], fault, ETag=f'"{digest}"')

    # --- parts of it -------------------------------------------------------------------------------------------------

    def _token(self) -> str | None:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given and given not in (self.hub.writer, self.hub.reader):
            # Echoes the token, as a careless server may.
            raise _Refused(401, "Invalid credentials in Authorization header")
        return given or None

    def _may_write(self, repo_id: str) -> None:
        token = self._token()
        if token != self.hub.writer or not repo_id.startswith("alice/"):
            raise _Refused(403, f"You don't have the rights for {repo_id} with {token}")

    def _repo(self, repo_id: str) -> Repo:
        token = self._token()
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and token is None):
            raise _Refused(404 if token else 401, "Repository not found", "RepoNotFound")
        return repo

    def _tree(self, repo: Repo, revision: str | None) -> tuple[str, dict[str, bytes]]:
        sha = repo.branches.get(revision or "main", revision)
        if sha not in repo.trees:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, repo.trees[sha]

    def _file(self, repo_id: str, revision: str, name: str) -> tuple[str, bytes]:
        sha, tree = self._tree(self._repo(repo_id), revision)
        if name not in tree:
            raise _Refused(404, "Entry not found", "EntryNotFound")
        return sha, tree[name]

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, content: bytes, fault: Fault | None, **headers: str) -> None:
        if fault and fault.damage:
            content = content[:-1] + bytes([content[-1] ^ 255])
        status, part = 200, content
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and (wanted[1] != "0" or wanted[2]):
            self.hub.seen_ranges.append(wanted[0])
            last = int(wanted[2]) if wanted[2] else len(content) - 1
            status, part = 206, content[int(wanted[1]):last + 1]
            headers["Content-Range"] = f"bytes {wanted[1]}-{last}/{len(content)}"
        if not (fault and fault.cut):
            return self._answer(status, part, **headers)
        self._head(status, len(part), headers)
        self.wfile.write(part[:fault.after])
        self.wfile.flush()
        raise _Cut

    def _json(self, value: Any) -> None:
        self._answer(200, json.dumps(value).encode(), **{"Content-Type": "application/json"})

    def _answer(self, status: int, content: bytes, **headers: str) -> None:
        self._head(status, len(content), headers)
        if self.command != "HEAD":
            self.wfile.write(content)

    def _head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing on stderr: the tests look at what the client prints there."""


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
