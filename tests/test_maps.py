"""Masks recorded from a forward pass, of our networks and of any other."""
import copy

import pytest
import timm
import torch
import torch.nn as nn

import ran_layers
from ran_layers import AttentionModule, attention_maps, record_masks


def count_hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("ran_att56_cifar.cifar10").eval()


@pytest.fixture(scope="module")
def small():
    """A network of the user's own, small, with two modules."""
    torch.manual_seed(0)
    modules = AttentionModule(8), AttentionModule(8, mask="local")
    return nn.Sequential(nn.Conv2d(3, 8, 3), modules[0], nn.MaxPool2d(2), modules[1]).eval()


@pytest.mark.parametrize("learning", ["residual", "naive"])
def test_the_mask_is_the_one_of_the_formula(learning):
    torch.manual_seed(0)
    module = AttentionModule(4, learning=learning, mask_depth=2).double().eval()
    net, x = nn.Sequential(nn.Identity(), module), torch.randn(2, 4, 9, 7, dtype=torch.float64)
    mask = attention_maps(net, x)["1"]
    assert mask.shape == (2, 4, 9, 7)
    assert 0 < mask.min() < mask.max() < 1
    with torch.no_grad():
        trunk = module.trunk(module.pre(x))
        torch.testing.assert_close(module.post((1 + mask if learning == "residual" else mask) * trunk), net(x))


def test_every_module_of_our_networks_by_name(model):
    maps = attention_maps(model, torch.randn(2, 3, 32, 32))
    assert {name: tuple(mask.shape) for name, mask in maps.items()} == {
        "stages.0.blocks.1": (2, 64, 16, 16), "stages.1.blocks.1": (2, 128, 8, 8), "stages.2.blocks.1": (2, 256, 4, 4)}
    assert all(isinstance(model.get_submodule(name), AttentionModule) for name in maps)


def test_any_network_with_a_module_in_it():
    resnet = timm.create_model("resnet10t", block_args=dict(attn_layer=AttentionModule), num_classes=0)
    maps = attention_maps(resnet, torch.randn(1, 3, 64, 64))
    assert list(maps) == ["layer1.0.se", "layer2.0.se", "layer3.0.se", "layer4.0.se"]
    assert attention_maps(AttentionModule(4), torch.randn(1, 4, 5, 6))[""].shape == (1, 4, 5, 6)


class Cached(nn.Module):
    """Fills a cache in evaluation, as timm's LeViT does; training clears it."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))
        self.cache = None

    def train(self, mode=True):
        super().train(mode)
        self.cache = None if mode else self.cache
        return self

    def forward(self, x):
        if self.training:
            return x + self.bias
        if self.cache is None:
            self.cache = self.bias.detach().clone()
        return x + self.cache


def test_what_evaluation_alone_keeps_is_gone_in_training():
    net = nn.Sequential(Cached(), AttentionModule(4), Cached().eval()).train()
    net[2].eval()
    modes = [module.training for module in net.modules()]
    attention_maps(net, torch.randn(1, 4, 6, 6))
    assert [module.training for module in net.modules()] == modes
    assert net[0].cache is None
    assert net[2].cache is not None


def test_features_only():
    features = timm.create_model("ran_att56_cifar", features_only=True)
    maps = attention_maps(features, torch.randn(1, 3, 32, 32))
    assert [mask.shape[1] for mask in maps.values()] == [64, 128, 256]


def test_a_compiled_network_gives_the_masks_of_the_plain_one():
    net = nn.Sequential(nn.Conv2d(3, 8, 1), AttentionModule(8, p=0, t=1, mask="local")).eval()
    x = torch.randn(2, 3, 5, 5)
    compiled = torch.compile(net, backend="eager")
    with torch.no_grad():
        expected = compiled(x)  # the graph is made without hooks
    maps = attention_maps(compiled, x)
    assert list(maps) == ["1"]
    torch.testing.assert_close(maps, attention_maps(net, x))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected)
    parts = nn.Sequential(net[0], torch.compile(net[1], backend="eager"))
    torch.testing.assert_close(attention_maps(parts, x), maps)


def test_under_gradient_checkpointing_the_masks_and_gradients_are_the_same():
    torch.manual_seed(0)
    net = timm.create_model("ran_att56_cifar_orig").train()
    x, results = torch.randn(2, 3, 16, 16), []
    for checkpointing in (False, True):
        net.set_grad_checkpointing(checkpointing)
        net.zero_grad()
        with record_masks(net) as masks:
            net(x).sum().backward()
        results.append((dict(masks), net.stem.conv.weight.grad.clone()))
    assert len(results[1][0]) == 3
    torch.testing.assert_close(results[0], results[1])


def test_a_loss_on_the_recorded_masks_has_gradients(small):
    small.zero_grad()
    with record_masks(small) as masks:
        small(torch.randn(1, 3, 9, 9))
    sum(mask.mean() for mask in masks.values()).backward()
    assert small[0].weight.grad.abs().sum() > 0
    small.zero_grad()


def test_the_model_is_left_as_it_was(small):
    small[3].train()  # a mixture, as in fine-tuning with frozen parts
    before = {name: value.clone() for name, value in small.state_dict().items()}
    modes = [module.training for module in small.modules()]
    x = torch.randn(2, 3, 9, 9)
    masks = attention_maps(small, x)
    assert count_hooks(small) == 0
    assert [module.training for module in small.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())
    assert not any(mask.requires_grad for mask in masks.values())
    small.eval()


def test_no_hook_is_left_after_an_error(small):
    with pytest.raises(RuntimeError, match="channels"):
        attention_maps(small, torch.randn(1, 5, 9, 9))
    with record_masks(small):
        assert count_hooks(small) == 2
    with pytest.raises(KeyError), record_masks(small):
        raise KeyError
    assert count_hooks(small) == 0
    assert not small.training


def test_recording_changes_no_output(small):
    x = torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        plain = small(x)
        with record_masks(small):
            recorded = small(x)
    assert torch.equal(plain, recorded)


def test_wrong_arguments_are_named(small):
    x = torch.randn(1, 3, 9, 9)
    with pytest.raises(ValueError, match=r"must contain an AttentionModule, got a ReLU"):
        attention_maps(nn.ReLU(), x)
    with pytest.raises(ValueError, match="traced"):
        attention_maps(torch.fx.symbolic_trace(small), x)
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str"):
        attention_maps("ran_att56", x)
    with pytest.raises(TypeError, match=r"images must be a tensor .* got list"):
        attention_maps(small, [x])
    with pytest.raises(ValueError, match=r"images must have the shape .* got \(3, 9, 9\)"):
        attention_maps(small, x[0])


def test_exported_at_the_top():
    assert ran_layers.attention_maps is attention_maps
    assert {"attention_maps", "record_masks"} <= set(ran_layers.__all__)


def test_recordings_that_overlap_leave_the_compiler_as_it_was(small):
    other = nn.Sequential(AttentionModule(8)).eval()
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    network, x = torch.compile(copy.deepcopy(small), backend=backend), torch.randn(1, 3, 20, 20)
    first, second = record_masks(small), record_masks(other)
    first.__enter__()
    second.__enter__()
    network(x)
    first.__exit__(None, None, None)
    network(x)
    assert compiled == []
    second.__exit__(None, None, None)
    network(x)
    assert compiled
