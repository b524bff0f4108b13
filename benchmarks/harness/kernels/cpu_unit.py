"""A residual unit that trains with the kernels of `cpu_library.py`, in one call each way.

Layer by layer, Python and autograd take several milliseconds of a step, whatever the batch.
"""
import ctypes
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from torch.autograd.function import once_differentiable

from harness.kernels.cpu_library import call, channels_last


def residual_unit(x: torch.Tensor, norms: Sequence[nn.BatchNorm2d], convs: Sequence[nn.Conv2d]) -> torch.Tensor:
    """Return ``x`` plus what three times normalisation over the batch, ReLU and convolution make of it.

    Args:
        x: Channels last, in float32 or bfloat16, with a multiple of 16 channels.
        norms: In training, of one ``eps`` and one ``momentum``, with parameters and running statistics in float32 and
            an int64 counter, which are updated.
        convs: Of sizes 1, 3 and 1, with float32 weights, and a multiple of 16 channels in between.
    """
    parameters = [p for norm, conv in zip(norms, convs) for p in (norm.weight, norm.bias, conv.weight)]
    return _ResidualUnit.apply(x, norms, *parameters)


def _call(name: str, lists: Sequence[Sequence[torch.Tensor]], saved: torch.Tensor, *numbers: Any) -> None:
    """Call the kernel for the type of the first map, with an array of addresses for each of the lists."""
    arrays = [(ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors)) for tensors in lists]
    call(name, lists[0][0].dtype, *arrays, saved.data_ptr(), *numbers)


class _ResidualUnit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, norms: Sequence[nn.BatchNorm2d], *parameters: torch.Tensor) -> torch.Tensor:
        weights = [channels_last(weight) for weight in parameters[2::3]]
        batch, channels, height, width = x.shape
        inner = len(weights[0])
        ctx.sizes = batch, height, width, channels, inner
        first, second = (
            torch.empty((batch, inner, height, width), dtype=x.dtype, memory_format=torch.channels_last)
            for _ in range(2))
        out = torch.empty_like(x)
        ctx.saved = torch.empty(4 * (channels + 2 * inner), dtype=torch.float32)
        layers: list[Any] = []
        for i, norm in enumerate(norms):
            layers += parameters[3 * i], parameters[3 * i + 1], norm.running_mean, norm.running_var
            layers += norm.num_batches_tracked, weights[i]
        _call("unit_forward", [[x, first, second, out], layers], ctx.saved, *ctx.sizes, norms[0].eps, norms[0].momentum)
        ctx.save_for_backward(x, first, second, *weights)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, first, second, *weights = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        of_parameters: list[torch.Tensor] = []
        for weight in weights:
            of_norm = (torch.empty(weight.shape[1], dtype=torch.float32) for _ in range(2))
            of_parameters += *of_norm, torch.empty_like(weight)
        maps = [channels_last(grads[0]), x, first, second, torch.empty_like(first), torch.empty_like(second), grad_x]
        _call("unit_backward", [maps, weights, of_parameters], ctx.saved, *ctx.sizes)
        return grad_x, None, *of_parameters
