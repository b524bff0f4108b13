"""Batch normalisation and ReLU in one kernel: the numbers of torch, and where it steps aside."""
import copy
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import BatchNormAct2d

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import cifar
import fused_norm
from fused_norm import fuse_norms, library, why_not_fused

import ran_layers  # noqa: F401

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(library() is None, reason="the kernel cannot be built here")
# bfloat16 keeps 8 bits, so a rounded result is within 2 ** -9 of it.
TOLERANCE = {torch.float32: dict(rtol=1e-5, atol=1e-5), torch.bfloat16: dict(rtol=2 ** -8, atol=2 ** -8)}


def norm_and_twin(channels: int, relu: bool) -> tuple[nn.Module, nn.Module]:
    """Return a fused layer with random parameters and the same layer in float64 as torch has it."""
    norm = BatchNormAct2d(channels, apply_act=relu) if relu else nn.BatchNorm2d(channels, momentum=0.3)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    twin = copy.deepcopy(norm).double()
    fuse_norms(norm)
    return norm, twin


@needs_compiler
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", [(8, 64, 6, 6), (3, 16, 5, 7), (2, 48, 1, 3), (5, 512, 2, 2), (400, 32, 2, 2)])
def test_outputs_gradients_and_statistics_are_those_of_batch_norm(shape, dtype, relu, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    norm, twin = norm_and_twin(shape[1], relu)
    x = (3 * torch.randn(shape) + 2).to(dtype, memory_format=torch.channels_last).requires_grad_()
    exact = x.detach().double().requires_grad_()
    y, wanted = norm(x), twin(exact)
    assert y.dtype is dtype
    assert type(y.grad_fn).__name__ == "_BatchNormActBackward"
    grad = torch.randn_like(y)
    y.backward(grad)
    wanted.backward(grad.double())
    torch.testing.assert_close(y.double(), wanted, **TOLERANCE[dtype])
    torch.testing.assert_close(x.grad.double(), exact.grad, **TOLERANCE[dtype])
    for name in ("weight", "bias"):
        torch.testing.assert_close(
            getattr(norm, name).grad.double(), getattr(twin, name).grad, rtol=1e-4, atol=1e-4)
    for name, buffer in norm.named_buffers():
        torch.testing.assert_close(buffer.double(), twin.get_buffer(name).double(), rtol=1e-5, atol=1e-5)


@needs_compiler
def test_a_mean_far_above_the_deviation_costs_no_digits():
    norm, twin = norm_and_twin(16, relu=False)
    x = (1000 + 0.1 * torch.randn(64, 16, 8, 8)).contiguous(memory_format=torch.channels_last)
    # Numbers around 1000 are 6e-5 apart in float32: no formula does better than this.
    torch.testing.assert_close(norm(x).double(), twin(x.double()), rtol=0, atol=2e-3)


@needs_compiler
def test_what_is_not_a_number_stays_so():
    norm, _ = norm_and_twin(16, relu=True)
    x = torch.randn(2, 16, 3, 3).contiguous(memory_format=torch.channels_last)
    x[0, 5, 1, 1] = float("nan")
    y = norm(x)
    assert y[:, 5].isnan().all()
    assert not y[:, :5].isnan().any()


@needs_compiler
def test_the_gradient_may_come_in_another_layout():
    norm, twin = norm_and_twin(16, relu=True)
    x = torch.randn(2, 16, 3, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    exact = x.detach().double().requires_grad_()
    norm(x).sum().backward()  # one number, expanded
    twin(exact).sum().backward()
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-4, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("case", ["evaluation", "layout", "channels", "type", "no running statistics"])
def test_other_cases_go_the_way_of_torch(case):
    channels = 8 if case == "channels" else 16
    norm = BatchNormAct2d(channels, track_running_stats=case != "no running statistics")
    x = torch.randn(2, channels, 4, 4).contiguous(memory_format=torch.channels_last)
    if case == "layout":
        x = x.contiguous()
    if case == "type":
        norm, x = norm.double(), x.double()
    norm.train(case != "evaluation")
    twin = copy.deepcopy(norm)
    fuse_norms(norm)
    assert torch.equal(norm(x), twin(x))


@needs_compiler
def test_gradients_of_a_network_are_as_exact_as_those_of_torch():
    model = timm.create_model("ran_att56_cifar", num_classes=10).to(memory_format=torch.channels_last)
    fused, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    fuse_norms(fused)
    assert fused.state_dict().keys() == model.state_dict().keys()
    x, y = torch.randn(16, 3, 32, 32).contiguous(memory_format=torch.channels_last), torch.randint(10, (16,))
    losses, grads = [], []
    for network, images in ((model, x), (fused, x), (exact, x.double())):
        loss = F.cross_entropy(network(images), y)
        loss.backward()
        losses.append(loss.item())
        grads.append(torch.cat([param.grad.double().flatten() for param in network.parameters()]))
    assert losses[1] == pytest.approx(losses[2], rel=1e-6)
    # Rounding moves values over the kinks of a hundred ReLUs, so one percent is usual for torch too.
    torchs_error, error = ((grad - grads[2]).norm() / grads[2].norm() for grad in grads[:2])
    assert error < 2 * torchs_error
    assert torchs_error < 0.05


def test_obstacles_are_named(monkeypatch, capsys, tmp_path):
    assert "the device is cuda" in why_not_fused(torch.device("cuda"), False, "off")
    assert "--sync-bn" in why_not_fused(CPU, True, "off")
    assert "--compile" in why_not_fused(CPU, False, "default")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(fused_norm.shutil, "which", lambda name: None)
    monkeypatch.setattr(fused_norm, "library", library.__wrapped__)
    assert "no C++ compiler" in why_not_fused(CPU, False, "off")
    with pytest.raises(SystemExit):
        cifar.main(["--dataset", "digits", "--device", "cpu", "--fused-norm", "--out", str(tmp_path / "run")])
    assert "error: --fused-norm is not to be had here: there is no C++ compiler" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_compiler_that_fails_is_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert library.__wrapped__() is None
    assert not list((tmp_path / "ran-layers").iterdir())
