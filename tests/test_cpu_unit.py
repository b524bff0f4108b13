"""A residual unit in one kernel each way: the numbers of torch, and the units that go layer by layer instead."""
import copy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from harness.kernels.cpu_library import library
from harness.kernels.cpu_modules import _unit_fits, use_cpu_kernels
from ran_layers import ResidualUnit, fuse

pytestmark = pytest.mark.skipif(library() is None, reason="the kernels cannot be built here")


def unit_and_twin(channels: int, **unit_args) -> tuple[nn.Module, nn.Module]:
    """Return a unit with random normalisation and the same one in float64 as torch has it."""
    unit = ResidualUnit(channels, **unit_args).to(memory_format=torch.channels_last)
    for norm in (unit.norm1, unit.norm2, unit.norm3):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    twin = copy.deepcopy(unit).double()
    use_cpu_kernels(unit)
    return unit, twin


def maps(channels: int = 64, dtype: torch.dtype = torch.float32, images: int = 6) -> torch.Tensor:
    values = 2 * torch.randn(images, channels, 5, 4) + 1
    return values.to(dtype, memory_format=torch.channels_last).requires_grad_()


def ran_as_a_whole(output: torch.Tensor) -> bool:
    return type(output.grad_fn).__name__ == "_ResidualUnitBackward"


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("channels", "bottle_ratio"), [(64, 0.25), (192, 0.25), (32, 1)])
def test_outputs_gradients_and_statistics_are_those_of_torch(channels, bottle_ratio, dtype, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    # In bfloat16 many a value comes to the other side of a ReLU's kink, and each moves a gradient by all that it
    # passes: of one small batch, luck decides whether ours or torch's is further off. So several are taken together.
    batches, images = (8, 48) if dtype is torch.bfloat16 else (1, 6)
    squares: dict[str, torch.Tensor] = {}
    for _ in range(batches):
        for name, ours, torchs, exact in numbers_of_a_step(channels, bottle_ratio, dtype, images):
            of_batch = torch.stack([(ours - exact).norm(), (torchs - exact).norm(), exact.norm()]).square()
            squares[name] = squares.get(name, 0) + of_batch
    assert len(squares) == 20
    for name, values in squares.items():
        error, torchs_error, norm = values.sqrt().tolist()
        assert error <= max(1.2 * torchs_error, 1e-4 * norm), name


def numbers_of_a_step(
        channels: int, bottle_ratio: float, dtype: torch.dtype, images: int,
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield each output, gradient and statistic of a unit in training, as float64: ours, torch's, and exact."""
    unit, exact = unit_and_twin(channels, bottle_ratio=bottle_ratio)
    units = unit, copy.deepcopy(exact).float(), exact
    x = maps(channels, dtype, images)
    inputs = x, x.detach().requires_grad_(), x.detach().double().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        outputs = [units[i](inputs[i]) for i in (0, 1)] + [exact(inputs[2])]
    assert ran_as_a_whole(outputs[0])
    assert outputs[0].dtype is dtype
    assert outputs[0].is_contiguous(memory_format=torch.channels_last)
    grad = torch.randn(outputs[0].shape).to(dtype)  # which comes in the other memory order
    for output in outputs:
        output.backward(grad.to(output.dtype))
    found = {"output": outputs, "input": [x.grad for x in inputs]}
    for name, _ in unit.named_parameters():
        found[name] = [other.get_parameter(name).grad for other in units]
    for name, _ in unit.named_buffers():
        found[name] = [other.get_buffer(name) for other in units]
    for name, three in found.items():
        ours, torchs, wanted = (value.detach().double() for value in three)
        yield name, ours, torchs, wanted


def test_what_is_frozen_has_no_gradient():
    unit, _ = unit_and_twin(64)
    unit.conv2.weight.requires_grad_(False)
    unit.norm1.bias.requires_grad_(False)
    output = unit(maps().detach())
    assert ran_as_a_whole(output)
    output.sum().backward()
    assert [name for name, parameter in unit.named_parameters() if parameter.grad is None] == [
        "norm1.bias", "conv2.weight"]


def test_the_default_type_of_torch_may_be_another():
    unit, exact = unit_and_twin(64)
    x = maps()
    torch.set_default_dtype(torch.float64)
    try:
        output = unit(x)
        assert ran_as_a_whole(output)
        output.square().sum().backward()
    finally:
        torch.set_default_dtype(torch.float32)
    exact(x.detach().double()).square().sum().backward()
    for name, parameter in unit.named_parameters():
        wanted = exact.get_parameter(name).grad
        assert (parameter.grad.double() - wanted).norm() <= 1e-4 * wanted.norm(), name


def test_weights_in_the_other_memory_order_and_two_calls_before_a_backward():
    unit, exact = unit_and_twin(64)
    with torch.no_grad():
        unit.conv2.weight.set_(unit.conv2.weight.contiguous(memory_format=torch.contiguous_format))
    assert not unit.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    inputs = maps(), maps()
    for module, dtype in ((unit, torch.float32), (exact, torch.float64)):
        outputs = [module(x.detach().to(dtype)) for x in inputs]
        assert ran_as_a_whole(outputs[0]) is (module is unit)
        (outputs[0].square().sum() + outputs[1].pow(4).sum()).backward()
    for name, parameter in unit.named_parameters():
        wanted = exact.get_parameter(name).grad
        assert (parameter.grad.double() - wanted).norm() <= 1e-4 * wanted.norm(), name
    assert unit.norm1.num_batches_tracked == 2


def test_gradients_of_one_sign_over_large_maps_keep_more_digits_than_those_of_torch():
    unit, exact = unit_and_twin(64)
    torchs = copy.deepcopy(exact).float()
    x = torch.randn(16, 64, 56, 56).contiguous(memory_format=torch.channels_last)
    for module in (unit, torchs, exact):
        module(x.to(module.conv1.weight.dtype)).sum().backward()
    errors = [
        sum((parameter.grad.double() - wanted.grad).norm() / wanted.grad.norm()
            for parameter, wanted in zip(module.parameters(), exact.parameters(), strict=True))
        for module in (unit, torchs)]
    assert errors[0] < errors[1]


def test_what_was_trained_with_them_is_traced_and_folded():
    unit = nn.Sequential(ResidualUnit(64), ResidualUnit(64))
    use_cpu_kernels(unit)
    unit(maps())
    unit.eval()
    x = maps().detach()
    torch.testing.assert_close(fuse(copy.deepcopy(unit))(x), unit(x), rtol=1e-4, atol=1e-4)


def change(unit: nn.Module, case: str) -> None:
    if case == "eps":
        unit.norm2.eps = 0.1
    elif case == "momentum":
        unit.norm3.momentum = 0.5
    elif case == "evaluation":
        unit.norm2.eval()
    elif case == "hook":
        unit.norm3.act.register_forward_hook(lambda module, args, output: 2 * output)
    elif case == "activation":
        unit.norm2.act = nn.SiLU()
    elif case == "grouped":
        unit.conv2 = nn.Conv2d(16, 16, 3, padding=1, groups=4, bias=False, dtype=unit.conv2.weight.dtype)
        nn.init.constant_(unit.conv2.weight, 0.1)
    elif case == "counter":
        unit.norm1.num_batches_tracked = unit.norm1.num_batches_tracked.int()
    elif case == "size of a weight":
        unit.conv2.weight = nn.Parameter(unit.conv2.weight[:, :, 1:2, 1:2].detach())
        unit.conv2.padding = (0, 0)
    elif case == "another module":
        unit.conv3 = nn.Sequential(unit.conv3, nn.Identity())


@pytest.mark.parametrize("case", [
    "eps", "momentum", "evaluation", "hook", "activation", "grouped", "counter", "size of a weight", "another module"])
def test_other_units_go_layer_by_layer(case):
    unit, twin = unit_and_twin(64)
    change(unit, case), change(twin, case)
    x = maps()
    y, wanted = unit(x), twin(x.double())
    assert not ran_as_a_whole(y)
    torch.testing.assert_close(y.double(), wanted, rtol=1e-4, atol=1e-4)
    for name, buffer in unit.named_buffers():
        torch.testing.assert_close(buffer.double(), twin.get_buffer(name).double(), rtol=1e-4, atol=1e-4)


def test_a_normalisation_over_all_processes_goes_layer_by_layer():
    unit, _ = unit_and_twin(64)
    assert _unit_fits(unit, maps())
    unit.norm2.synced = True  # as use_cpu_kernels(synced=True) leaves all of them
    assert not _unit_fits(unit, maps())
