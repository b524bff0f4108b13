"""What the stand-in for the Hub answers to HTTP requests: one method a step, on the repositories of a ``HubServer``."""
import base64
import hashlib
import json
import re
import socket
import time
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import yaml
from hub_xet import files_of_shard

if TYPE_CHECKING:
    from hub_server import Fault, HubServer, Repo

LARGE = (".safetensors", ".bin", ".png")


class _Cut(Exception):
    """The connection is closed without a further byte."""


class _Refused(Exception):
    """An HTTP error is the answer: with the Hub's headers and JSON, or with ``body`` alone."""

    def __init__(self, status: int, message: str, code: str = "", body: str | None = None) -> None:
        self.status = status
        self.headers = {} if body is not None else {"X-Error-Message": message, "X-Error-Code": code}
        self.body = json.dumps({"error": message}) if body is None else body


class Handler(BaseHTTPRequestHandler):
    """Answers one request: ``on_STEP`` with the groups of the route, the request's ``body`` and its ``fault``."""

    hub: "HubServer"
    body: bytes
    fault: "Fault"
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits 40 ms for the client to acknowledge its headers
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
        ("GET", r"/api/models/([^/]+/[^/]+)/xet-write-token/[^/]+", "xet_token"),
        ("POST", r"/v1/xorbs/default/([0-9a-f]{64})", "xet_xorb"),
        ("POST", r"/v1/shards", "xet_shard"),
        ("HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
        ("GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "download"),
        ("GET", r"/cdn/([0-9a-f]{64})", "cdn"),
    )

    def _handle(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append((self.command, path))
        try:
            step, groups = self._route(path)
            # What is downloaded is cut or damaged on its way (in _send), from whichever address it comes.
            downloads = step in ("download", "cdn")
            self.fault = fault = self.hub.fault("download" if downloads else step, path)
            if fault.meanwhile:
                fault.meanwhile()
            if fault.cut and not fault.late and not downloads:
                self.rfile.read(min(1000, int(self.headers.get("Content-Length") or 0)))  # in the middle of an upload
                raise _Cut
            self.body = self._read_body()
            if fault.status:
                raise _Refused(fault.status, fault.message, body=fault.body)
            if fault.damage and not downloads:
                self.body = bytes([self.body[0] ^ 255]) + self.body[1:]
            getattr(self, "on_" + step)(*groups)
            if fault.late:
                raise _Cut
        except _Refused as refused:
            self._answer(refused.status, refused.body.encode(),
                         **{name: value for name, value in refused.headers.items() if value})
        except (_Cut, ConnectionError):
            self.close_connection = True
            try:
                self.connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _route(self, path: str) -> tuple[str, list[str | None]]:
        for method, pattern, step in self.routes:
            match = re.fullmatch(pattern, path)
            if method == self.command and match:
                return step, [unquote(group) if group else None for group in match.groups()]
        self._read_body()
        raise _Refused(404, f"no route {self.command} {path}")

    # --- what each step does -----------------------------------------------------------------------------------------

    def on_create(self) -> None:
        wish, repo_id = self._wish()
        if repo_id in self.hub.repos:
            raise _Refused(409, "You already created this model repo")
        private = wish.get("private") or wish.get("visibility") == "private"
        self.hub.add(repo_id, {}, private=bool(private))
        self._json({"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": "1"})

    def on_delete(self) -> None:
        _, repo_id = self._wish()
        self._repo(repo_id)
        del self.hub.repos[repo_id]
        self._json({})

    def on_validate(self) -> None:
        block = re.match(r"---\n(.*?)\n---\n", json.loads(self.body)["content"], re.DOTALL)
        try:
            valid = block is not None and isinstance(yaml.safe_load(block[1]), dict)
        except yaml.YAMLError:
            valid = False
        errors = [] if valid else [{"message": "the metadata is not valid YAML"}]
        self._json({"errors": errors, "warnings": []}, status=200 if valid else 400)

    def on_info(self, repo_id: str, revision: str | None) -> None:
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

    def on_tree(self, repo_id: str, revision: str) -> None:
        _, tree = self._tree(self._repo(repo_id), revision)
        self._json([{"type": "file", "path": name, "size": len(content), "oid": _git_hash(content)}
                    for name, content in tree.items()])

    def on_preupload(self, repo_id: str, revision: str) -> None:
        self._may_write(repo_id)
        self._tree(self._repo(repo_id), revision)
        self._json({"files": [
            {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
             "shouldIgnore": False} for file in json.loads(self.body)["files"]]})

    def on_lfs_batch(self, repo_id: str) -> None:
        self._may_write(repo_id)
        objects = []
        for wish in json.loads(self.body)["objects"]:
            entry = {"oid": wish["oid"], "size": wish["size"], "authenticated": True}
            if wish["oid"] not in self.hub.large:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{wish['oid']}"},
                                    "verify": {"href": f"{self.hub.url}/lfs/verify"}}
            objects.append(entry)
        self._json({"transfer": "basic", "objects": objects})

    def on_lfs_upload(self, oid: str) -> None:
        self.hub.large[oid] = self.body
        self._json({})

    def on_lfs_verify(self) -> None:
        wish = json.loads(self.body)
        content = self.hub.large.get(wish["oid"], b"")
        if _sha256(content) != wish["oid"] or len(content) != wish["size"]:
            self.hub.large.pop(wish["oid"], None)
            raise _Refused(422, "the uploaded file does not have the checksum it was announced with")
        self._json({})

    def on_xet_token(self, repo_id: str) -> None:
        self._may_write(repo_id)
        self._json({"accessToken": "for Xet", "exp": int(time.time()) + 3600, "casUrl": self.hub.url})

    def on_xet_xorb(self, digest: str) -> None:
        self.hub.xorbs[digest] = self.body
        self._json({"was_inserted": True})

    def on_xet_shard(self) -> None:
        for content in files_of_shard(self.body, self.hub.xorbs):
            self.hub.large[_sha256(content)] = content
        self._json({"result": 1})

    def on_commit(self, repo_id: str, branch: str) -> None:
        self._may_write(repo_id)
        repo = self._repo(repo_id)
        if branch not in repo.branches:
            raise _Refused(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        lines = [json.loads(line) for line in self.body.splitlines()]
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

    def on_resolve(self, repo_id: str, revision: str, name: str) -> None:
        sha, content = self._file(repo_id, revision, name)
        headers = {"X-Repo-Commit": sha, "ETag": f'"{_git_hash(content)}"', "Accept-Ranges": "bytes"}
        if name.endswith(LARGE):
            digest = _sha256(content)
            self.hub.large[digest] = content
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content)),
                        "Location": f"{self.hub.cdn}/cdn/{digest}"}
            return self._answer(302, b"", **headers)
        self._answer(200, content, **headers)

    def on_download(self, repo_id: str, revision: str, name: str) -> None:
        sha, content = self._file(repo_id, revision, name)
        if name.endswith(LARGE):
            return self._answer(302, b"", Location=f"{self.hub.cdn}/cdn/{_sha256(content)}")
        self._send(content, **{"ETag": f'"{_git_hash(content)}"', "X-Repo-Commit": sha})

    def on_cdn(self, digest: str) -> None:
        self._send(self.hub.large[digest], ETag=f'"{digest}"')

    # --- parts of it -------------------------------------------------------------------------------------------------

    def _wish(self) -> tuple[dict[str, Any], str]:
        """Return what the body asks for and the repository it names, to which the token must have the right."""
        wish = json.loads(self.body)
        repo_id = f"{wish.get('organization') or 'alice'}/{wish['name']}"
        self._may_write(repo_id)
        return wish, repo_id

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

    def _repo(self, repo_id: str) -> "Repo":
        token = self._token()
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and token is None):
            raise _Refused(404 if token else 401, "Repository not found", "RepoNotFound")
        return repo

    def _tree(self, repo: "Repo", revision: str | None) -> tuple[str, dict[str, bytes]]:
        sha = repo.branches.get(revision or "main", revision)
        if sha not in repo.trees:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, repo.trees[sha]

    def _file(self, repo_id: str, revision: str, name: str) -> tuple[str, bytes]:
        sha, tree = self._tree(self._repo(repo_id), revision)
        if name not in tree:
            raise _Refused(404, "Entry not found", "EntryNotFound")
        return sha, tree[name]

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, content: bytes, **headers: str) -> None:
        if self.fault.damage:
            content = content[:-1] + bytes([content[-1] ^ 255])
        status, part = 200, content
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and (wanted[1] != "0" or wanted[2]):
            self.hub.seen_ranges.append(wanted[0])
            last = int(wanted[2]) if wanted[2] else len(content) - 1
            status, part = 206, content[int(wanted[1]):last + 1]
            headers["Content-Range"] = f"bytes {wanted[1]}-{last}/{len(content)}"
        if not self.fault.cut:
            return self._answer(status, part, **headers)
        self._head(status, len(part), headers)
        self.wfile.write(part[:self.fault.after])
        self.wfile.flush()
        raise _Cut

    def _json(self, value: Any, status: int = 200) -> None:
        self._answer(status, json.dumps(value).encode(), **{"Content-Type": "application/json"})

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
