"""The machine a run is on: device, precision, memory, and the facts that belong beside a measured figure."""
import ctypes
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from harness.errors import RunError, first_line


def pick_device(name: str | None) -> torch.device:
    """Return the device called ``name``, or a GPU if there is one.

    Raises:
        RunError: There is no such device here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # what names no device, as the recording of a CUDA graph, goes there too
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise RunError(f"--device {name} is not available here ({first_line(error)})") from error
    if device.type == "meta":
        raise RunError("--device meta has shapes but no numbers; give cpu, cuda, cuda:1, ...")
    return device


def default_compile_mode(device: torch.device) -> str:
    """Return what of a network is compiled where nobody says it."""
    return "units" if device.type == "cuda" else "off"  # oneDNN's own kernels are as fast as compiled ones on a CPU


def launcher(processes: int) -> list[str]:
    """Return the beginning of a command that runs a script in so many processes."""
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *(several if processes > 1 else [])]


def synchronize(device: torch.device) -> None:
    """Wait for the device, where it works asynchronously."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def keep_freed_memory() -> None:
    """Have the allocator keep what is freed, and on large pages; to be called before the first tensor is made.

    A training step on a CPU makes and frees the same tensors again and again. By default glibc gives each back to the
    kernel, which clears its pages anew for the next step. With other C libraries nothing changes.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch asks for large pages
    trim_threshold, mmap_max = -1, -4  # malloc.h
    libc = ctypes.CDLL(None)
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, 2 ** 31 - 1)


def command_line(
        script: str, argv: Sequence[str], *, processes: int = 1, folder: str = "benchmarks",
        without: Sequence[str] = ("--out", "--plot", "--data-dir", "--resume")) -> str:
    """Return the command to repeat a measurement, ``without`` the flags that say only where files lie.

    It is for the repository's root, or wherever the scripts' ``folder`` is.
    """
    words, kept = ["torchrun", "--nproc-per-node", str(processes)] if processes > 1 else ["python"], True
    for word in (f"{folder}/{script}", *argv):
        if word.startswith("--"):
            kept = word.partition("=")[0] not in without
        if kept:
            words.append(word)
    return shlex.join(words)


def hardware(device: torch.device) -> dict[str, Any]:
    """Return kind and name of ``device``; of a CPU also its vectors, since its name may tell little."""
    if device.type == "cuda":
        return {"device": "cuda", "name": torch.cuda.get_device_name(device), "torch_cuda": torch.version.cuda}
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    return {"device": device.type, "name": name, "vectors": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads()}


def machine(facts: dict[str, Any]) -> str:
    """Return the name of the machine whose facts :func:`hardware` gave."""
    return facts["name"] + (f" ({facts['vectors']})" if "vectors" in facts else "")


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    packages = ("torch", "timm", "ran-layers")
    return {"python": platform.python_version(), **{name.replace("-", "_"): version(name) for name in packages}}
