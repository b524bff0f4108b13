"""The machine a run is on: device, whether bfloat16 pays, and the facts that belong beside a measured figure."""
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from errors import RunError


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
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise RunError(f"--device {name} is not to be had here ({str(error).splitlines()[0][:120]})") from error
    return device


def bf16_is_fast(device: torch.device) -> bool:
    """Whether the processor multiplies bfloat16 natively; elsewhere emulation is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(
        getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


def hardware(device: torch.device) -> dict[str, Any]:
    """Return kind, name and number of cores of ``device``."""
    if device.type == "cuda":
        return {"device": "cuda", "name": torch.cuda.get_device_name(device), "torch_cuda": torch.version.cuda}
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    return {"device": device.type, "name": name, "threads": torch.get_num_threads()}


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    packages = ("torch", "timm", "ran-layers")
    return {"python": platform.python_version(), **{name.replace("-", "_"): version(name) for name in packages}}
