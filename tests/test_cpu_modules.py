"""Networks that train with the kernels for a CPU although somebody put hooks, modules or other layers into them."""
import copy
import sys
import types
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn
from timm.layers import BatchNormAct2d
from torch.nn.utils import prune

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from harness.kernels.cpu_library import library
from harness.kernels.cpu_modules import use_cpu_kernels
from ran_layers import AttentionModule, ResidualUnit, insert_attention
from ran_layers.layers.mask_branch import MaskActivation

pytestmark = pytest.mark.skipif(library() is None, reason="the kernels cannot be built here")


def maps(channels: int = 64) -> torch.Tensor:
    return torch.randn(2, channels, 6, 6).contiguous(memory_format=torch.channels_last)


def assert_trains_as_before(module: nn.Module, x: torch.Tensor, after=lambda module: None) -> nn.Module:
    """Compare outputs and gradients with those of torch; ``after`` changes both forms once the kernels are in one."""
    twin = copy.deepcopy(module)
    use_cpu_kernels(module)
    after(module), after(twin)
    outputs = module(x), twin(x)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    for output in outputs:
        output.square().sum().backward()
    for (name, ours), wanted in zip(module.named_parameters(), twin.parameters(), strict=True):
        assert (ours.grad is None) == (wanted.grad is None), name
        if ours.grad is not None:
            assert (ours.grad - wanted.grad).norm() <= 1e-3 * wanted.grad.norm() + 1e-6, name
    return module


@pytest.mark.parametrize("mask", ["soft", "local"])
@pytest.mark.parametrize("host", ["mask", "mask.head", "mask.head.conv1", "mask.head.act", "post.0.norm2",
                                  "trunk.1.conv3", "pre.0"])
def test_what_is_inserted_takes_part_in_training(host, mask):
    module = AttentionModule(64, mask=mask)
    insert_attention(module, [host], example_input=maps())
    inserted = module.get_submodule(host).inserted_attention
    nn.init.constant_(inserted.gamma, 0.5)
    assert_trains_as_before(module, maps())
    assert inserted.gamma.grad.abs().sum() > 0


def test_what_is_inserted_into_a_network_takes_part_in_training():
    model = timm.create_model("ran_att56_cifar")
    insert_attention(model, ["stages.1.blocks.0.conv2"])
    nn.init.constant_(model.get_submodule("stages.1.blocks.0.conv2.inserted_attention").gamma, 0.5)
    twin, x = copy.deepcopy(model), torch.randn(8, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    use_cpu_kernels(model)
    torch.testing.assert_close(output := model(x), twin(x), rtol=1e-3, atol=1e-3)
    output.sum().backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("name", ["norm1", "norm1.act", "conv1", "conv2", "drop_path"])
def test_hooks_are_called(name):
    module, seen = ResidualUnit(64), []

    def hook(module):
        layer = module.get_submodule(name)
        layer.register_forward_hook(lambda module, args, output: seen.append(name) or 2 * output)

    assert_trains_as_before(module, maps(), hook)
    assert seen == [name, name]


def test_hooks_that_look_at_gradients_are_called():
    module, seen = ResidualUnit(64), []
    use_cpu_kernels(module)
    module.norm2.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append("norm2"))
    module.conv2.register_full_backward_pre_hook(lambda module, grad_out: seen.append("conv2"))
    module(maps().requires_grad_()).sum().backward()
    assert sorted(seen) == ["conv2", "norm2"]


def test_pruned_weights_stay_pruned_in_every_step():
    module = ResidualUnit(64)
    use_cpu_kernels(module)
    prune.l1_unstructured(module.conv1, "weight", 0.5)
    for _ in range(2):
        module(maps()).sum().backward()
    assert (module.conv1.weight_orig.grad[module.conv1.weight_mask == 0] == 0).all()


def test_a_forward_of_the_object_is_what_runs():
    def twice(module):
        conv = module.conv1
        conv.forward = types.MethodType(lambda self, x: 2 * type(self).forward(self, x), conv)

    assert_trains_as_before(ResidualUnit(64), maps(), twice)


@pytest.mark.parametrize("module", [
    BatchNormAct2d(16), ResidualUnit(64),
    AttentionModule(64, trunk=nn.Sequential(ResidualUnit(64, 128), ResidualUnit(64)))],
    ids=lambda module: type(module).__name__)
def test_maps_of_other_channels_are_refused_by_torch(module):
    use_cpu_kernels(module)
    with pytest.raises(RuntimeError, match="running_mean should contain"):
        module(maps(32 if isinstance(module, BatchNormAct2d) else 64 if isinstance(module, AttentionModule) else 128))


def test_a_convolution_of_other_channels_is_refused_by_torch():
    unit = ResidualUnit(64)
    unit.conv2 = nn.Conv2d(48, 32, 3, 1, 1, bias=False)
    use_cpu_kernels(unit)
    with pytest.raises(RuntimeError, match="expected input"):
        unit(maps())


class HalfSigmoid(MaskActivation):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sigmoid() / 2


@pytest.mark.parametrize("act", [HalfSigmoid(), nn.Sigmoid()], ids=lambda act: type(act).__name__)
def test_a_mask_activation_of_ones_own_stays(act):
    module = AttentionModule(64)
    module.mask.head.act = act
    assert assert_trains_as_before(module, maps()).mask.head.act.__class__ is act.__class__


@pytest.mark.parametrize("act", [HalfSigmoid(), nn.Sigmoid(), MaskActivation("channel")],
                         ids=lambda act: type(act).__name__)
def test_a_mask_activation_may_be_replaced_later(act):
    def replace(module):
        module.mask.head.act = act

    assert_trains_as_before(AttentionModule(64), maps(), replace)


def without(norm: nn.Module, name: str) -> nn.Module:
    if name == "track_running_stats":
        norm.track_running_stats = False
    elif name == "bias":
        norm.bias = None
    else:
        norm.num_batches_tracked = None
    return norm


@pytest.mark.parametrize("name", ["track_running_stats", "bias", "num_batches_tracked"])
def test_a_normalisation_that_lacks_something_goes_the_way_of_torch(name):
    norm = without(nn.BatchNorm2d(16), name)
    twin = copy.deepcopy(norm)
    use_cpu_kernels(norm)
    x = maps(16)
    assert torch.equal(norm(x), twin(x))
    for ours, wanted in zip(norm.buffers(), twin.buffers(), strict=True):
        assert torch.equal(ours, wanted)


def test_gradients_of_gradients_are_refused():
    norm, x = BatchNormAct2d(16), maps(16).requires_grad_()
    use_cpu_kernels(norm)
    (grad,) = torch.autograd.grad(norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()
