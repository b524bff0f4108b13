"""Max-pooling and upsampling with the kernels for a CPU: the numbers of torch, and what goes the way of torch."""
import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from harness.kernels.cpu_library import library
from harness.kernels.cpu_modules import use_cpu_kernels
from harness.kernels.cpu_resample import max_pool, upsample
from ran_layers import SoftMaskBranch

pytestmark = pytest.mark.skipif(library() is None, reason="the kernels cannot be built here")

SHAPES = [(3, 64, 8, 8), (2, 16, 7, 5), (2, 48, 1, 4), (5, 128, 1, 1), (2, 32, 2, 9)]


def maps(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    # Of few different values, so that several in a window are the largest.
    return torch.randint(-9, 9, shape).to(dtype, memory_format=torch.channels_last).requires_grad_()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_max_pooling_is_that_of_torch(shape, dtype, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x = maps(shape, dtype)
    exact = x.detach().double().requires_grad_()
    y, wanted = max_pool(x), F.max_pool2d(exact, 3, 2, 1)
    assert y.dtype is dtype
    assert torch.equal(y.double(), wanted)
    grad = torch.randn(y.shape).to(dtype)  # in the other memory order
    y.backward(grad)
    wanted.backward(grad.double())
    tolerance = 1e-6 if dtype is torch.float32 else 2 ** -8
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=tolerance, atol=tolerance)


def test_what_is_not_a_number_is_the_largest():
    x = torch.full((1, 16, 4, 4), -torch.inf).contiguous(memory_format=torch.channels_last)
    x[0, 3, 1, 1] = torch.nan
    torch.testing.assert_close(max_pool(x), F.max_pool2d(x, 3, 2, 1), equal_nan=True)


def test_the_first_of_equal_values_has_the_gradient():
    for value in (0.0, -torch.inf):
        x = torch.full((1, 16, 4, 4), value).contiguous(memory_format=torch.channels_last).requires_grad_()
        twin = x.detach().clone().requires_grad_()
        max_pool(x).sum().backward()
        F.max_pool2d(twin, 3, 2, 1).sum().backward()
        assert torch.equal(x.grad, twin.grad)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 9), (3, 30)])
@pytest.mark.parametrize("shape", SHAPES)
def test_upsampling_is_that_of_torch(shape, size, dtype, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x = maps(shape, dtype)
    exact = x.detach().double().requires_grad_()
    y, wanted = upsample(x, *size), F.interpolate(exact, size=size, mode="bilinear", align_corners=False)
    assert y.dtype is dtype
    grad = torch.randn(y.shape).to(dtype)  # in the other memory order
    y.backward(grad)
    wanted.backward(grad.double())
    for value, value_wanted in ((y, wanted), (x.grad, exact.grad)):
        tolerance = 1e-5 if dtype is torch.float32 else 2 ** -8
        torch.testing.assert_close(value.double(), value_wanted, rtol=tolerance, atol=tolerance)


def test_a_mask_branch_trains_with_them():
    branch = SoftMaskBranch(64, mask_depth=2).to(memory_format=torch.channels_last)
    twin, x = copy.deepcopy(branch), torch.randn(4, 64, 9, 6).contiguous(memory_format=torch.channels_last)
    use_cpu_kernels(branch)
    with torch.profiler.profile() as profile:
        output = branch(x)
        output.square().sum().backward()
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["_MaxPool"] == calls["_Upsample"] == 2
    assert not [name for name in calls if "max_pool2d" in name or "upsample_" in name]
    wanted = twin(x)
    wanted.square().sum().backward()
    torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(branch.parameters(), twin.parameters(), strict=True):
        # Next to the kink of a ReLU, rounding decides about a value.
        assert (ours.grad - theirs.grad).norm() <= 1e-2 * theirs.grad.norm() + 1e-5
    torch.testing.assert_close(branch.eval()(x), twin.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["channels", "layout"])
def test_maps_that_do_not_fit_are_upsampled_by_torch(case):
    channels = 24 if case == "channels" else 16
    branch = SoftMaskBranch(channels)
    twin, x = copy.deepcopy(branch), torch.randn(2, channels, 6, 6)
    use_cpu_kernels(branch)
    low = x[:, :, ::2, ::2].contiguous(
        memory_format=torch.contiguous_format if case == "layout" else torch.channels_last).requires_grad_()
    assert "_UpsampleBackward" not in type(branch.upsample(low, x).grad_fn).__name__
    assert torch.equal(branch.upsample(low, x), twin.upsample(low, x))


OTHER_POOLINGS = {
    "kernel size": dict(kernel_size=2), "stride": dict(stride=1), "padding": dict(padding=0),
    "dilation": dict(dilation=2), "rounding": dict(ceil_mode=True)}


@pytest.mark.parametrize("case", [*OTHER_POOLINGS, "layout", "channels"])
def test_other_poolings_go_the_way_of_torch(case):
    pool = nn.MaxPool2d(**dict(kernel_size=3, stride=2, padding=1) | OTHER_POOLINGS.get(case, {}))
    twin = copy.deepcopy(pool)
    use_cpu_kernels(pool)
    x = torch.randn(2, 8 if case == "channels" else 16, 8, 8, requires_grad=True)
    if case != "layout":
        x = x.contiguous(memory_format=torch.channels_last)
    y = pool(x)
    assert type(y.grad_fn).__name__ != "_MaxPoolBackward"
    assert torch.equal(y, twin(x))
