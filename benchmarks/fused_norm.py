"""Batch normalisation and the ReLU after it in one kernel, for training on a CPU.

torch goes through the maps five times forward and backward, and widens bfloat16 number by number; `fused_norm.cpp` goes
through them four times at about the speed of memory. It is built once by the system's C++ compiler, in a second or two.
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
from timm.layers import BatchNormAct2d

SOURCE = Path(__file__).with_name("fused_norm.cpp")
# The OpenMP runtime is left open: it is torch's own, whose threads are there already, that the loader finds.
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp")
LANES = 16  # of fused_norm.cpp
_SUFFIXES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def why_not_fused(device: torch.device, sync_bn: bool, compile_mode: str) -> str | None:
    """Return what speaks against the fused kernel in a training, or None."""
    if device.type != "cpu":
        return "it is for CPUs, and the device is " + device.type
    if sync_bn:
        return "--sync-bn normalises over several processes"
    if compile_mode != "off":
        return "--compile makes kernels of its own"
    return None if library() else "there is no C++ compiler, or its OpenMP is not torch's"


def fuse_norms(model: nn.Module) -> None:
    """Let ``model``'s batch normalisations train with the fused kernel, where :func:`why_not_fused` says nothing.

    Their parameters, their statistics and what they do in evaluation stay as they are. Maps that the kernel does not
    take (other types, not channels-last, channels that are no multiple of 16) go torch's way.
    """
    for module in model.modules():
        if type(module) in _FUSED:
            module.__class__ = _FUSED[type(module)]


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the built kernels, or None where they cannot be built (no compiler, another OpenMP, ...)."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return None
    key = hashlib.sha256(repr((SOURCE.read_text(), compiler, FLAGS, platform.uname(), _processor())).encode())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ran-layers"
    built = cache / f"fused_norm-{key.hexdigest()[:16]}.so"
    try:
        if not built.is_file():
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as folder:  # then renamed: others may be building it too
                compiled, linked = f"{folder}/fused_norm.o", f"{folder}/fused_norm.so"
                for command in ([*FLAGS, "-c", str(SOURCE), "-o", compiled], ["-shared", compiled, "-o", linked]):
                    subprocess.run([compiler, *command], check=True, capture_output=True)
                os.replace(linked, built)
        kernels = ctypes.CDLL(str(built))
    except (OSError, subprocess.CalledProcessError):
        return None
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    for suffix in _SUFFIXES.values():
        getattr(kernels, f"forward_{suffix}").argtypes = [
            *[pointer] * 7, size, size, number, number, ctypes.c_int, ctypes.c_int]
        getattr(kernels, f"backward_{suffix}").argtypes = [*[pointer] * 6, size, size, ctypes.c_int, ctypes.c_int]
    return kernels


def _processor() -> str:
    """Return what tells one kind of processor from another, since the kernels are built for this one alone."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next((line for line in lines if line.startswith("flags")), platform.processor())


class _BatchNormAct(torch.autograd.Function):
    """Batch normalisation in training, which also updates the running statistics, then a ReLU if asked for."""

    @staticmethod
    def forward(
            ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, running_mean: torch.Tensor,
            running_var: torch.Tensor, eps: float, momentum: float, relu: bool,
    ) -> torch.Tensor:
        channels = x.shape[1]
        y = torch.empty_like(x)
        saved = torch.empty(4 * channels)  # mean, 1 / deviation, scale, shift
        getattr(library(), f"forward_{_SUFFIXES[x.dtype]}")(
            x.data_ptr(), y.data_ptr(), weight.data_ptr(), bias.data_ptr(), running_mean.data_ptr(),
            running_var.data_ptr(), saved.data_ptr(), x.numel() // channels, channels, eps, momentum, relu,
            torch.get_num_threads())
        ctx.save_for_backward(x, saved)
        ctx.relu = relu
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, saved = ctx.saved_tensors
        channels = x.shape[1]
        grad_y = grads[0].contiguous(memory_format=torch.channels_last)
        grad_x, grad_weight, grad_bias = torch.empty_like(x), torch.empty(channels), torch.empty(channels)
        getattr(library(), f"backward_{_SUFFIXES[x.dtype]}")(
            grad_y.data_ptr(), x.data_ptr(), grad_x.data_ptr(), saved.data_ptr(), grad_weight.data_ptr(),
            grad_bias.data_ptr(), x.numel() // channels, channels, ctx.relu, torch.get_num_threads())
        return grad_x, grad_weight, grad_bias, None, None, None, None, None


def _fits(norm: nn.BatchNorm2d, x: torch.Tensor) -> bool:
    return (
        norm.training and norm.affine and norm.running_mean is not None and norm.momentum is not None
        and norm.weight.dtype is torch.float32 and x.device.type == "cpu" and x.dtype in _SUFFIXES and x.dim() == 4
        and x.shape[1] % LANES == 0 and x.numel() > x.shape[1] and x.is_contiguous(memory_format=torch.channels_last))


def _normalize(norm: nn.BatchNorm2d, x: torch.Tensor, relu: bool) -> torch.Tensor:
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    return _BatchNormAct.apply(
        x, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps, norm.momentum, relu)


class _FusedBatchNorm2d(nn.BatchNorm2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _normalize(self, input, False) if _fits(self, input) else super().forward(input)


class _FusedBatchNormAct2d(BatchNormAct2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        act = type(self.act)
        if act not in (nn.ReLU, nn.Identity) or type(self.drop) is not nn.Identity or not _fits(self, x):
            return super().forward(x)
        return _normalize(self, x, act is nn.ReLU)


_FUSED: dict[type, type] = {nn.BatchNorm2d: _FusedBatchNorm2d, BatchNormAct2d: _FusedBatchNormAct2d}
