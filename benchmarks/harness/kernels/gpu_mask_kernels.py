"""Kernels for GPUs, in Triton: the gate of an Attention Module and the upsampling of its mask, see `gpu_kernels.py`."""
import torch
import triton
import triton.language as tl

from harness.kernels.gpu_kernels import Zeros, add_sums, launch_shape, rows_of


@triton.jit
def _gate(trunk, logits, y, sums_of_y, rows, C: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr):
    c = tl.arange(0, C)
    total, squares = tl.zeros((ROWS, C), tl.float32), tl.zeros((ROWS, C), tl.float32)
    for start in tl.range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        r = start + tl.arange(0, ROWS)
        at, inside = r[:, None] * C + c[None, :], r[:, None] < rows
        values = tl.load(trunk + at, mask=inside, other=0.0).to(tl.float32)
        values += values * tl.sigmoid(tl.load(logits + at, mask=inside, other=0.0).to(tl.float32))
        rounded = values.to(y.dtype.element_ty)
        tl.store(y + at, rounded, mask=inside)
        counted = tl.where(inside, rounded.to(tl.float32), 0.0)
        total += counted
        squares += counted * counted
    add_sums(sums_of_y, c, C, total, squares)


@triton.jit
def _gate_backward(trunk, logits, dy, dtrunk, dlogits, size, SIZE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = at < size
    t = tl.load(trunk + at, mask=inside, other=0.0).to(tl.float32)
    mask = tl.sigmoid(tl.load(logits + at, mask=inside, other=0.0).to(tl.float32))
    d = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(dtrunk + at, (d + d * mask).to(dtrunk.dtype.element_ty), mask=inside)
    tl.store(dlogits + at, (d * t * mask * (1 - mask)).to(dlogits.dtype.element_ty), mask=inside)


@triton.jit
def _source(at, size):
    # Of output `at` of twice `size` positions: the two inputs that it lies between, and the weight of the second.
    first = tl.maximum((at + 1) // 2 - 1, 0)
    weight = tl.where(at == 0, 0.0, tl.where(at % 2 == 0, 0.75, 0.25))
    return first, tl.minimum(first + 1, size - 1), weight


@triton.jit
def _upsample(x, other, y, sums_of_y, rows, height, width, C: tl.constexpr, HAS_OTHER: tl.constexpr,
              ROWS: tl.constexpr, STAGES: tl.constexpr):
    c = tl.arange(0, C)[None, :]
    total, squares = tl.zeros((ROWS, C), tl.float32), tl.zeros((ROWS, C), tl.float32)
    for start in tl.range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        r = start + tl.arange(0, ROWS)
        at, inside = r[:, None] * C + c, r[:, None] < rows
        column, row, image = r % (2 * width), r // (2 * width) % (2 * height), r // (4 * width * height)
        top, bottom, down = _source(row, height)
        left, right, across = _source(column, width)
        top, bottom = (image * height + top) * width, (image * height + bottom) * width
        across = across[:, None]
        upper = tl.load(x + (top + left)[:, None] * C + c, mask=inside, other=0.0).to(tl.float32) * (1 - across)
        upper += tl.load(x + (top + right)[:, None] * C + c, mask=inside, other=0.0).to(tl.float32) * across
        lower = tl.load(x + (bottom + left)[:, None] * C + c, mask=inside, other=0.0).to(tl.float32) * (1 - across)
        lower += tl.load(x + (bottom + right)[:, None] * C + c, mask=inside, other=0.0).to(tl.float32) * across
        values = upper * (1 - down[:, None]) + lower * down[:, None]
        if HAS_OTHER:
            values += tl.load(other + at, mask=inside, other=0.0).to(tl.float32)
        rounded = values.to(y.dtype.element_ty)
        tl.store(y + at, rounded, mask=inside)
        counted = tl.where(inside, rounded.to(tl.float32), 0.0)
        total += counted
        squares += counted * counted
    add_sums(sums_of_y, tl.arange(0, C), C, total, squares)


@triton.jit
def _weight_of(step: tl.constexpr, at, size):
    # Of input `at` in the output 2 * at - 1 + step; at the edges an output lies on its input, or there is none.
    inner = 0.25 if step == 0 or step == 3 else 0.75
    edge = (at == 0) if step < 2 else (at == size - 1)
    at_edge = 0.0 if step == 0 or step == 3 else 1.0
    return tl.where(edge, at_edge, inner)


@triton.jit
def _upsample_backward(dy, dx, rows, height, width, C: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr):
    c = tl.arange(0, C)[None, :]
    for start in tl.range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        r = start + tl.arange(0, ROWS)
        inside = r[:, None] < rows
        column, row, image = r % width, r // width % height, r // (width * height)
        values = tl.zeros((ROWS, C), tl.float32)
        for i in tl.static_range(4):
            down = _weight_of(i, row, height)
            line = (image * 2 * height + tl.minimum(tl.maximum(2 * row - 1 + i, 0), 2 * height - 1)) * 2 * width
            for j in tl.static_range(4):
                weight = down * _weight_of(j, column, width)
                at = line + tl.minimum(tl.maximum(2 * column - 1 + j, 0), 2 * width - 1)
                d = tl.load(dy + at[:, None] * C + c, mask=inside, other=0.0).to(tl.float32)
                values += weight[:, None] * d
        tl.store(dx + r[:, None] * C + c, values.to(dx.dtype.element_ty), mask=inside)


def gate(trunk: torch.Tensor, logits: torch.Tensor, zeros: Zeros) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``(1 + sigmoid(logits)) * trunk``, and its sums."""
    y, channels = torch.empty_like(trunk), trunk.shape[1]
    sums = zeros.take(trunk, 2, channels)
    grid, at_once, options = launch_shape(trunk, channels)
    _gate[grid](trunk, logits, y, sums, rows_of(trunk), channels, *at_once, **options)
    return y, sums


def gate_backward(
        trunk: torch.Tensor, logits: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of ``trunk`` and ``logits``."""
    dtrunk, dlogits, size = torch.empty_like(trunk), torch.empty_like(logits), trunk.numel()
    _gate_backward[(triton.cdiv(size, 1024),)](trunk, logits, dy, dtrunk, dlogits, size, 1024)
    return dtrunk, dlogits


def upsample(
        x: torch.Tensor, zeros: Zeros, other: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the map bilinearly interpolated to twice its height and width, plus ``other``, and the sums of that."""
    images, channels, height, width = x.shape
    y = torch.empty(
        (images, channels, 2 * height, 2 * width), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    sums = zeros.take(x, 2, channels)
    grid, at_once, options = launch_shape(y, channels, stages=1)
    _upsample[grid](
        x, y if other is None else other, y, sums, rows_of(y), height, width, channels, other is not None, *at_once,
        **options)
    return y, sums


def upsample_backward(dy: torch.Tensor) -> torch.Tensor:
    """Return the gradient of what :func:`upsample` interpolates."""
    images, channels, height, width = dy.shape
    dx = torch.empty(
        (images, channels, height // 2, width // 2), dtype=dy.dtype, device=dy.device,
        memory_format=torch.channels_last)
    grid, at_once, options = launch_shape(dx, channels, stages=1)  # they fill the memory for loads by themselves
    _upsample_backward[grid](dy, dx, rows_of(dx), height // 2, width // 2, channels, *at_once, **options)
    return dx
