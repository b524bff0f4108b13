"""The steps of a mask branch between resolutions with the kernels of `cpu_library.py`, where `fits` says that they can.

Torch's pooling keeps eight bytes for each value that it picks, and reads them again on the way back.
"""
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from harness.kernels.cpu_library import call_with_maps, channels_last


def max_pool(x: torch.Tensor) -> torch.Tensor:
    """Return the 3x3 max-pooling of ``x`` with stride 2 and a padding of one pixel."""
    return _MaxPool.apply(x)


def upsample(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return the bilinear interpolation of ``x``, corners not aligned."""
    return _Upsample.apply(x, height, width)


def _empty(x: torch.Tensor, height: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty((*x.shape[:2], height, width), dtype=dtype, memory_format=torch.channels_last)


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = x.shape
        low = (height - 1) // 2 + 1, (width - 1) // 2 + 1
        y, taps = _empty(x, *low, x.dtype), _empty(x, *low, torch.uint8)
        ctx.sizes = batch, height, width, channels, *low
        call_with_maps("pool_forward", [x, y, taps], *ctx.sizes)
        ctx.save_for_backward(taps)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        taps, = ctx.saved_tensors
        _, height, width, *_ = ctx.sizes
        grad_x = _empty(taps, height, width, grads[0].dtype)
        call_with_maps("pool_backward", [channels_last(grads[0]), taps, grad_x], *ctx.sizes)
        return grad_x


class _Upsample(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, height: int, width: int) -> torch.Tensor:
        batch, channels, *low = x.shape
        y = _empty(x, height, width, x.dtype)
        ctx.sizes = batch, height, width, channels, *low
        call_with_maps("upsample_forward", [x, y], *ctx.sizes)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        grad_x = _empty(grads[0], *ctx.sizes[4:], grads[0].dtype)
        call_with_maps("upsample_backward", [channels_last(grads[0]), grad_x], *ctx.sizes)
        return grad_x, None, None
