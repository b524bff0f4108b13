"""The Triton kernels against torch's own operations: interpreted on a CPU, compiled on a GPU."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from triton_device import DEVICE

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from harness.kernels import gpu_kernels as kernels
from harness.kernels import gpu_mask_kernels as mask_kernels

ZEROS = kernels.Zeros()


def a_map(channels, seed, shape=(3, 7, 5), scale=1.0, shift=0.5):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape[0], channels, *shape[1:], generator=generator) * scale + shift
    return x.to(DEVICE).contiguous(memory_format=torch.channels_last)


def a_norm(channels, seed=9):
    norm = nn.BatchNorm2d(channels).to(DEVICE)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(channels, generator=generator) + 0.5)
        norm.bias.copy_(torch.randn(channels, generator=generator) * 0.5)
        norm.running_mean.copy_(torch.randn(channels, generator=generator))
        norm.running_var.copy_(torch.rand(channels, generator=generator) + 1)
    return norm


def sums_of(x):
    return torch.stack([x.sum((0, 2, 3)), x.square().sum((0, 2, 3))])


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("shape", [(3, 7, 5), (2, 8, 32)])
def test_moments(shape):
    x = a_map(32, 0, shape)
    close(kernels.moments(x, ZEROS), sums_of(x))


def test_norm_relu_and_its_gradients():
    x, norm, reference = a_map(32, 0).requires_grad_(), a_norm(32), a_norm(32)
    expected = reference(x).relu()
    sums = sums_of(x.detach())
    close(kernels.norm_relu(x.detach(), sums, kernels.Norm(norm, ZEROS)), expected)
    close(norm.running_mean, reference.running_mean)
    close(norm.running_var, reference.running_var)
    dy = a_map(32, 1)
    grads = torch.autograd.grad(expected, (x, reference.weight, reference.bias), dy)
    dx, dsums, _ = kernels.backward_of_norm_relu(x.detach(), sums, kernels.Norm(norm, ZEROS), dy)
    close(dx, grads[0])
    close(dsums[1], grads[1])
    close(dsums[0], grads[2])


@pytest.mark.parametrize(("ins", "outs"), [(64, 16), (16, 64), (32, 32)])
@pytest.mark.parametrize("with_other", [False, True])
def test_norm_relu_conv_and_its_gradients(ins, outs, with_other):
    x, norm, reference = a_map(ins, 0).requires_grad_(), a_norm(ins), a_norm(ins)
    weight = (torch.randn(outs, ins, 1, 1, generator=torch.Generator().manual_seed(2)) / ins ** 0.5).to(DEVICE)
    weight.requires_grad_()
    other = a_map(outs, 3) if with_other else None
    expected = F.conv2d(reference(x).relu(), weight)
    expected = expected if other is None else expected + other
    sums = sums_of(x.detach())
    y, sums_of_y = kernels.norm_relu_conv(x.detach(), sums, kernels.Norm(norm, ZEROS), weight.detach(), other)
    close(y, expected)
    close(sums_of_y, sums_of(expected))
    close(norm.running_var, reference.running_var)
    dy, other = a_map(outs, 4), a_map(ins, 5) if with_other else None
    grads = torch.autograd.grad(expected, (x, reference.weight, reference.bias, weight), dy)
    dx, dsums, dmatrix = kernels.backward_of_norm_relu(
        x.detach(), sums, kernels.Norm(norm, ZEROS), dy, weight.detach(), other)
    close(dx, grads[0] if other is None else grads[0] + other)
    close(dsums[1], grads[1])
    close(dsums[0], grads[2])
    close(dmatrix, grads[3])


@pytest.mark.cuda
@pytest.mark.parametrize(("ins", "outs"), [(64, 16), (16, 64), (128, 128), (256, 64), (64, 256)])
def test_norm_relu_conv_in_bfloat16(ins, outs):
    x, norm, dy = a_map(ins, 0, (8, 15, 17)), a_norm(ins), a_map(outs, 1, (8, 15, 17))
    weight = (torch.randn(outs, ins, 1, 1, generator=torch.Generator().manual_seed(2)) / ins ** 0.5).to(DEVICE)
    x, dy, weight = (tensor.bfloat16() for tensor in (x, dy, weight))
    exact = [tensor.double().requires_grad_() for tensor in (x, weight)]
    reference = a_norm(ins).double()
    expected = F.conv2d(reference(exact[0]).relu(), exact[1])
    sums = sums_of(x.float())
    y, sums_of_y = kernels.norm_relu_conv(x, sums, kernels.Norm(norm, ZEROS), weight)
    dx, dsums, dmatrix = kernels.backward_of_norm_relu(x, sums, kernels.Norm(norm, ZEROS), dy, weight)
    grads = torch.autograd.grad(expected, (*exact, reference.weight, reference.bias), dy.double())
    for own, true in zip((y, sums_of_y, dx, dmatrix, dsums[1], dsums[0]), (expected, sums_of(expected), *grads)):
        assert (own.double() - true).norm() < 2e-2 * true.norm()


def test_gate_and_its_gradients():
    trunk, logits = a_map(32, 0).requires_grad_(), a_map(32, 1, scale=2.0).requires_grad_()
    expected = (1 + logits.sigmoid()) * trunk
    y, sums = mask_kernels.gate(trunk.detach(), logits.detach(), ZEROS)
    close(y, expected)
    close(sums, sums_of(expected))
    dy = a_map(32, 2)
    grads = torch.autograd.grad(expected, (trunk, logits), dy)
    for own, grad in zip(mask_kernels.gate_backward(trunk.detach(), logits.detach(), dy), grads):
        close(own, grad)


@pytest.mark.parametrize("shape", [(2, 4, 6), (3, 1, 5), (1, 2, 2)])
@pytest.mark.parametrize("with_other", [False, True])
def test_upsampling_and_its_gradient(shape, with_other):
    x = a_map(32, 0, shape).requires_grad_()
    larger = shape[0], 2 * shape[1], 2 * shape[2]
    other = a_map(32, 1, larger) if with_other else None
    expected = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    dy = a_map(32, 2, larger)
    close(mask_kernels.upsample_backward(dy), torch.autograd.grad(expected, x, dy)[0])
    expected = expected if other is None else expected + other
    y, sums = mask_kernels.upsample(x.detach(), ZEROS, other)
    close(y, expected)
    close(sums, sums_of(expected))


def test_they_compile_for_an_h100_and_fit_its_shared_memory(tmp_path):
    script = Path(__file__).with_name("compile_gpu_kernels.py")
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run([sys.executable, script], env=env, check=True, capture_output=True, text=True)
    sizes = {line.rpartition(" ")[0]: int(line.rpartition(" ")[2]) for line in result.stdout.splitlines()}
    assert len(sizes) == 14
    assert max(sizes.values()) <= 227 * 1024, sizes


def test_zeros_come_from_one_buffer_once_it_is_large_enough():
    zeros, x = kernels.Zeros(), a_map(16, 0)
    for step in range(3):
        zeros.clear()
        parts = [zeros.take(x, 2, 100), zeros.take(x, 16, 16, 1, 1)]
        for part in parts:
            assert part.count_nonzero() == 0
            part += 1
        inside = [part.data_ptr() - zeros.buffer.data_ptr() for part in parts]
        assert (inside == [0, 4 * 256]) is (step > 0)
    buffer = zeros.buffer
    zeros.clear()
    assert zeros.buffer is buffer
