"""Kernels for GPUs, in Triton: what a pre-activation unit does around its 3x3 convolution, in few passes over its maps.

A map is a matrix of ``rows`` positions by channels, as channels last lies in memory. The statistics of a batch
normalisation are the sums and the sums of squares of its input, ``(2, channels)`` in float32; the kernel that writes a
map adds them up, and the one that reads it normalises as it loads. So a batch normalisation takes no pass of its own,
nor does a ReLU or a sum of a unit, and in the backward pass what is normalised is computed again, not kept.

The sums are added by atomics, in no fixed order.
"""
import math
from typing import Any

import torch
import triton
import triton.language as tl

LARGEST_MATRIX = 128 * 128  # weights of a 1x1 convolution whose gradient a program adds up in its registers
_PROGRAMS = 4  # for each multiprocessor
_ON_CPU = 3  # programs where Triton interprets


@triton.jit
def _normalization(sums, weight, bias, c, rows, eps, C: tl.constexpr):
    mean = tl.load(sums + c) / rows
    var = tl.maximum(tl.load(sums + C + c) / rows - mean * mean, 0.0)
    inv_std = tl.rsqrt(var + eps)
    scale = tl.load(weight + c) * inv_std
    return mean, var, inv_std, scale, tl.load(bias + c) - mean * scale


@triton.jit
def _update_running(running_mean, running_var, mean, var, c, rows, momentum):
    old_mean, old_var = tl.load(running_mean + c), tl.load(running_var + c)
    tl.store(running_mean + c, old_mean + momentum * (mean - old_mean))
    tl.store(running_var + c, old_var + momentum * (var * rows / (rows - 1) - old_var))


@triton.jit
def _relu(x):
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)  # a NaN is to be seen in the loss


@triton.jit
def add_sums(sums, c, C: tl.constexpr, first, second):
    # Relaxed: the kernel that reads the sums comes after this one.
    tl.atomic_add(sums + c, tl.sum(first, 0), sem="relaxed")
    tl.atomic_add(sums + C + c, tl.sum(second, 0), sem="relaxed")


@triton.jit
def _moments(x, sums, rows, C: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr):
    c = tl.arange(0, C)
    total, squares = tl.zeros((ROWS, C), tl.float32), tl.zeros((ROWS, C), tl.float32)
    for start in tl.range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        r = start + tl.arange(0, ROWS)
        values = tl.load(x + r[:, None] * C + c[None, :], mask=r[:, None] < rows, other=0.0).to(tl.float32)
        total += values
        squares += values * values
    add_sums(sums, c, C, total, squares)


@triton.jit
def _norm_relu(x, sums, weight, bias, running_mean, running_var, y, rows, eps, momentum, C: tl.constexpr,
               ROWS: tl.constexpr, STAGES: tl.constexpr):
    c = tl.arange(0, C)
    mean, var, _, scale, shift = _normalization(sums, weight, bias, c, rows, eps, C)
    if tl.program_id(0) == 0:
        _update_running(running_mean, running_var, mean, var, c, rows, momentum)
    for start in tl.range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        r = start + tl.arange(0, ROWS)
        at, inside = r[:, None] * C + c[None, :], r[:, None] < rows
        values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        values = _relu(values * scale[None, :] + shift[None, :])
        tl.store(y + at, values.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _norm_relu_matmul(
        x, sums, weight, bias, running_mean, running_var, matrix, other, y, sums_of_y, rows, eps, momentum,
        IN: tl.constexpr, OUT: tl.constexpr, HAS_OTHER: tl.constexpr, HAS_SUMS: tl.constexpr, ROWS: tl.constexpr,
        STAGES: tl.constexpr):
    i, o = tl.arange(0, IN), tl.arange(0, OUT)
    mean, var, _, scale, shift = _normalization(sums, weight, bias, i, rows, eps, IN)
    if tl.program_id(0) == 0:
        _update_running(running_mean, running_var, mean, var, i, rows, momentum)
    transposed = tl.load(matrix + o[None, :] * IN + i[:, None])
    total, squares = tl.zeros((ROWS, OUT), tl.float32), tl.zeros((ROWS, OUT), tl.float32)
    for start in tl.range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        r = start + tl.arange(0, ROWS)
        inside = r[:, None] < rows
        values = tl.load(x + r[:, None] * IN + i[None, :], mask=inside, other=0.0).to(tl.float32)
        values = _relu(values * scale[None, :] + shift[None, :]).to(x.dtype.element_ty)
        product = tl.dot(values, transposed, input_precision="ieee")
        at = r[:, None] * OUT + o[None, :]
        if HAS_OTHER:
            product += tl.load(other + at, mask=inside, other=0.0).to(tl.float32)
        rounded = product.to(y.dtype.element_ty)
        tl.store(y + at, rounded, mask=inside)
        if HAS_SUMS:
            counted = tl.where(inside, rounded.to(tl.float32), 0.0)
            total += counted
            squares += counted * counted
    if HAS_SUMS:
        add_sums(sums_of_y, o, OUT, total, squares)


@triton.jit
def _backward_sums(
        x, sums, weight, bias, dy, matrix, dsums, dmatrix, rows, eps,
        IN: tl.constexpr, OUT: tl.constexpr, MATMUL: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr):
    i, o = tl.arange(0, IN), tl.arange(0, OUT)
    mean, _, inv_std, scale, shift = _normalization(sums, weight, bias, i, rows, eps, IN)
    total, products = tl.zeros((ROWS, IN), tl.float32), tl.zeros((ROWS, IN), tl.float32)
    if MATMUL:
        weights = tl.load(matrix + o[:, None] * IN + i[None, :])
        dweights = tl.zeros((OUT, IN), tl.float32)
    for start in tl.range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        r = start + tl.arange(0, ROWS)
        inside = r[:, None] < rows
        values = tl.load(x + r[:, None] * IN + i[None, :], mask=inside, other=0.0).to(tl.float32)
        before_relu = values * scale[None, :] + shift[None, :]
        d = tl.load(dy + r[:, None] * OUT + o[None, :], mask=inside, other=0.0)
        if MATMUL:
            after_relu = _relu(before_relu).to(x.dtype.element_ty)
            dweights += tl.dot(tl.trans(d), after_relu, input_precision="ieee")
            dvalues = tl.dot(d, weights, input_precision="ieee")
        else:
            dvalues = d.to(tl.float32)
        dvalues = tl.where(before_relu > 0, dvalues, 0.0)
        total += dvalues
        products += dvalues * (values - mean[None, :]) * inv_std[None, :]
    add_sums(dsums, i, IN, total, products)
    if MATMUL:
        tl.atomic_add(dmatrix + o[:, None] * IN + i[None, :], dweights, sem="relaxed")


@triton.jit
def _backward_input(
        x, sums, weight, bias, dy, matrix, dsums, other, dx, rows, eps,
        IN: tl.constexpr, OUT: tl.constexpr, MATMUL: tl.constexpr, HAS_OTHER: tl.constexpr, ROWS: tl.constexpr,
        STAGES: tl.constexpr):
    i, o = tl.arange(0, IN), tl.arange(0, OUT)
    mean, _, inv_std, scale, shift = _normalization(sums, weight, bias, i, rows, eps, IN)
    mean_of_d, mean_of_products = tl.load(dsums + i) / rows, tl.load(dsums + IN + i) / rows
    if MATMUL:
        weights = tl.load(matrix + o[:, None] * IN + i[None, :])
    for start in tl.range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        r = start + tl.arange(0, ROWS)
        at, inside = r[:, None] * IN + i[None, :], r[:, None] < rows
        values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(dy + r[:, None] * OUT + o[None, :], mask=inside, other=0.0)
        dvalues = tl.dot(d, weights, input_precision="ieee") if MATMUL else d.to(tl.float32)
        dvalues = tl.where(values * scale[None, :] + shift[None, :] > 0, dvalues, 0.0)
        normalized = (values - mean[None, :]) * inv_std[None, :]
        dvalues = scale[None, :] * (dvalues - mean_of_d[None, :] - normalized * mean_of_products[None, :])
        if HAS_OTHER:
            dvalues += tl.load(other + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + at, dvalues.to(dx.dtype.element_ty), mask=inside)


def launch_shape(
        x: torch.Tensor, *channels: int, matmul: bool = False, programs: int = _PROGRAMS, stages: int = 3,
) -> tuple[tuple[int], tuple[int, int], dict[str, int]]:
    """Return the grid of a kernel over the map ``x``, what it takes at once, and the options of its launch.

    So that what a program holds of maps of so many ``channels`` fits its registers.

    Args:
        programs: At most so many for each multiprocessor.
        stages: Loads that a program has under way, each of all that it takes at a time.

    Returns:
        The grid, then the positions that a program takes at a time and the loads it has under way, then its warps.
    """
    widest = max(channels)
    rows = (64 if widest < 256 else 32) if matmul else max(16, 4096 // widest)
    units = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 0
    if x.dtype is torch.float32:  # which is for tests: several do not fit the memory of a multiprocessor
        stages = 1
    grid = min(triton.cdiv(rows_of(x), rows), programs * units or _ON_CPU)
    return (grid,), (rows, stages), dict(num_warps=8 if matmul and widest >= 128 else 4)


class Zeros:
    """Zeros that kernels add sums to, all of a step in one buffer that is cleared at once.

    They last until the next :meth:`clear`. The buffer, which a CUDA graph may write to, stays once it is large enough:
    from the second step on.
    """

    def __init__(self) -> None:
        self.buffer = torch.zeros(0)
        self.taken = 0

    def clear(self) -> None:
        """Begin a step."""
        if self.taken > len(self.buffer):
            self.buffer = torch.zeros(self.taken, device=self.device)
        else:
            self.buffer.zero_()
        self.taken = 0

    def take(self, like: torch.Tensor, *shape: int) -> torch.Tensor:
        """Return float32 zeros on the device of ``like``."""
        first, size = self.taken, math.prod(shape)
        self.taken += -(-size // 64) * 64  # so that each begins where wide loads may
        self.device = like.device
        if self.taken > len(self.buffer):
            return torch.zeros(shape, device=like.device)
        return self.buffer[first:first + size].view(shape)


class Norm:
    """A batch normalisation as the kernels read it: tensors of a layer in training, and where its sums go."""

    def __init__(self, layer: Any, zeros: Zeros) -> None:
        self.zeros = zeros
        self.weight, self.bias, self.eps, self.momentum = layer.weight, layer.bias, layer.eps, layer.momentum
        self.running_mean, self.running_var = layer.running_mean, layer.running_var


def as_map(x: torch.Tensor) -> torch.Tensor:
    """Return the map channels last."""
    return x.contiguous(memory_format=torch.channels_last)


def rows_of(x: torch.Tensor) -> int:
    """Return the positions of a map, over all images."""
    return x.numel() // x.shape[1]


def moments(x: torch.Tensor, zeros: Zeros) -> torch.Tensor:
    """Return the sums and the sums of squares of the channels of a map, ``(2, channels)``."""
    channels = x.shape[1]
    sums = zeros.take(x, 2, channels)
    grid, at_once, options = launch_shape(x, channels)
    _moments[grid](x, sums, rows_of(x), channels, *at_once, **options)
    return sums


def norm_relu(x: torch.Tensor, sums: torch.Tensor, norm: Norm) -> torch.Tensor:
    """Return ``relu(norm(x))`` and update the running statistics."""
    y, channels = torch.empty_like(x), x.shape[1]
    grid, at_once, options = launch_shape(x, channels)
    _norm_relu[grid](
        x, sums, norm.weight, norm.bias, norm.running_mean, norm.running_var, y, rows_of(x), norm.eps, norm.momentum,
        channels, *at_once, **options)
    return y


def norm_relu_conv(
        x: torch.Tensor, sums: torch.Tensor, norm: Norm, matrix: torch.Tensor, other: torch.Tensor | None = None,
        with_sums: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``relu(norm(x))`` through a 1x1 convolution, plus ``other``, and the sums of that.

    The running statistics are updated.

    Args:
        matrix: Weight of the convolution ``(out, in, 1, 1)``, of the type of ``x``.
        with_sums: Otherwise the sums stay zeros.
    """
    outs, ins = matrix.shape[:2]
    y = torch.empty((len(x), outs, *x.shape[2:]), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    sums_of_y = norm.zeros.take(x, 2, outs)
    grid, at_once, options = launch_shape(x, ins, outs, matmul=True)
    _norm_relu_matmul[grid](
        x, sums, norm.weight, norm.bias, norm.running_mean, norm.running_var, matrix, y if other is None else other, y,
        sums_of_y, rows_of(x), norm.eps, norm.momentum, ins, outs, other is not None, with_sums,
        *at_once, **options)
    return y, sums_of_y


def backward_of_norm_relu(
        x: torch.Tensor, sums: torch.Tensor, norm: Norm, dy: torch.Tensor, matrix: torch.Tensor | None = None,
        other: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return the gradients of ``x``, of ``bias`` and ``weight`` (one tensor), and of ``matrix``.

    Args:
        dy: Gradient of :func:`norm_relu` or, with a ``matrix``, of :func:`norm_relu_conv`.
        other: Added to the gradient of ``x``.
    """
    ins = x.shape[1]
    outs = ins if matrix is None else matrix.shape[0]
    dsums, dx = norm.zeros.take(x, 2, ins), torch.empty_like(x)
    dmatrix = None if matrix is None else norm.zeros.take(x, *matrix.shape)
    # Each program adds a whole matrix to that of the others in the end.
    programs = 1 if matrix is not None and ins * outs >= 64 * 64 else _PROGRAMS
    grid, at_once, options = launch_shape(x, ins, outs, matmul=matrix is not None, programs=programs)
    _backward_sums[grid](
        x, sums, norm.weight, norm.bias, dy, x if matrix is None else matrix, dsums, x if dmatrix is None else dmatrix,
        rows_of(x), norm.eps, ins, outs, matrix is not None, *at_once, **options)
    grid, at_once, options = launch_shape(x, ins, outs, matmul=matrix is not None)
    _backward_input[grid](
        x, sums, norm.weight, norm.bias, dy, x if matrix is None else matrix, dsums, dx if other is None else other, dx,
        rows_of(x), norm.eps, ins, outs, matrix is not None, other is not None, *at_once, **options)
    return dx, dsums, dmatrix
