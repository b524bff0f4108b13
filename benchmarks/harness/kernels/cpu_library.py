"""The library of kernels for training on a CPU: the sources in `cpu/`, built once by the system's C++ compiler.

That takes some seconds. Maps are channels-last, with a multiple of 16 channels, in float32 or bfloat16:
:func:`fits` says which do.
"""
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

SOURCES = Path(__file__).parent / "cpu"
# The OpenMP runtime is left open: it is torch's own, whose threads are there already, that the loader finds.
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp")
CHANNELS = 16  # a number of channels that the kernels take is a multiple of it: so in cpu/vectors.h
_SUFFIXES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64
_ARGUMENTS: dict[str, list[Any]] = {
    "norm_moments": [*[_POINTER] * 2, _SIZE, _SIZE, ctypes.c_int],
    "norm_forward": [*[_POINTER] * 3, _SIZE, _SIZE, ctypes.c_int, ctypes.c_int],
    "norm_sums": [*[_POINTER] * 4, _SIZE, _SIZE, ctypes.c_int, ctypes.c_int],
    "norm_input_gradient": [*[_POINTER] * 9, _SIZE, _SIZE, _SIZE, ctypes.c_int, ctypes.c_int],
    "pointwise_forward": [*[_POINTER] * 5, _SIZE, _SIZE, _SIZE, ctypes.c_int],
    "pointwise_backward": [*[_POINTER] * 7, _SIZE, _SIZE, _SIZE, ctypes.c_int],
    "conv3x3_forward": [*[_POINTER] * 4, *[_SIZE] * 6, ctypes.c_int],
    "conv3x3_backward": [*[_POINTER] * 7, *[_SIZE] * 6, ctypes.c_int],
    "gate_forward": [*[_POINTER] * 3, _SIZE, ctypes.c_int],
    "gate_backward": [*[_POINTER] * 5, _SIZE, ctypes.c_int],
    "pool_forward": [*[_POINTER] * 3, *[_SIZE] * 6, ctypes.c_int],
    "pool_backward": [*[_POINTER] * 3, *[_SIZE] * 6, ctypes.c_int],
    "upsample_forward": [*[_POINTER] * 2, *[_SIZE] * 6, ctypes.c_int],
    "upsample_backward": [*[_POINTER] * 2, *[_SIZE] * 6, ctypes.c_int],
    "unit_forward": [*[_POINTER] * 3, *[_SIZE] * 5, ctypes.c_float, ctypes.c_float, ctypes.c_int],
    "unit_backward": [*[_POINTER] * 4, *[_SIZE] * 5, ctypes.c_int],
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the built kernels, or None where they cannot be built (no compiler, another OpenMP, ...)."""
    found = filter(None, map(shutil.which, ("c++", "g++")))
    try:
        compiler = shlex.split(os.environ.get("CXX", "")) or list(found)[:1]
    except ValueError:  # a quotation mark without its other one
        return None
    if not compiler:
        return None
    sources = [path.read_text() for path in sorted(SOURCES.glob("*.[ch]*"))]
    flags = [*FLAGS, "-DPREFER_BF16_PRODUCTS"] if multiplies_bf16() else list(FLAGS)
    key = hashlib.sha256(repr((sources, compiler, flags, platform.uname(), _processor("flags"))).encode())
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ran-layers"
        built = cache / f"cpu_kernels-{key.hexdigest()[:16]}.so"
        if not built.is_file():
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as folder:  # then renamed: others may be building it too
                source, compiled, linked = f"{SOURCES}/kernels.cpp", f"{folder}/kernels.o", f"{folder}/kernels.so"
                for command in ([*flags, "-c", source, "-o", compiled], ["-shared", compiled, "-o", linked]):
                    subprocess.run([*compiler, *command], check=True, capture_output=True)
                with open(linked, "rb") as file:
                    os.fsync(file.fileno())  # what is there after a power failure shall be whole: half of it crashes
                os.replace(linked, built)
        kernels = ctypes.CDLL(str(built))
    except (OSError, subprocess.CalledProcessError, RuntimeError):  # the last: nobody knows the home folder
        return None
    for name, arguments in _ARGUMENTS.items():
        for suffix in _SUFFIXES.values():
            getattr(kernels, f"{name}_{suffix}").argtypes = arguments
    kernels.norm_scales_of.argtypes = [*[_POINTER] * 6, _SIZE, _SIZE, ctypes.c_float, ctypes.c_float]
    return kernels


def multiplies_bf16() -> bool:
    """Whether the processor multiplies pairs of bfloat16 values faster than float32 ones.

    Of the processors that have the instruction (`vdpbf16ps`), AMD's Zen 4 is twice as fast with it as in float32, an
    Intel Xeon half as fast: 84 GFLOP/s a core against 130 to 175. Maker and not a measurement decide, since a run that
    is resumed must compute as it did.
    """
    return _processor("vendor_id") == "AuthenticAMD" and "avx512_bf16" in _processor("flags").split()


def _processor(fact: str) -> str:
    """Return what Linux says about the first processor: the kernels are built for its kind alone."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    facts = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in facts if name.strip() == fact), platform.processor())


def call_with_maps(name: str, maps: list[torch.Tensor | None], *numbers: Any) -> None:
    """Call the kernel for the type of the first map with the addresses of all of them."""
    assert maps[0] is not None
    call(name, maps[0].dtype, *(None if m is None else m.data_ptr() for m in maps), *numbers)


def call(name: str, dtype: torch.dtype, *arguments: Any) -> None:
    """Call the kernel for maps of ``dtype``."""
    call_plain(f"{name}_{_SUFFIXES[dtype]}", *arguments, torch.get_num_threads())


def call_plain(name: str, *arguments: Any) -> None:
    """Call what the library has under this very name."""
    getattr(library(), name)(*arguments)


def fits(*maps: torch.Tensor) -> bool:
    """Whether the kernels take these maps, all of one shape and type."""
    first = maps[0]
    return first.device.type == "cpu" and first.dtype in _SUFFIXES and first.dim() == 4 and all(
        x.shape == first.shape and x.dtype is first.dtype and x.shape[1] % CHANNELS == 0 and x.numel() > x.shape[1]
        and x.is_contiguous(memory_format=torch.channels_last) for x in maps)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)
