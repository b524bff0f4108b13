"""Kernels for training on a CPU where torch's take long, with their gradients.

The sources in `cpu/` are built once by the system's C++ compiler, in a few seconds. Maps are channels-last, with a
multiple of 16 channels, in float32 or bfloat16: :func:`fits` says which do.
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
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.autograd.function import once_differentiable

from harness.distributed import gather
from harness.environment import default_compile_mode

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
    "unit_forward": [*[_POINTER] * 3, *[_SIZE] * 5, ctypes.c_float, ctypes.c_float, ctypes.c_int],
    "unit_backward": [*[_POINTER] * 4, *[_SIZE] * 5, ctypes.c_int],
}


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


def _call(name: str, maps: list[torch.Tensor | None], *numbers: Any) -> None:
    """Call the kernel for the type of the first map."""
    assert maps[0] is not None
    call(name, maps[0].dtype, *(None if m is None else m.data_ptr() for m in maps), *numbers)


def call(name: str, dtype: torch.dtype, *arguments: Any) -> None:
    """Call the kernel for maps of ``dtype``."""
    getattr(library(), f"{name}_{_SUFFIXES[dtype]}")(*arguments, torch.get_num_threads())


def fits(*maps: torch.Tensor) -> bool:
    """Whether the kernels take these maps, all of one shape and type."""
    first = maps[0]
    return first.device.type == "cpu" and first.dtype in _SUFFIXES and first.dim() == 4 and all(
        x.shape == first.shape and x.dtype is first.dtype and x.shape[1] % CHANNELS == 0 and x.numel() > x.shape[1]
        and x.is_contiguous(memory_format=torch.channels_last) for x in maps)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def batch_norm_act(
        norm: nn.BatchNorm2d, x: torch.Tensor, relu: bool, synced: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise ``x`` over the batch, update the running statistics, and apply a ReLU if asked for.

    Two passes over the maps forward and two backward, for torch's ten.

    Args:
        synced: Normalise over the batches of all processes, which must be of one size.

    Returns:
        The output, and ``x`` itself to go past the normalisation: its gradient is added in the same pass.
    """
    return _BatchNormAct.apply(x, norm.weight, norm.bias, _statistics(norm, x, synced), relu)


def norm_act_conv(
        norm: nn.BatchNorm2d, x: torch.Tensor, weight: torch.Tensor, stride: int = 1,
        other: torch.Tensor | None = None, synced: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise ``x`` over the batch, apply a ReLU, convolve, and add ``other`` if there is one.

    The activated map is never written: it is made anew in the backward pass.

    Args:
        weight: float32 ``(channels out, channels in, size, size)``, both channels a multiple of 16. The size is 1, with
            a stride of 1, or 3, with a padding of 1 and no ``other``.
        synced: Normalise over the batches of all processes, which must be of one size.

    Returns:
        The output, and ``x`` itself to go past all that: its gradient is added in the same pass.
    """
    return _NormActConv.apply(x, norm.weight, norm.bias, weight, _statistics(norm, x, synced), stride, other)


def norm_act_conv_and_shortcut(
        norm: nn.BatchNorm2d, x: torch.Tensor, weight: torch.Tensor, shortcut_weight: torch.Tensor, stride: int,
        synced: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise ``x`` over the batch, apply a ReLU, and convolve that twice: as a unit that changes its shape begins.

    Args:
        weight: float32 ``(channels out, channels in, 1, 1)``, both channels a multiple of 16.
        shortcut_weight: The same for the second convolution, which has the stride.
        synced: Normalise over the batches of all processes, which must be of one size.
    """
    return _NormActConvAndShortcut.apply(
        x, norm.weight, norm.bias, weight, shortcut_weight, _statistics(norm, x, synced), stride)


@dataclass(frozen=True)
class _Statistics:
    """What a batch is normalised with: mean, 1 / deviation, scale and shift of each channel, in turn."""

    saved: torch.Tensor
    processes: int


@torch.no_grad()
def _statistics(norm: nn.BatchNorm2d, x: torch.Tensor, synced: bool) -> _Statistics:
    """Return the statistics of ``x``, of all processes' where ``synced``, and update the running ones."""
    running_mean, running_var, updates = norm.running_mean, norm.running_var, norm.num_batches_tracked
    assert running_mean is not None
    assert running_var is not None
    assert updates is not None
    updates.add_(1)
    channels = x.shape[1]
    rows, processes = x.numel() // channels, dist.get_world_size() if synced else 1
    moments = torch.empty(2, channels, dtype=torch.float64)  # the mean, and the sum of squared differences from it
    _call("norm_moments", [x, moments], rows, channels)
    if processes > 1:
        means, squares = gather(moments).unbind(1)
        mean = means.mean(0)
        moments = torch.stack([mean, squares.sum(0) + rows * (means - mean).square().sum(0)])
    saved = torch.empty(4 * channels, dtype=torch.float32)
    kernels = library()
    assert kernels is not None
    kernels.norm_scales_of(
        *(m.data_ptr() for m in (moments, norm.weight, norm.bias, running_mean, running_var, saved)),
        processes * rows, channels, norm.eps, norm.momentum)
    return _Statistics(saved, processes)


def _input_gradient(
        grad: torch.Tensor, grad_past: torch.Tensor | None, x: torch.Tensor, statistics: _Statistics,
        own_sums: torch.Tensor, relu: bool, grad_x: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of ``x``, written to ``grad_x``, and of the normalisation's weight and bias."""
    sums = own_sums
    if statistics.processes > 1:
        sums = own_sums.clone()
        dist.all_reduce(sums)
    channels = x.shape[1]
    rows = x.numel() // channels
    grad_weight, grad_bias = (torch.empty(channels, dtype=torch.float32) for _ in range(2))
    _call("norm_input_gradient",
          [grad, grad_past, x, grad_x, statistics.saved, own_sums, sums, grad_weight, grad_bias],
          rows, statistics.processes * rows, channels, relu)
    return grad_x, grad_weight, grad_bias


class _BatchNormAct(torch.autograd.Function):
    @staticmethod
    def forward(
            ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, statistics: _Statistics, relu: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        channels = x.shape[1]
        y = torch.empty_like(x)
        _call("norm_forward", [x, y, statistics.saved], x.numel() // channels, channels, relu)
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)
        ctx.statistics, ctx.relu = statistics, relu
        return y, x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        x, = ctx.saved_tensors
        channels = x.shape[1]
        grad_y, grad_past = (None if grad is None else channels_last(grad) for grad in grads)
        if grad_y is None:
            return grad_past, None, None, None, None
        sums = torch.empty(2, channels, dtype=torch.float64)
        _call("norm_sums", [grad_y, x, ctx.statistics.saved, sums], x.numel() // channels, channels, ctx.relu)
        return *_input_gradient(grad_y, grad_past, x, ctx.statistics, sums, ctx.relu, torch.empty_like(x)), None, None


def _convolution(
        x: torch.Tensor, weight: torch.Tensor, statistics: _Statistics, stride: int = 1,
        other: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the convolution of the normalised and activated ``x``, with the sizes of :func:`norm_act_conv`."""
    batch, channels, height, width = x.shape
    channels_out, _, size, _ = weight.shape
    y = torch.empty((batch, channels_out, (height - 1) // stride + 1, (width - 1) // stride + 1), dtype=x.dtype,
                    memory_format=torch.channels_last)
    weight = channels_last(weight)
    if size == 1:
        assert stride == 1
        _call("pointwise_forward", [x, other, y, statistics.saved, weight],
              batch * height * width, channels, channels_out)
    else:
        assert other is None
        _call("conv3x3_forward", [x, y, statistics.saved, weight], batch, height, width, channels, channels_out,
              stride)
    return y


def _convolution_backward(
        grad_y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, statistics: _Statistics, stride: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of the normalised map and of ``weight``, and the sums over the former, behind the ReLU."""
    batch, channels, height, width = x.shape
    weight = channels_last(weight)
    grad_norm, grad_weight = torch.empty_like(x), torch.empty_like(weight)
    sums = torch.empty(2, channels, dtype=torch.float64)
    maps = [channels_last(grad_y), x, grad_norm, statistics.saved, weight, grad_weight, sums]
    if weight.shape[-1] == 1:
        _call("pointwise_backward", maps, batch * height * width, channels, len(weight))
    else:
        _call("conv3x3_backward", maps, batch, height, width, channels, len(weight), stride)
    return grad_norm, grad_weight, sums


class _NormActConv(torch.autograd.Function):
    @staticmethod
    def forward(
            ctx: Any, x: torch.Tensor, norm_weight: torch.Tensor, norm_bias: torch.Tensor, weight: torch.Tensor,
            statistics: _Statistics, stride: int, other: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.set_materialize_grads(False)
        ctx.statistics, ctx.stride, ctx.has_other = statistics, stride, other is not None
        return _convolution(x, weight, statistics, stride, other), x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_y, grad_past = (None if grad is None else channels_last(grad) for grad in grads)
        if grad_y is None:
            return grad_past, *[None] * 6
        grad_norm, grad_weight, sums = _convolution_backward(grad_y, x, weight, ctx.statistics, ctx.stride)
        # What becomes the gradient of x takes the place of the normalised map's.
        grads_of_norm = _input_gradient(grad_norm, grad_past, x, ctx.statistics, sums, False, grad_norm)
        return *grads_of_norm, grad_weight, None, None, grad_y if ctx.has_other else None


class _NormActConvAndShortcut(torch.autograd.Function):
    @staticmethod
    def forward(
            ctx: Any, x: torch.Tensor, norm_weight: torch.Tensor, norm_bias: torch.Tensor, weight: torch.Tensor,
            shortcut_weight: torch.Tensor, statistics: _Statistics, stride: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(x, weight, shortcut_weight)
        ctx.statistics, ctx.stride = statistics, stride
        seen = channels_last(x[:, :, ::stride, ::stride])
        return _convolution(x, weight, statistics), _convolution(seen, shortcut_weight, statistics)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, shortcut_weight = ctx.saved_tensors
        statistics, positions = ctx.statistics, slice(None, None, ctx.stride)
        grad_norm, grad_weight, sums = _convolution_backward(grads[0], x, weight, statistics)
        seen_grad, grad_shortcut_weight, seen_sums = _convolution_backward(
            grads[1], channels_last(x[:, :, positions, positions]), shortcut_weight, statistics)
        grad_norm[:, :, positions, positions] += seen_grad
        grads_of_norm = _input_gradient(grad_norm, None, x, statistics, sums + seen_sums, False, grad_norm)
        return *grads_of_norm, grad_weight, grad_shortcut_weight, None, None


def gate(trunk: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Return ``(1 + sigmoid(logits)) * trunk``, in one pass over the maps forward and one backward."""
    return _Gate.apply(trunk, logits)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, trunk: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(trunk, logits)
        y = torch.empty_like(trunk)
        _call("gate_forward", [trunk, logits, y], y.numel())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        trunk, logits = ctx.saved_tensors
        grad_trunk, grad_logits = torch.empty_like(trunk), torch.empty_like(logits)
        _call("gate_backward", [channels_last(grads[0]), trunk, logits, grad_trunk, grad_logits], trunk.numel())
        return grad_trunk, grad_logits
