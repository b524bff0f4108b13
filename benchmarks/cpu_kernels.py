"""Kernels for training on a CPU where torch's take long, with their gradients.

The sources in `cpu/` are built once by the system's C++ compiler, in a few seconds. Maps are channels-last, with a
multiple of 16 channels, in float32 or bfloat16: :func:`fits` says which do.
"""
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

SOURCES = Path(__file__).parent / "cpu"
# The OpenMP runtime is left open: it is torch's own, whose threads are there already, that the loader finds.
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp")
CHANNELS = 16  # a number of channels that the kernels take is a multiple of it: the widest vector of cpu/vectors.h
_SUFFIXES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64
_ARGUMENTS: dict[str, list[Any]] = {
    "norm_forward": [*[_POINTER] * 7, _SIZE, _SIZE, ctypes.c_float, ctypes.c_float, ctypes.c_int, ctypes.c_int],
    "norm_backward": [*[_POINTER] * 7, _SIZE, _SIZE, ctypes.c_int, ctypes.c_int],
    "norm_statistics": [*[_POINTER] * 6, _SIZE, _SIZE, ctypes.c_float, ctypes.c_float, ctypes.c_int],
    "pointwise_forward": [*[_POINTER] * 5, _SIZE, _SIZE, _SIZE, ctypes.c_int],
    "pointwise_backward": [*[_POINTER] * 9, _SIZE, _SIZE, _SIZE, ctypes.c_int],
    "conv3x3_forward": [*[_POINTER] * 4, *[_SIZE] * 6, ctypes.c_int],
    "conv3x3_backward": [*[_POINTER] * 9, *[_SIZE] * 6, ctypes.c_int],
    "gate_forward": [*[_POINTER] * 3, _SIZE, ctypes.c_int],
    "gate_backward": [*[_POINTER] * 5, _SIZE, ctypes.c_int],
}


def why_no_kernels(device: torch.device, sync_bn: bool, compile_mode: str) -> str | None:
    """Return what speaks against the kernels in a training, or None."""
    if device.type != "cpu":
        return "they are for CPUs, and the device is " + device.type
    if sync_bn:
        return "--sync-bn normalises over several processes"
    if compile_mode != "off":
        return "--compile makes kernels of its own"
    return None if library() else "there is no C++ compiler, or its OpenMP is not torch's"


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the built kernels, or None where they cannot be built (no compiler, another OpenMP, ...)."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return None
    sources = [path.read_text() for path in sorted(SOURCES.glob("*.[ch]*"))]
    key = hashlib.sha256(repr((sources, compiler, FLAGS, platform.uname(), _processor())).encode())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ran-layers"
    built = cache / f"cpu_kernels-{key.hexdigest()[:16]}.so"
    try:
        if not built.is_file():
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as folder:  # then renamed: others may be building it too
                source, compiled, linked = f"{SOURCES}/kernels.cpp", f"{folder}/kernels.o", f"{folder}/kernels.so"
                for command in ([*FLAGS, "-c", source, "-o", compiled], ["-shared", compiled, "-o", linked]):
                    subprocess.run([compiler, *command], check=True, capture_output=True)
                os.replace(linked, built)
        kernels = ctypes.CDLL(str(built))
    except (OSError, subprocess.CalledProcessError):
        return None
    for name, arguments in _ARGUMENTS.items():
        for suffix in _SUFFIXES.values():
            getattr(kernels, f"{name}_{suffix}").argtypes = arguments
    return kernels


def _processor() -> str:
    """Return what tells one kind of processor from another, since the kernels are built for this one alone."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next((line for line in lines if line.startswith("flags")), platform.processor())


def _call(name: str, maps: list[torch.Tensor | None], *numbers: Any) -> None:
    """Call the kernel for the type of the first map."""
    assert maps[0] is not None
    pointers = [None if m is None else m.data_ptr() for m in maps]
    getattr(library(), f"{name}_{_SUFFIXES[maps[0].dtype]}")(*pointers, *numbers, torch.get_num_threads())


def fits(*maps: torch.Tensor) -> bool:
    """Whether the kernels take these maps, all of one shape and type."""
    first = maps[0]
    return first.device.type == "cpu" and first.dtype in _SUFFIXES and first.dim() == 4 and all(
        x.shape == first.shape and x.dtype is first.dtype and x.shape[1] % CHANNELS == 0 and x.numel() > x.shape[1]
        and x.is_contiguous(memory_format=torch.channels_last) for x in maps)


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def batch_norm_act(norm: nn.BatchNorm2d, x: torch.Tensor, relu: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise ``x`` over the batch, update the running statistics, and apply a ReLU if asked for.

    Two passes over the maps forward and two backward, for torch's ten.

    Returns:
        The output, and ``x`` itself to go past the normalisation: its gradient is added in the same pass.
    """
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    return _BatchNormAct.apply(
        x, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps, norm.momentum, relu)


class _BatchNormAct(torch.autograd.Function):
    @staticmethod
    def forward(
            ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, running_mean: torch.Tensor,
            running_var: torch.Tensor, eps: float, momentum: float, relu: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        channels = x.shape[1]
        y = torch.empty_like(x)
        saved = torch.empty(4 * channels)  # mean, 1 / deviation, scale, shift
        _call("norm_forward", [x, y, weight, bias, running_mean, running_var, saved],
              x.numel() // channels, channels, eps, momentum, relu)
        ctx.save_for_backward(x, saved)
        ctx.set_materialize_grads(False)
        ctx.relu = relu
        return y, x

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        x, saved = ctx.saved_tensors
        channels = x.shape[1]
        grad_y, grad_past = (None if grad is None else _channels_last(grad) for grad in grads)
        if grad_y is None:
            return grad_past, *[None] * 7
        grad_x, grad_weight, grad_bias = torch.empty_like(x), torch.empty(channels), torch.empty(channels)
        _call("norm_backward", [grad_y, grad_past, x, grad_x, saved, grad_weight, grad_bias],
              x.numel() // channels, channels, ctx.relu)
        return grad_x, grad_weight, grad_bias, *[None] * 5


def norm_act_conv(
        norm: nn.BatchNorm2d, x: torch.Tensor, weight: torch.Tensor, stride: int = 1,
        other: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise ``x`` over the batch, apply a ReLU, convolve, and add ``other`` if there is one.

    The activated map is never written: it is made anew in the backward pass.

    Args:
        weight: float32 ``(channels out, channels in, size, size)``, both channels a multiple of 16. The size is 1, with
            a stride of 1, or 3, with a padding of 1 and no ``other``.

    Returns:
        The output, and ``x`` itself to go past all that: its gradient is added in the same pass.
    """
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    return _NormActConv.apply(
        x, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps, norm.momentum, weight, stride, other)


class _NormActConv(torch.autograd.Function):
    @staticmethod
    def forward(
            ctx: Any, x: torch.Tensor, norm_weight: torch.Tensor, norm_bias: torch.Tensor, running_mean: torch.Tensor,
            running_var: torch.Tensor, eps: float, momentum: float, weight: torch.Tensor, stride: int,
            other: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch, channels, height, width = x.shape
        channels_out, _, size, _ = weight.shape
        saved = torch.empty(4 * channels)  # mean, 1 / deviation, scale, shift
        _call("norm_statistics", [x, norm_weight, norm_bias, running_mean, running_var, saved],
              batch * height * width, channels, eps, momentum)
        y = torch.empty((batch, channels_out, (height - 1) // stride + 1, (width - 1) // stride + 1), dtype=x.dtype,
                        memory_format=torch.channels_last)
        weight = _channels_last(weight)
        if size == 1:
            ctx.kernel, ctx.sizes = "pointwise_backward", (batch * height * width, channels, channels_out)
            _call("pointwise_forward", [x, other, y, saved, weight], *ctx.sizes)
        else:
            assert other is None
            ctx.kernel, ctx.sizes = "conv3x3_backward", (batch, height, width, channels, channels_out, stride)
            _call("conv3x3_forward", [x, y, saved, weight], *ctx.sizes)
        ctx.save_for_backward(x, saved, weight)
        ctx.set_materialize_grads(False)
        ctx.has_other = other is not None
        return y, x

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        x, saved, weight = ctx.saved_tensors
        grad_y, grad_past = (None if grad is None else _channels_last(grad) for grad in grads)
        if grad_y is None:
            return grad_past, *[None] * 9
        grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
        grad_norm_weight, grad_norm_bias = torch.empty(x.shape[1]), torch.empty(x.shape[1])
        _call(ctx.kernel, [grad_y, grad_past, x, grad_x, saved, weight, grad_weight, grad_norm_weight, grad_norm_bias],
              *ctx.sizes)
        return (grad_x, grad_norm_weight, grad_norm_bias, *[None] * 4, grad_weight, None,
                grad_y if ctx.has_other else None)


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
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        trunk, logits = ctx.saved_tensors
        grad_trunk, grad_logits = torch.empty_like(trunk), torch.empty_like(logits)
        _call("gate_backward", [_channels_last(grads[0]), trunk, logits, grad_trunk, grad_logits], trunk.numel())
        return grad_trunk, grad_logits
