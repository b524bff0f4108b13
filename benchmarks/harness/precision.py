"""In which precision a network trains: in bfloat16 where that is faster, in float32 elsewhere."""
import functools
import time

import torch
import torch.nn as nn

from harness.kernels.cpu_modules import share_of_kernels


def pick_precision(device: torch.device, model: nn.Module | None = None, cpu_kernels: bool = False) -> str:
    """Return "bf16" or "fp32", whichever is faster for ``model`` on ``device``.

    A processor that converts to bfloat16, but multiplies it slowly, gains from it where nearly all is done by our
    kernels: their maps take half the way to the memory, and are multiplied as float32. Torch's would be slower.

    Args:
        cpu_kernels: Whether the model trains with the fused kernels for CPUs.
    """
    if bf16_is_fast(device):
        return "bf16"
    converts = device.type == "cpu" and _says_yes("_is_avx512_bf16_supported")
    return "bf16" if converts and cpu_kernels and model is not None and share_of_kernels(model) > 0.9 else "fp32"


@functools.cache
def bf16_is_fast(device: torch.device) -> bool:
    """Whether the processor multiplies bfloat16 natively and at least as fast as float32.

    Not all that have the instructions do: of Intel's with AVX512-BF16, those without AMX take them at half the speed of
    float32's. So a CPU is asked, in some hundredths of a second, on one thread, which a busy machine disturbs least.
    The answer is about a half or about two, and bfloat16 is taken if it is clearly the faster.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if not any(_says_yes(name) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")):
        return False
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = {dtype: min(_product_seconds(dtype) for _ in range(5)) for dtype in (torch.float32, torch.bfloat16)}
    finally:
        torch.set_num_threads(threads)
    return seconds[torch.bfloat16] < 0.8 * seconds[torch.float32]


def exact_float32() -> None:
    """Have a GPU compute convolutions of float32 in float32; by default torch takes TF32, with 10 bits of mantissa."""
    torch.backends.cudnn.allow_tf32 = False


def _product_seconds(dtype: torch.dtype, size: int = 384) -> float:
    """Return the time of a matrix product on the CPU."""
    x = torch.ones(size, size, dtype=dtype)
    started = time.perf_counter()
    x @ x
    return time.perf_counter() - started


def _says_yes(name: str) -> bool:
    """Ask torch about the CPU; versions that do not know the question say no."""
    return getattr(torch.cpu, name, bool)()
