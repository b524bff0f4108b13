"""Checkpoints that survive the machine: one safetensors file, tensors inside, the rest as JSON in its header.

The file is written under a temporary name, flushed to the disk and renamed, so the last good one is always whole. It
holds a digest of itself, so that one which is not as it was written is not resumed. Nothing is ever unpickled.
"""
import contextlib
import errno
import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from safetensors.torch import load

from harness.errors import RunError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FILE_NAME = "checkpoint.safetensors"


def check_out(path: Path, flag: str = "--out") -> None:
    """Find out before hours of work whether its result can be written to the file ``path``.

    Raises:
        RunError: It cannot; the message names ``flag``.
    """
    try:
        if path.parent.exists() and not path.parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=path.parent):  # as the result is written: beside it, and then renamed
            pass
    except OSError as error:
        raise RunError(f"{flag} {path} cannot be written to ({error.strerror}); name another file") from error


def write_atomic(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` so that the file is at every moment either the old or the new one, whole.

    Raises:
        RunError: The disk is full, there is no permission, ...; what was there before is untouched.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise RunError(f"cannot write {path}: {error.strerror}; the previous file is untouched") from error


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, as :func:`write_atomic` does; the folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(value, indent=1) + "\n").encode())


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Keep ``folder`` for this process while the block runs; the system lets go of it if the process dies.

    Raises:
        RunError: Another process has it, or nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"--out {folder} cannot be made a folder ({error.strerror}); name another") from error
    try:
        with tempfile.TemporaryFile(dir=folder):  # an epoch later would be late to find out
            pass
    except OSError as error:
        raise RunError(f"--out {folder} cannot be written to ({error.strerror}); name another") from error
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(f"--out {folder} is in use by another process; wait for it, or name another "
                           "folder") from error
        except OSError:  # some file systems have no locks, which should not keep anybody from training
            pass
        yield
    finally:
        os.close(handle)


class CheckpointWriter:
    """Writes the checkpoints of a run while the run goes on; leaving its block waits for the last one.

    Where the disk is slower than the epochs, a checkpoint that still waits for its turn gives way to the next one.
    What fails in writing is raised by a later :meth:`save` or at the end of the block.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.thread = ThreadPoolExecutor(1)
        self.pending: list[Future[None]] = []  # oldest first
        self.lock = threading.Lock()
        self.waiting: tuple[Snapshot, str] | None = None  # what the thread has not begun with

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.thread.shutdown()
        if kind is None:  # otherwise what ended the run is what has to be told
            self.wait()

    def save(self, tensors: Mapping[str, torch.Tensor], state: dict[str, Any]) -> None:
        """Write a checkpoint, as all is now: ``tensors`` by name and ``state``, anything that JSON holds."""
        while self.pending and self.pending[0].done():
            self.pending.pop(0).result()
        newest = Snapshot(tensors), json.dumps(state)
        with self.lock:
            replaced, self.waiting = self.waiting, newest
        if replaced is None:
            self.pending.append(self.thread.submit(self._write))

    def _write(self) -> None:
        with self.lock:
            newest, self.waiting = self.waiting, None
        assert newest is not None
        arrays, state = newest[0].arrays(), newest[1]
        metadata = {"state": state, "sha256": _digest(arrays, state)}
        write_atomic(self.folder / FILE_NAME, save(arrays, metadata=metadata))

    def wait(self) -> None:
        """Wait until what was saved last is on the disk."""
        while self.pending:
            self.pending.pop(0).result()


class Snapshot:
    """Copies of ``tensors`` as they are now, which a GPU hands over while it goes on.

    A network has more than a thousand of them; one copy each would take half as long as an epoch on a GPU.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}
        alike: dict[tuple[torch.dtype, torch.device], list[str]] = {}
        for name, tensor in tensors.items():
            alike.setdefault((tensor.dtype, tensor.device), []).append(name)
        self.parts: list[tuple[list[str], np.ndarray]] = []
        self.copied: list[tuple[torch.device, torch.cuda.Event]] = []
        for (dtype, device), names in alike.items():
            flat = torch.cat([tensors[name].detach().reshape(-1) for name in names])
            if device.type == "cuda":
                here = torch.empty(flat.shape, dtype=dtype, pin_memory=True)
                flat = here.copy_(flat, non_blocking=True)
                self.copied.append((device, torch.cuda.Event()))
                self.copied[-1][1].record(torch.cuda.current_stream(device))
            self.parts.append((names, flat.cpu().numpy()))

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the copies by name, when they are there.

        As arrays: if another thread than the one that trains worked on tensors, OpenMP would have more threads than a
        CPU has cores, and from then on let them sleep where they wait for each other.
        """
        for device, event in self.copied:
            with torch.cuda.device(device):  # a thread begins on the first
                event.synchronize()
        arrays = {}
        for names, flat in self.parts:
            ends = np.cumsum([self.shapes[name].numel() for name in names])
            for name, part in zip(names, np.split(flat, ends[:-1])):
                arrays[name] = part.reshape(self.shapes[name])
        return arrays


def _digest(arrays: Mapping[str, np.ndarray], state: str) -> str:
    """Return the SHA-256 of a checkpoint."""
    digest = hashlib.sha256(state.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"\n{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def load_checkpoint(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return tensors and state of the checkpoint in ``folder``.

    Raises:
        RunError: There is none, or it is not as it was written.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise RunError(f"no checkpoint to resume in {folder}: {FILE_NAME} is missing")
    try:
        with safe_open(path, framework="np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}
            metadata = file.metadata() or {}
        state = metadata["state"]
        if metadata["sha256"] != _digest(arrays, state):
            raise ValueError("its content is not what its digest was made of")
        return {name: torch.from_numpy(array) for name, array in arrays.items()}, json.loads(state)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path} is damaged ({error}); remove it and start again") from error


def load_weights(path: Path) -> tuple[dict[str, torch.Tensor], str]:
    """Return the tensors of the safetensors file ``path``, and the SHA-256 of the file.

    Of a checkpoint, those of the network.

    Raises:
        RunError: There is no such file, or it is not a safetensors file.
    """
    try:
        content = path.read_bytes()
        tensors = load(content)
        tensors = without_prefix("model", tensors) if "generator" in tensors else tensors
        return tensors, hashlib.sha256(content).hexdigest()
    except OSError as error:
        raise RunError(f"cannot read the weights {path}: {error.strerror}") from error
    except SafetensorError as error:
        raise RunError(f"{path} is not a safetensors file, or a damaged one ({error})") from error


def prefixed(prefix: str, tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the items of ``tensors`` with ``prefix`` and a dot before each name."""
    for name, tensor in tensors.items():
        yield f"{prefix}.{name}", tensor


def without_prefix(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors whose name starts with ``prefix`` and a dot, under the rest of their names."""
    start = prefix + "."
    return {name[len(start):]: tensor for name, tensor in tensors.items() if name.startswith(start)}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the optimiser's state as tensors, ``INDEX.KEY`` by name; scalars are tensors already or become some."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{key}": torch.as_tensor(value)
        for index, entries in state.items() for key, value in entries.items() if value is not None
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put back what :func:`optimizer_tensors` returned; hyper-parameters stay those of ``optimizer``."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        param = params[int(index)]
        if tensor.shape == param.shape:
            # In the parameter's memory format (channels last): fused optimisers walk both in memory order.
            tensor = torch.empty_like(param, dtype=tensor.dtype).copy_(tensor)
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
