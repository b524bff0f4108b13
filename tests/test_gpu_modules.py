"""Networks with the Triton kernels against plain ones: interpreted on a CPU, compiled on a GPU."""
import copy
import statistics
import sys
from pathlib import Path

import pytest
import timm
import torch
from triton_device import DEVICE

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import ran_layers
from harness.kernels.gpu_modules import FusedAttentionModule, FusedHead, FusedUnit, use_gpu_kernels


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def pair(model):
    """Return the model and a copy with the kernels, both with statistics and norms of their own."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim == 1:
                param.add_(torch.randn(param.shape, generator=generator) * 0.3)
    model = model.to(DEVICE, memory_format=torch.channels_last).train()
    fused = copy.deepcopy(model)
    use_gpu_kernels(fused)
    return model, fused


def compare(model, fused, *shape, steps=2):
    for step in range(steps):
        x = torch.randn(*shape, generator=torch.Generator().manual_seed(step)).to(DEVICE)
        x = x.contiguous(memory_format=torch.channels_last)
        grads = []
        for net in (model, fused):
            inputs = x.clone().requires_grad_()
            y = net(inputs)
            weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(DEVICE)
            net.zero_grad()
            (y * weights).sum().backward()
            grads.append({"output": y, "input": inputs.grad, **{n: p.grad for n, p in net.named_parameters()}})
        for name, expected in grads[0].items():
            scale = expected.abs().max().clamp(min=1e-3)
            torch.testing.assert_close(grads[1][name] / scale, expected / scale, rtol=0, atol=2e-4, msg=name)
    for (name, expected), own in zip(model.state_dict().items(), fused.state_dict().values()):
        if "num_batches" not in name:
            torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)


def test_unit():
    model, fused = pair(ran_layers.ResidualUnit(64))
    assert type(fused) is FusedUnit
    compare(model, fused, 3, 64, 7, 5)


def test_what_changes_a_map_in_place_changes_its_sums():
    model, fused = pair(torch.nn.Sequential(
        ran_layers.ResidualUnit(64), torch.nn.ReLU(inplace=True), ran_layers.ResidualUnit(64)))
    compare(model, fused, 3, 64, 7, 5)


def test_other_channels_are_an_error():
    _, fused = pair(ran_layers.ResidualUnit(64))
    with pytest.raises(RuntimeError, match="64"):
        fused(torch.randn(2, 32, 4, 4, device=DEVICE))


@pytest.mark.parametrize("kwargs", [
    dict(mask_depth=2), dict(mask="local"), dict(learning="naive"), dict(mask_act="channel"), dict(drop_path=0.0, t=1)],
    ids=str)
def test_attention_module(kwargs):
    model, fused = pair(ran_layers.AttentionModule(64, **kwargs))
    assert {FusedUnit, FusedHead} <= {type(module) for module in fused.modules()}
    plain = kwargs.get("learning") == "naive" or "mask_act" in kwargs
    assert isinstance(fused, FusedAttentionModule) is not plain
    compare(model, fused, 2, 64, 12, 8)


def test_gradients_go_to_the_weights_that_were_cast():
    model, _ = pair(ran_layers.AttentionModule(64))
    fused = copy.deepcopy(model)
    convs = {module.weight: torch.nn.Parameter(module.weight.detach().clone()) for module in fused.modules()
             if isinstance(module, torch.nn.Conv2d)}
    use_gpu_kernels(fused, convs)
    x = torch.randn(2, 64, 4, 4, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for net in (model, fused):
        net(x.contiguous(memory_format=torch.channels_last)).square().sum().backward()
    assert set(dict(fused.named_parameters())) == set(dict(model.named_parameters()))
    for (name, own), param in zip(fused.named_parameters(), model.parameters()):
        if own in convs and own.shape[2:] == (1, 1):
            assert own.grad is None, name
            own = convs[own]
        torch.testing.assert_close(own.grad, param.grad, rtol=1e-3, atol=1e-3 * param.grad.abs().max().item(), msg=name)


def test_evaluation_takes_the_running_statistics():
    model, fused = pair(ran_layers.AttentionModule(64, mask_depth=2))
    x = torch.randn(2, 64, 8, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    torch.testing.assert_close(fused.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-4)


def test_network():
    # So deep a network on so few images multiplies what float32 rounds off: what it does to the plain one is allowed.
    model, fused = pair(timm.create_model("ran_att56_cifar_orig", num_classes=4))
    kinds = [type(module) for module in fused.modules()]
    assert [kinds.count(kind) for kind in (FusedUnit, FusedHead, FusedAttentionModule)] == [30, 2, 3]
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    grads = []
    for net in (copy.deepcopy(model).double(), model, fused):
        net(x.to(next(net.parameters()).dtype)).square().sum().backward()
        grads.append([param.grad for param in net.parameters()])
    exact, *others = grads
    plain, own = (statistics.median(
        ((grad - true).abs().max() / true.abs().max()).item() for grad, true in zip(other, exact)) for other in others)
    assert own < 1.5 * plain
