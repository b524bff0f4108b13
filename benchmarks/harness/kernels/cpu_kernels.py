"""Layers in training on a CPU, where torch's take long: functions with gradients of the kernels in `cpu_library.py`."""
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.autograd.function import once_differentiable

from harness.distributed import gather
from harness.kernels.cpu_library import call_plain, call_with_maps, channels_last


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
    call_with_maps("norm_moments", [x, moments], rows, channels)
    if processes > 1:
        means, squares = gather(moments).unbind(1)
        mean = means.mean(0)
        moments = torch.stack([mean, squares.sum(0) + rows * (means - mean).square().sum(0)])
    saved = torch.empty(4 * channels, dtype=torch.float32)
    numbers = moments, norm.weight, norm.bias, running_mean, running_var, saved
    call_plain("norm_scales_of", *(m.data_ptr() for m in numbers), processes * rows, channels, norm.eps, norm.momentum)
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
    call_with_maps("norm_input_gradient",
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
        call_with_maps("norm_forward", [x, y, statistics.saved], x.numel() // channels, channels, relu)
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
        call_with_maps("norm_sums", [grad_y, x, ctx.statistics.saved, sums], x.numel() // channels, channels, ctx.relu)
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
        call_with_maps("pointwise_forward", [x, other, y, statistics.saved, weight],
                       batch * height * width, channels, channels_out)
    else:
        assert other is None
        call_with_maps("conv3x3_forward", [x, y, statistics.saved, weight],
                       batch, height, width, channels, channels_out, stride)
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
        call_with_maps("pointwise_backward", maps, batch * height * width, channels, len(weight))
    else:
        call_with_maps("conv3x3_backward", maps, batch, height, width, channels, len(weight), stride)
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
        call_with_maps("gate_forward", [trunk, logits, y], y.numel())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        trunk, logits = ctx.saved_tensors
        grad_trunk, grad_logits = torch.empty_like(trunk), torch.empty_like(logits)
        maps = [channels_last(grads[0]), trunk, logits, grad_trunk, grad_logits]
        call_with_maps("gate_backward", maps, trunk.numel())
        return grad_trunk, grad_logits
