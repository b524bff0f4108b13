"""The kernels for training on a CPU: the numbers of torch, and where they step aside."""
import copy
import functools
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import BatchNormAct2d

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from harness.kernels import cpu_library
from harness.kernels.cpu_kernels import gate, norm_act_conv
from harness.kernels.cpu_library import library
from harness.kernels.cpu_modules import use_cpu_kernels
from ran_layers import AttentionModule, ResidualUnit, ResidualUnitDown, record_masks

needs_compiler = pytest.mark.skipif(library() is None, reason="the kernels cannot be built here")
# bfloat16 keeps 8 bits, so a rounded result is within 2 ** -9 of it.
TOLERANCE = {torch.float32: dict(rtol=1e-5, atol=1e-5), torch.bfloat16: dict(rtol=2 ** -8, atol=2 ** -8)}


def norm_and_twin(channels: int, relu: bool) -> tuple[nn.Module, nn.Module]:
    """Return a fused layer with random parameters and the same layer in float64 as torch has it."""
    norm = BatchNormAct2d(channels, apply_act=relu) if relu else nn.BatchNorm2d(channels, momentum=0.3)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    twin = copy.deepcopy(norm).double()
    use_cpu_kernels(norm)
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
    use_cpu_kernels(norm)
    assert torch.equal(norm(x), twin(x))


@needs_compiler
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_what_goes_past_the_normalisation_adds_its_gradient(dtype):
    norm, twin = norm_and_twin(32, relu=True)
    x = torch.randn(4, 32, 5, 3).to(dtype, memory_format=torch.channels_last).requires_grad_()
    exact = x.detach().double().requires_grad_()
    y, past = norm.with_input(x)
    (y * 2 + past * past.detach()).float().sum().backward()
    (twin(exact) * 2 + exact * exact.detach()).sum().backward()
    tolerance = dict(rtol=2 ** -7, atol=2 ** -7) if dtype is torch.bfloat16 else TOLERANCE[dtype]
    torch.testing.assert_close(x.grad.double(), exact.grad, **tolerance)
    x.grad = None
    norm.with_input(x)[1].sum().backward()  # nothing but the past
    assert torch.equal(x.grad, torch.ones_like(x))


@needs_compiler
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_gate(dtype):
    trunk, logits, grad = (
        torch.randn(3, 16, 5, 7).mul(scale).to(dtype, memory_format=torch.channels_last) for scale in (1, 8, 1))
    logits[0, 0, 0] = torch.tensor([-1000, -100, -80, 0, 80, 100, 1000.])
    logits[0, 1, 0, 0] = float("nan")
    trunk.requires_grad_(), logits.requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in (trunk, logits)]
    y, wanted = gate(trunk, logits), (1 + exact[1].sigmoid()) * exact[0]
    y.backward(grad)
    wanted.backward(grad.double())
    tolerance = dict(TOLERANCE[dtype], equal_nan=True)
    torch.testing.assert_close(y.double(), wanted, **tolerance)
    for x, x_exact in zip((trunk, logits), exact):
        torch.testing.assert_close(x.grad.double(), x_exact.grad, **tolerance)


@needs_compiler
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("has_other", [True, False])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", [(4, 16, 64, 6, 7), (2, 144, 48, 5, 3), (3, 512, 128, 1, 1), (7, 32, 16, 13, 11)])
def test_norm_relu_and_pointwise_convolution(shape, dtype, has_other, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    batch, channels, channels_out, height, width = shape
    norm, twin = norm_and_twin(channels, relu=True)
    x = (2 * torch.randn(batch, channels, height, width) + 1).to(dtype, memory_format=torch.channels_last)
    other, grad = (
        torch.randn(batch, channels_out, height, width).to(dtype, memory_format=torch.channels_last) for _ in range(2))
    weight = torch.randn(channels_out, channels, 1, 1) / channels ** 0.5
    past_grad = torch.randn_like(x)
    tensors = [t.requires_grad_() for t in (x, weight, other)]
    exact = [t.detach().double().requires_grad_() for t in tensors]

    y, past = norm_act_conv(norm, x, weight, other=other if has_other else None)
    wanted = F.conv2d(twin(exact[0]), exact[1]) + (exact[2] if has_other else 0)
    torch.autograd.backward([y, past], [grad, past_grad])
    torch.autograd.backward([wanted, exact[0]], [grad.double(), past_grad.double()])
    assert y.dtype is dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    # bfloat16 rounds what is multiplied, by up to 2 ** -9, and the sum.
    tolerance = 2e-5 if dtype is torch.float32 else 2 ** -7
    pairs = [(y, wanted), (x.grad, exact[0].grad), (weight.grad, exact[1].grad)]
    pairs += [(getattr(norm, name).grad, getattr(twin, name).grad) for name in ("weight", "bias")]
    for value, value_wanted in pairs:
        assert (value.double() - value_wanted).norm() <= tolerance * value_wanted.norm()
    if has_other:
        assert torch.equal(other.grad, grad)
    for name, buffer in norm.named_buffers():
        torch.testing.assert_close(buffer.double(), twin.get_buffer(name).double(), rtol=1e-5, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", [
    (37, 16, 16, 8, 8), (2, 48, 144, 5, 6), (70, 128, 128, 2, 2), (5, 16, 32, 1, 1), (3, 32, 16, 1, 9)])
def test_norm_relu_and_3x3_convolution(shape, dtype, stride, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    batch, channels, channels_out, height, width = shape
    norm, twin = norm_and_twin(channels, relu=True)
    x = (2 * torch.randn(batch, channels, height, width) + 1).to(dtype, memory_format=torch.channels_last)
    weight = torch.randn(channels_out, channels, 3, 3) / channels ** 0.5  # in the other memory order
    tensors = [t.requires_grad_() for t in (x, weight)]
    exact = [t.detach().double().requires_grad_() for t in tensors]

    (y, past), wanted = norm_act_conv(norm, x, weight, stride), F.conv2d(twin(exact[0]), exact[1], None, stride, 1)
    assert y.shape == wanted.shape
    assert y.dtype is dtype
    grad, past_grad = torch.randn(wanted.shape).to(dtype), torch.randn_like(x)  # one in the other memory order
    torch.autograd.backward([y, past], [grad, past_grad])
    torch.autograd.backward([wanted, exact[0]], [grad.double(), past_grad.double()])
    tolerance = 2e-5 if dtype is torch.float32 else 2 ** -7
    pairs = [(y, wanted), (x.grad, exact[0].grad), (weight.grad, exact[1].grad)]
    pairs += [(getattr(norm, name).grad, getattr(twin, name).grad) for name in ("weight", "bias")]
    for value, value_wanted in pairs:
        assert (value.double() - value_wanted).norm() <= tolerance * value_wanted.norm()
    for name, buffer in norm.named_buffers():
        torch.testing.assert_close(buffer.double(), twin.get_buffer(name).double(), rtol=1e-5, atol=1e-5)


@needs_compiler
@pytest.mark.skipif("avx512_bf16" not in cpu_library._processor("flags"), reason="the processor has no AVX512-BF16")
@pytest.mark.parametrize("shape", [(4, 16, 64, 6, 7), (3, 512, 128, 1, 1)])
@pytest.mark.parametrize("size", [1, 3])
def test_bfloat16_multiplied_in_pairs_and_widened(size, shape, monkeypatch):
    """Which of the two a processor is given depends on its maker; here both are."""
    batch, channels, channels_out, height, width = shape
    x = (2 * torch.randn(batch, channels, height, width)).bfloat16().contiguous(memory_format=torch.channels_last)
    weight, results = torch.randn(channels_out, channels, size, size) / channels ** 0.5, []
    norm, _ = norm_and_twin(channels, relu=True)
    for pairs in (True, False):
        monkeypatch.setattr(cpu_library, "multiplies_bf16", lambda pairs=pairs: pairs)
        monkeypatch.setattr(cpu_library, "library", functools.cache(library.__wrapped__))
        inputs = [tensor.clone().requires_grad_() for tensor in (x, weight)]
        y, _ = norm_act_conv(norm, inputs[0], inputs[1])
        y.backward(torch.ones_like(y))
        results.append([y, *(tensor.grad for tensor in inputs)])
    for in_pairs, widened in zip(*results):
        assert not torch.equal(in_pairs, widened)
        assert (in_pairs.double() - widened).norm() < 2 ** -7 * widened.double().norm()


@needs_compiler
def test_the_kernels_are_what_a_network_trains_with():
    model = timm.create_model("ran_att56_cifar").to(memory_format=torch.channels_last)
    use_cpu_kernels(model)
    with torch.profiler.profile() as profile:
        model(torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)).sum().backward()
    calls = {event.key: event.count for event in profile.key_averages()}
    units = sum(isinstance(module, ResidualUnit) for module in model.modules())
    changing = sum(isinstance(module, ResidualUnit) and module.downsample is not None for module in model.modules())
    # Where channels change, the first convolution and the shortcut share an activated map. And three masks have heads.
    assert calls["_ResidualUnit"] == units - changing
    assert calls["_NormActConv"] == 2 * changing + 2 * 3
    assert calls["_NormActConvAndShortcut"] == changing
    assert calls["_Gate"] == 3
    assert calls["aten::convolution"] == 1  # the stem's


@needs_compiler
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_what_is_not_a_number_passes_the_convolution(dtype):
    norm, _ = norm_and_twin(16, relu=True)
    x = torch.randn(2, 16, 3, 3).to(dtype, memory_format=torch.channels_last)
    x[0, 5, 1, 1] = float("nan")
    assert norm_act_conv(norm, x, torch.ones(16, 16, 1, 1))[0].isnan().all()


@needs_compiler
def test_only_the_past_may_have_a_gradient():
    norm, _ = norm_and_twin(16, relu=True)
    x = torch.randn(2, 16, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    norm_act_conv(norm, x, torch.ones(16, 16, 1, 1))[1].sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@needs_compiler
@pytest.mark.parametrize("layer", [
    lambda: ResidualUnit(32), lambda: ResidualUnit(16, 64), lambda: ResidualUnitDown(32, 64),
    lambda: ResidualUnit(32, drop_path=0.5), lambda: ResidualUnit(24), lambda: AttentionModule(32, mask_depth=2),
    lambda: AttentionModule(32, mask="local"), lambda: AttentionModule(32, mask_act="spatial"),
    lambda: AttentionModule(32, learning="naive"), lambda: AttentionModule(32, act_layer=nn.SiLU),
    lambda: AttentionModule(32, trunk=nn.Identity())])
def test_layers_give_what_they_gave(layer):
    plain = layer().to(memory_format=torch.channels_last)
    fused = copy.deepcopy(plain)
    use_cpu_kernels(fused)
    assert fused.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(4, plain.norm1.num_features if isinstance(plain, ResidualUnit) else plain.channels, 9, 6)
    x = x.contiguous(memory_format=torch.channels_last)
    outputs, grads = [], []
    for module in (plain, fused):
        torch.manual_seed(0)
        images = x.clone().requires_grad_()
        y = module(images)
        y.square().mean().backward()
        outputs.append(y)
        grads.append([images.grad, *(param.grad for param in module.parameters())])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
    for grad, wanted in zip(*reversed(grads)):
        # Next to the kink of a ReLU, rounding decides about a value.
        assert (grad - wanted).norm() <= 1e-2 * wanted.norm() + 1e-5
    assert torch.equal(fused.eval()(x), fused(x))
    torch.testing.assert_close(fused(x), plain.eval()(x), rtol=1e-4, atol=1e-5)


@needs_compiler
def test_those_who_look_at_the_masks_see_them():
    model = timm.create_model("ran_att56_cifar").to(memory_format=torch.channels_last)
    use_cpu_kernels(model)
    x = torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with record_masks(model) as masks:
        watched = model(x)
    assert len(masks) == 3
    assert all(((0 < mask) & (mask < 1)).all() for mask in masks.values())
    torch.testing.assert_close(model(x), watched, rtol=1e-3, atol=1e-3)
    module = model.get_submodule(next(iter(masks)))
    mask = module.mask(torch.randn(4, 64, 16, 16))  # called by itself, after a forward of the whole
    assert ((0 < mask) & (mask < 1)).all()


@needs_compiler
def test_gradients_of_a_network_are_as_exact_as_those_of_torch():
    model = timm.create_model("ran_att56_cifar", num_classes=10).to(memory_format=torch.channels_last)
    fused, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    use_cpu_kernels(fused)
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
