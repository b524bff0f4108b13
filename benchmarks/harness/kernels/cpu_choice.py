"""Which trainings take the kernels for a CPU."""
import functools
import time

import torch
import torch.nn as nn

from harness.environment import default_compile_mode
from harness.kernels.cpu_kernels import norm_act_conv
from harness.kernels.cpu_library import channels_last, library


def why_no_kernels(device: torch.device, compile_mode: str) -> str | None:
    """Return what speaks against the kernels in a training, or None."""
    if device.type != "cpu":
        return "they are for CPUs, and the device is " + device.type
    if compile_mode != "off":
        return "--compile makes kernels of its own"
    return None if library() else "there is no C++ compiler, or its OpenMP is not torch's"


def chooses_kernels(device: torch.device) -> bool:
    """Whether a training takes the kernels where nobody says it."""
    return why_no_kernels(device, default_compile_mode(device)) is None and kernels_pay()


@functools.cache
def kernels_pay() -> bool:
    """Whether the kernels are worth their use on this processor: not if they take twice the time of torch's.

    Where they were built for vectors as they are, they take less. A compiler that makes its own of them, on a processor
    that nobody has tried, has made them nine times slower. So one convolution is timed, in some hundredths of a second,
    on one thread, which a busy machine disturbs least.
    """
    if library() is None:
        return False
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng([]):
            seconds = [(_convolution_seconds(True), _convolution_seconds(False)) for _ in range(7)]
    finally:
        torch.set_num_threads(threads)
    ours, torchs = (min(turns) for turns in zip(*seconds))
    return ours < 2 * torchs


def _convolution_seconds(ours: bool) -> float:
    """Return the time of a normalised and activated 3x3 convolution, there and back, in our form or in torch's."""
    norm, conv = nn.BatchNorm2d(32).float(), nn.Conv2d(32, 32, 3, padding=1, bias=False).float()
    x = channels_last(torch.randn(16, 32, 16, 16, dtype=torch.float32)).requires_grad_()
    started = time.perf_counter()
    y = norm_act_conv(norm, x, conv.weight)[0] if ours else conv(norm(x).relu())
    y.backward(y.detach())
    return time.perf_counter() - started
