"""A stand-in for the Hugging Face Hub on the loopback address: the part of its HTTP API that publishing a model uses.

It keeps repositories in memory, with branches and commits, large files (LFS) apart from small ones, as the Hub does.
``fail(step, ...)`` makes a step go wrong. The steps: ``create``, ``delete``, ``info``, ``validate``, ``preupload``,
``lfs_batch``, ``lfs_upload``, ``lfs_verify``, ``xet_token``, ``xet_xorb``, ``xet_shard``, ``commit``, ``resolve`` (a
file's headers), ``download`` (its content). Large files come by LFS, or by Xet from clients that have hf_xet. The steps
themselves are in ``hub_handler``.
"""
import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from typing import Any

from hub_handler import Handler


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
        self.large: dict[str, bytes] = {}  # by SHA-256
        self.xorbs: dict[str, bytes] = {}  # what Xet has of large files before it knows the files
        self.faults: dict[str, Fault] = {}
        self.requests: list[tuple[str, str]] = []
        self.seen_ranges: list[str] = []
        handler = type("HandlerOfThisHub", (Handler,), {"hub": self})
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

    def fault(self, step: str, path: str) -> Fault:
        """Return how the step goes wrong this time; an empty fault if it does not."""
        fault = self.faults.get(step)
        if fault is None or fault.times <= 0 or not path.endswith(fault.only):
            return Fault()
        fault.times -= 1
        return fault
