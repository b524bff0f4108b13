"""The layers against an independent computation, their edge cases and their errors."""
import copy
import functools
import typing

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from formula import Formula, max_pool, upsample
from safetensors.torch import load, save
from torch.testing import assert_close

from ran_layers import AttentionModule, LocalMaskBranch, ResidualUnit, ResidualUnitDown, ResNeXtUnit, SoftMaskBranch
from ran_layers.layers.mask_branch import MaskActivation

exact = functools.partial(assert_close, rtol=1e-6, atol=1e-6)


def with_weights(layer, training=False):
    """The layer in float64 with every weight and running statistic set, in evaluation mode unless ``training``."""
    layer.double().train(training)
    generator = torch.Generator().manual_seed(1)
    state = {}
    for name, tensor in layer.state_dict().items():
        if name.endswith("num_batches_tracked"):
            state[name] = tensor
        elif name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")):
            state[name] = 0.5 + torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
        else:
            state[name] = 0.5 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    layer.load_state_dict(state)
    return layer


def image(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 5), (8, 8)])
def test_the_formula_pools_and_interpolates_as_torch(size):
    x = image(2, 3, *size)
    exact(max_pool(x), F.max_pool2d(x, 3, 2, 1))
    for target in [size, (7, 9), (16, 2 * size[1])]:
        like = torch.empty(1, 1, *target)
        exact(upsample(x, like), F.interpolate(x, size=target, mode="bilinear", align_corners=False))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("layer", "formula"), [
    (lambda: ResidualUnit(8), {}),
    (lambda: ResidualUnit(6, 8, bottle_ratio=0.5), {}),
    (lambda: ResidualUnit(8, groups=2, bottle_ratio=0.5), {"groups": 2}),
    (lambda: ResidualUnit(8, stride=3), {"stride": 3}),
    (lambda: ResidualUnitDown(6, 8), {"stride": 2}),
    (lambda: ResNeXtUnit(8, groups=2), {"groups": 2, "resnext": True}),
    (lambda: ResNeXtUnit(6, 8, 2, groups=4), {"groups": 4, "stride": 2, "resnext": True}),
])
def test_units_equal_the_formula(layer, formula, training):
    layer = with_weights(layer(), training)
    x = image(2, layer.conv1.in_channels, 7, 6)
    exact(layer(x), Formula(copy.deepcopy(layer.state_dict()), training, **formula).unit("", x))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("args", "size"), [
    ({}, (2, 2)),
    ({"mask_depth": 2}, (3, 8)),
    ({"mask_depth": 3}, (13, 9)),
    ({"mask_depth": 3, "skips": 0}, (13, 9)),
    ({"mask_depth": 3, "skips": 1}, (13, 9)),
    ({"mask_depth": 2, "r": 2}, (6, 7)),
    ({"mask_act": "channel"}, (5, 4)),
    ({"mask_act": "spatial"}, (5, 4)),
])
def test_soft_mask_branch_equals_the_formula(args, size, training):
    branch = with_weights(SoftMaskBranch(8, **args), training)
    x = image(2, 8, *size)
    exact(branch(x), Formula(branch.state_dict(), training).soft_mask("", x, **args))


@pytest.mark.parametrize("args", [{}, {"units": 1}, {"mask_act": "channel"}, {"mask_act": "spatial"}])
def test_local_mask_branch_equals_the_formula(args):
    branch = with_weights(LocalMaskBranch(8, **args))
    x = image(2, 8, 5, 6)
    exact(branch(x), Formula(branch.state_dict()).local_mask("", x, **args))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("args", [
    {},
    {"mask_depth": 3},
    {"p": 2, "t": 4, "r": 3, "mask_depth": 2},
    {"p": 0, "t": 1},
    {"t": 0},
    {"mask_depth": 3, "skips": 1},
    {"learning": "naive"},
    {"mask": "local"},
    {"mask": "local", "learning": "naive", "mask_act": "spatial"},
    {"mask_act": "channel"},
    {"mask_act": "spatial", "mask_depth": 2},
], ids=str)
def test_attention_module_equals_the_formula(args, training):
    module = with_weights(AttentionModule(8, **args), training)
    x = image(2, 8, 9, 6)
    exact(module(x), Formula(module.state_dict(), training).module(x, **args))


def test_attention_module_of_resnext_units_equals_the_formula():
    unit = functools.partial(ResNeXtUnit, groups=2)
    module = with_weights(AttentionModule(8, unit_layer=unit, mask_depth=2))
    x = image(2, 8, 5, 6)
    exact(module(x), Formula(module.state_dict(), groups=2, resnext=True).module(x, mask_depth=2))


@pytest.mark.parametrize(("mask", "learning", "factor"), [
    (0, "residual", 1), (1, "residual", 2), (0, "naive", 0), (1, "naive", 1)])
def test_a_mask_of_zero_or_one(mask, learning, factor):
    module = with_weights(AttentionModule(8, learning=learning))
    # The last convolution sees ones everywhere and sums them to -1000 or 1000, where the sigmoid is 0 or 1.
    nn.init.zeros_(module.mask.head.norm2.weight)
    nn.init.ones_(module.mask.head.norm2.bias)
    nn.init.constant_(module.mask.head.conv2.weight, 125 if mask else -125)
    x = image(2, 8, 5, 6)
    trunk = module.trunk(module.pre(x))
    assert trunk.abs().max() > 0.1
    exact(module.mask(x), torch.full_like(x, mask))
    exact(module(x), module.post(factor * trunk))


def test_a_trunk_of_ones_own():
    trunk = nn.Conv2d(8, 8, 3, padding=1)
    module = AttentionModule(8, trunk=trunk, p=0).eval()
    x = torch.randn(1, 8, 5, 5)
    assert_close(module(x), (1 + module.mask(x)) * trunk(x))


@pytest.mark.parametrize("learning", ["residual", "naive"])
@pytest.mark.parametrize(("trunk", "shape"), [
    (nn.Conv2d(8, 1, 1), [2, 1, 5, 6]),
    (nn.Conv2d(8, 16, 1), [2, 16, 5, 6]),
    (nn.AdaptiveAvgPool2d(1), [2, 8, 1, 1]),
    (nn.Conv2d(8, 8, 3, stride=2, padding=1), [2, 8, 3, 3]),
    (nn.Flatten(0, 1), [16, 5, 6]),
], ids=["1-channel", "more-channels", "1x1", "smaller", "3-dimensions"])
def test_a_trunk_that_changes_the_shape(trunk, shape, learning):
    module = AttentionModule(8, trunk=trunk, learning=learning).eval()
    with pytest.raises(ValueError, match="trunk must keep the shape") as raised:
        module(torch.randn(2, 8, 5, 6))
    assert f"output of shape {shape} for an input of shape [2, 8, 5, 6]" in str(raised.value)


@pytest.mark.parametrize("shape", [[2, 4, 5, 6], [2, 5, 6, 8], [8, 5, 6], [2, 8]], ids=str)
@pytest.mark.parametrize("p", [0, 1])
def test_input_of_other_channels_or_dimensions(shape, p):
    with pytest.raises(ValueError, match="Attention Module of 8 channels takes maps of shape") as raised:
        AttentionModule(8, p=p)(torch.randn(shape))
    assert f"(batch, 8, height, width), got {shape}" in str(raised.value)


@pytest.mark.parametrize("args", [{}, {"mask_act": "channel"}, {"mask_act": "spatial", "learning": "naive"}], ids=str)
def test_gradcheck(args):
    module = with_weights(AttentionModule(2, t=1, bottle_ratio=0.5, **args))
    names = [name for name, _ in module.named_parameters()]

    def forward(x, *parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters)), (x,))

    x = image(1, 2, 3, 2).requires_grad_()
    assert torch.autograd.gradcheck(forward, (x, *module.parameters()), fast_mode=bool(args))


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_every_size_down_to_one_pixel_at_the_bottom(depth):
    module = AttentionModule(4, mask_depth=depth).eval()
    bottoms = []
    module.mask.bottom.register_forward_hook(lambda _module, _args, y: bottoms.append(tuple(y.shape[-2:])))
    least = 2 ** (depth - 1) + 1
    for size in [(least, least), (least, 31), (30, least + 1), (17, 23), (32, 16)]:
        assert module(torch.randn(1, 4, *size)).shape == (1, 4, *size)
        assert bottoms[-1] == tuple(-(-n // 2 ** depth) for n in size)
    assert bottoms[0] == (1, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["mixed", "channel", "spatial"])
def test_mask_activations_in_half_precision(kind, dtype):
    x = torch.randn(2, 8, 5, 4) * torch.tensor([300.0, 0.0])[:, None, None, None]  # squares beyond float16, and none
    mask = MaskActivation(kind)(x.to(dtype))
    assert mask.dtype is dtype
    assert_close(mask.float(), MaskActivation(kind)(x.to(dtype).float()), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("args", [
    {"mask_depth": 3}, {"mask": "local"}, {"mask_act": "channel"}, {"mask_act": "spatial", "learning": "naive"},
], ids=str)
# The devices differ in what they cast.
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_autocast_keeps_all_maps_in_its_type(args, device):
    module = AttentionModule(8, **args, device=device)
    types = set()
    for child in module.modules():
        child.register_forward_hook(lambda module, inputs, output: types.add(output.dtype))
    with torch.autocast(device, torch.bfloat16):
        module(torch.randn(2, 8, 9, 8, dtype=torch.bfloat16, device=device)).float().sum().backward()
    assert types == {torch.bfloat16}


@pytest.mark.parametrize(("depth", "size"), [
    (1, (1, 8)), (1, (1, 1)), (2, (8, 2)), (3, (4, 4)), (4, (8, 64)), (2, (0, 7))])
@pytest.mark.parametrize("training", [False, True])
def test_a_map_too_small_for_the_mask_depth(depth, size, training):
    module = AttentionModule(4, mask_depth=depth).train(training)
    with pytest.raises(ValueError, match=rf"mask_depth={depth} .* got {size[0]}x{size[1]}"):
        module(torch.randn(1, 4, *size))
    local = AttentionModule(4, mask="local").eval()
    if size[0]:
        assert local(torch.randn(1, 4, *size)).shape == (1, 4, *size)
    else:
        with pytest.raises(ValueError, match="a local mask branch needs a map of at least 1x1, got 0x7"):
            local(torch.randn(1, 4, *size))


@pytest.mark.parametrize("args", [
    {"act_layer": "silu"}, {"act_layer": nn.GELU}, {"norm_layer": "groupnorm1"}, {"norm_layer": "layernorm2d"},
    {"norm_layer": functools.partial(nn.BatchNorm2d, eps=1e-3)}, {"bottle_ratio": 1}, {"drop_path": 0.5},
], ids=str)
def test_act_norm_and_unit_arguments(args):
    module = AttentionModule(8, mask_depth=2, **args)
    x = torch.randn(2, 8, 6, 7, requires_grad=True)
    module(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters() if p.requires_grad)
    norm, act = module.mask.down[0][1].norm2, args.get("act_layer", nn.ReLU)
    names = {"groupnorm1": "GroupNorm1Act", "layernorm2d": "LayerNormAct2d"}
    assert type(norm).__name__ == names.get(args.get("norm_layer"), "BatchNormAct2d")
    if "norm_layer" not in args or isinstance(args["norm_layer"], functools.partial):
        assert norm.eps == (1e-3 if "norm_layer" in args else 1e-5)
    assert type(norm.act).__name__.lower() == (act if isinstance(act, str) else act.__name__).lower()


def test_stochastic_depth_only_in_training():
    unit = ResidualUnit(4, drop_path=0.5).double()
    x = image(64, 4, 3, 3)
    kept = (unit(x) - x).flatten(1).any(1)
    assert 10 < kept.sum() < 54  # of 64; outside with a probability below 1e-7
    unit.eval()
    exact(unit(x), Formula(unit.state_dict()).unit("", x))


@pytest.mark.parametrize(("name", "args"), [
    ("gernet_s", {"attn_layer": AttentionModule}), ("ese_vovnet19b_slim", {"attn": AttentionModule}),
    ("nfnet_f0", {"attn_layer": AttentionModule, "attn_kwargs": {}})])
def test_drop_in_for_other_networks_of_timm(name, args):
    with torch.device("meta"):
        model = timm.create_model(name, **args)
        assert any(isinstance(module, AttentionModule) for module in model.modules())
        assert model(torch.empty(2, 3, 224, 224)).shape == (2, 1000)


def test_drop_in_for_timm():
    model = timm.create_model("resnet26", block_args=dict(attn_layer=AttentionModule), num_classes=3)
    blocks = [block for stage in (model.layer1, model.layer2, model.layer3, model.layer4) for block in stage]
    assert [type(block.se) for block in blocks] == [AttentionModule] * 8
    # timm starts the norm before the module at zero: the first step moves it, through the module.
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.01), []
    x = torch.randn(4, 3, 64, 64)
    for _ in range(4):
        losses.append(F.cross_entropy(model(x), torch.tensor([0, 2, 1, 2])))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(block.bn3.weight.any() for block in blocks)
    assert losses[3] < losses[1] < losses[0]


def test_units_begin_as_their_shortcut_where_timm_asks_them_to():
    for unit in (ResidualUnit(8), ResNeXtUnit(8, groups=2)):
        unit.zero_init_last()
        x = torch.randn(2, 8, 5, 5).relu()
        assert torch.equal(unit(x), x)


def test_inside_a_sequential():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), AttentionModule(8), ResidualUnitDown(8, 16), AttentionModule(16, p=0))
    assert model(torch.randn(2, 3, 13, 16)).shape == (2, 16, 6, 7)


@pytest.mark.parametrize("args", [{"mask_depth": 2}, {"mask": "local"}], ids=str)
def test_copies(args):
    module = with_weights(AttentionModule(4, **args))
    x = image(1, 4, 5, 6)
    expected = module(x)
    copied = copy.deepcopy(module)
    loaded = with_weights(AttentionModule(4, **args))
    nn.init.zeros_(loaded.mask.head.conv2.weight)
    loaded.load_state_dict(load(save(module.state_dict())))
    nn.init.zeros_(module.mask.head.conv2.weight)
    assert not torch.equal(module(x), expected)
    assert torch.equal(copied(x), expected)
    assert torch.equal(loaded(x), expected)


@pytest.mark.parametrize("layer", [
    AttentionModule, SoftMaskBranch, LocalMaskBranch, ResidualUnit, ResidualUnitDown,
    functools.partial(ResNeXtUnit, groups=1), functools.partial(AttentionModule, mask="local", norm_layer="groupnorm1"),
    functools.partial(AttentionModule, act_layer="prelu"), functools.partial(ResNeXtUnit, groups=1, act_layer="prelu"),
])
def test_device_and_dtype(layer):
    module = layer(8, device="meta", dtype=torch.float64)
    tensors = [tensor for name, tensor in module.state_dict().items() if not name.endswith("num_batches_tracked")]
    assert {(tensor.device.type, tensor.dtype) for tensor in tensors} == {("meta", torch.float64)}


def test_the_mask_of_the_last_forward():
    module = with_weights(AttentionModule(8, mask_depth=2))
    x = image(1, 8, 6, 5)
    masks = []
    module.mask.register_forward_hook(lambda _module, _args, mask: masks.append(mask))
    module(x)
    exact(masks[0], Formula(module.state_dict()).soft_mask("mask.", module.pre(x), mask_depth=2))
    kept = [value for m in module.modules() for value in vars(m).values() if isinstance(value, torch.Tensor)]
    assert not kept  # the module itself holds on to nothing


@pytest.mark.cuda
@pytest.mark.parametrize("args", [{"mask_depth": 3}, {"mask": "local"}, {"mask_act": "channel"}], ids=str)
def test_cuda_equals_cpu(args):
    module = with_weights(AttentionModule(8, **args))
    x = image(2, 8, 17, 9)
    expected = module(x)
    exact(module.cuda()(x.cuda()).cpu(), expected)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert module.float()(x.float().cuda()).isfinite().all()


@pytest.mark.parametrize("layer", [AttentionModule, SoftMaskBranch, LocalMaskBranch])
def test_type_checkers_take_a_layer_for_what_it_is(layer):
    """The mixin's ``__new__`` comes before ``__init__``: with a type of its own they would take each layer for that."""
    hints = typing.get_type_hints(layer.__new__)
    assert hints["return"] is typing.get_args(hints["cls"])[0]
    assert isinstance(hints["return"], typing.TypeVar)
