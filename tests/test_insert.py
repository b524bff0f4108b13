"""Attention Modules in other people's networks: nothing changes at insertion, everything learns, all can be undone."""
import copy
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn
import torchvision
from timm.models.convnext import ConvNeXtBlock
from timm.models.inception_v4 import InceptionA

from ran_layers import AttentionModule, SoftMaskBranch, insert_attention, remove_attention
from ran_layers.insert import InsertedAttention


class HandWritten(nn.Module):
    """A network as somebody writes one at home: grey images of one size, a shared ReLU, a flattening classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 12, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 20, 3, stride=2, padding=1)
        self.relu = nn.ReLU()
        self.block = nn.Sequential(nn.Conv2d(20, 20, 3, padding=1), nn.ReLU())
        self.unused = nn.Conv2d(20, 20, 1)
        self.fc = nn.Linear(20 * 14 * 14, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.block(self.relu(self.conv2(x)))
        return self.fc(x.flatten(1))


def randomize_norms(model: nn.Module) -> nn.Module:
    """Give each normalisation the statistics and weights of a trained network rather than 0 and 1."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model


def with_size(name: str, size: int, **kwargs: object) -> nn.Module:
    """Return a timm network that states ``size`` as its image size: small images keep these tests fast."""
    return timm.create_model(name, pretrained_cfg_overlay={"input_size": (3, size, size)}, **kwargs)


# network, shape of its input, where, the hosts that are expected
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], object, list[str]]] = {
    "timm ResNet": (
        lambda: with_size("resnet18", 64), (1, 3, 64, 64), "stages", ["act1", "layer1", "layer2", "layer3", "layer4"]),
    "timm ResNet, by name": (lambda: with_size("resnet18", 64), (1, 3, 64, 64), "layer2.0", ["layer2.0"]),
    "timm ConvNeXt": (
        lambda: with_size("convnext_atto", 64), (1, 3, 64, 64), "stages", [f"stages.{i}" for i in range(4)]),
    "timm ConvNeXt, inner maps with channels last": (
        lambda: with_size("convnext_atto", 64, conv_mlp=False, ls_init_value=1.0), (1, 3, 64, 64),
        "stages.0.blocks.0.mlp", ["stages.0.blocks.0.mlp"]),
    "timm EfficientNet": (
        lambda: with_size("efficientnet_lite0", 64), (1, 3, 64, 64), "stages",
        ["blocks.0", "blocks.1", "blocks.2", "blocks.4", "blocks.6"]),
    "timm Swin, channels last": (
        lambda: with_size(
            "swin_tiny_patch4_window7_224", 64, img_size=64, window_size=2, depths=(1, 1, 1, 1), embed_dim=48),
        (1, 3, 64, 64), "stages",
        [f"layers.{i}" for i in range(4)]),
    "timm RAN": (
        lambda: timm.create_model("ran_att56_cifar"), (1, 3, 32, 32), "stages",
        ["stem.conv", "stages.0", "stages.1", "stages.2", "stages.3"]),
    "timm features_only": (
        lambda: with_size("convnext_atto", 64, features_only=True), (1, 3, 64, 64), "stages",
        [f"stages_{i}" for i in range(4)]),
    "torchvision ResNet": (torchvision.models.resnet18, (1, 3, 64, 64), ["layer3", "layer1"], ["layer1", "layer3"]),
    "hand-written": (
        HandWritten, (2, 1, 28, 28), lambda name, module: isinstance(module, nn.Conv2d) and module.stride == (2, 2),
        ["conv2"]),
    "hand-written, sequential": (HandWritten, (2, 1, 28, 28), ["bn1", "block"], ["bn1", "block"]),
}


def flat(result: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([y.flatten(1) for y in result], 1) if isinstance(result, list) else result


@pytest.mark.parametrize("case", NETWORKS)
def test_insertion_keeps_the_outputs_and_can_be_undone(case: str) -> None:
    create, shape, where, expected = NETWORKS[case]
    model = randomize_norms(create()).eval()
    x = torch.randn(shape)
    with torch.no_grad():
        before = flat(model(x))
    keys, modules = list(model.state_dict()), dict(model.named_modules())

    hosts = insert_attention(model, where, example_input=x[:1] if isinstance(model, HandWritten) else None)
    assert hosts == expected
    assert not any(module.training for module in model.modules())
    with torch.no_grad():
        assert (flat(model(x)) - before).abs().max() <= 1e-5
    new = [name for name, module in model.named_modules() if isinstance(module, InsertedAttention)]
    assert new == [f"{host}.inserted_attention" for host in hosts]
    assert [key for key in model.state_dict() if "inserted_attention" not in key] == keys
    # Each module is really in the path: its gate has an influence on the outputs.
    flat(model(x)).square().sum().backward()
    for host in hosts:
        assert model.get_submodule(host).inserted_attention.gamma.grad.abs().max() > 0, host

    assert remove_attention(model) == hosts
    assert list(model.state_dict()) == keys
    assert dict(model.named_modules()) == modules
    assert not any(module._forward_hooks for module in model.modules())
    with torch.no_grad():
        assert torch.equal(flat(model(x)), before)


def test_outputs_are_kept_in_training_too() -> None:
    model = randomize_norms(with_size("resnet18", 64))
    model.bn1.eval()  # a frozen part stays frozen
    x = torch.randn(4, 3, 64, 64)
    twin = copy.deepcopy(model)
    insert_attention(model, "stages")
    assert model.training
    assert not model.bn1.training
    assert model.layer1.inserted_attention.training
    assert (model(x) - twin(x)).abs().max() <= 1e-5
    assert torch.equal(model.layer4[1].bn2.running_mean, twin.layer4[1].bn2.running_mean)


def test_every_parameter_learns_from_the_second_step_on() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    insert_attention(model, ["0"], mask_depth=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, target = torch.randn(4, 3, 16, 16), torch.randn(4, 8, 14, 14)
    inserted = model[0].inserted_attention
    losses = []
    for step in range(6):
        loss = (model(x) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert bool((inserted.gamma.grad != 0).all()), step
        if step == 1:
            still = [name for name, p in inserted.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
            assert still == []
        optimizer.step()
    assert all(later < earlier for earlier, later in pairwise(losses))


def test_a_copy_runs_its_own_modules() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
    insert_attention(model, ["0"])
    twin, x = copy.deepcopy(model), torch.randn(1, 3, 8, 8)
    nn.init.ones_(model[0].inserted_attention.gamma)
    assert not torch.allclose(model(x), twin(x))
    assert remove_attention(twin) == ["0"]
    assert not twin[0]._forward_hooks
    assert len(model[0]._forward_hooks) == 1


def test_weights_move_both_ways() -> None:
    weights = with_size("resnet18", 32).state_dict()
    model = with_size("resnet18", 32)
    insert_attention(model, "layer1")
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert unexpected == []
    assert all(key.startswith("layer1.inserted_attention.") for key in missing)
    twin = with_size("resnet18", 32)
    insert_attention(twin, "layer1")
    twin.load_state_dict(model.state_dict())


def test_takes_dtype_image_channels_and_module_arguments() -> None:
    model = with_size("resnet18", 32, in_chans=5).to(torch.bfloat16)
    insert_attention(model, "layer1", mask="local", learning="naive", bottle_ratio=0.5)
    attention = model.layer1.inserted_attention.attention
    assert {p.dtype for p in attention.parameters()} == {torch.bfloat16}
    assert attention.pre[0].conv1.out_channels == 32
    assert not attention.residual
    assert model(torch.zeros(2, 5, 32, 32, dtype=torch.bfloat16)).shape == (2, 1000)


def test_layouts_of_maps_are_told_apart_by_the_image_aspect_ratio() -> None:
    class ChannelsLast(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.permute(0, 2, 3, 1)

    for size in ((6, 6), (6, 18), (18, 6)):
        model = nn.Sequential(nn.Conv2d(3, 7, 1), ChannelsLast())
        insert_attention(model, ["0", "1"], example_input=torch.zeros(1, 3, *size))
        assert not model[0].inserted_attention.nhwc
        assert model[1].inserted_attention.nhwc
        assert model[1].inserted_attention.gamma.shape == (7,)
        assert model(torch.zeros(2, 3, *size)).shape == (2, *size, 7)


def test_the_forms_of_where_in_the_documentation() -> None:
    page = (Path(__file__).parent.parent / "docs" / "insert.md").read_text()
    rows = re.search(r"\| `where` \| hosts \|\n.*\n((?:\|.*\n)+)", page)
    assert rows
    found = [
        insert_attention(with_size("resnet18", 64), eval(row.split("`")[1])) for row in rows[1].splitlines()]
    assert found == [
        ["layer2"], ["layer2", "layer3.0"], ["act1", "layer1", "layer2", "layer3", "layer4"],
        [f"layer{i}.{j}.conv2" for i in range(1, 5) for j in range(2)]]


@pytest.mark.parametrize(("name", "args"), [
    ("xception41", {}), ("resnet18", {"feature_cls": "hook"}), ("resnet18", {}), ("ran_att56_cifar", {})])
def test_levels_of_feature_extractors(name: str, args: dict[str, object]) -> None:
    model = timm.create_model(name, features_only=True, **args)
    hosts = insert_attention(model, "stages", example_input=torch.zeros(1, 3, 64, 64))
    assert len(hosts) == len(model.feature_info)


def test_what_was_on_the_meta_device_begins_as_the_identity() -> None:
    model = timm.create_model("resnet18", device="meta")
    insert_attention(model, "layer2")
    model = model.to_empty(device="cpu")
    inserted = model.layer2.inserted_attention
    nn.init.constant_(inserted.gamma, torch.nan)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert torch.equal(inserted.gamma, torch.zeros(128))


@pytest.mark.parametrize(("where", "args", "error", "message"), [
    ("layer5", {}, ValueError, r"where must name modules of ResNet, which has no 'layer5'; it has e.g. 'layer4'"),
    (lambda name, module: False, {}, ValueError, "where must find at least one module of ResNet"),
    ([], {}, ValueError, "where must find at least one module"),
    (nn.Sequential(nn.ReLU()), {}, TypeError, "where must be a module's name, .* got a Sequential"),
    (nn.Conv2d, {}, TypeError, "where must be a module's name, .* got <class 'torch.nn.modules.conv.Conv2d'>"),
    (3, {}, TypeError, "where must be a module's name, a list of names, 'stages' or a function .* got 3"),
    ("fc", {}, ValueError, r"'fc' \(Linear\) must return a feature map .* it returns \(1, 1000\)"),
    ("layer1", {"channels": 64}, TypeError, "module_args must not hold channels"),
    ("layer1", {"mask_dept": 2}, TypeError, "mask_dept"),
    ("layer4", {"mask_depth": 3}, ValueError, "'layer4' does not take its output of shape .* use a smaller mask_depth"),
    ("layer4", {"trunk": nn.Conv2d(8, 8, 1)}, ValueError, "'layer4' does not take its output of shape"),
    ("layer3", {"trunk": nn.Conv2d(256, 256, 1, stride=2)}, ValueError, "'layer3' does not take its output of shape"),
    ("layer3", {"p": 0, "trunk": nn.ReLU(inplace=True)}, ValueError, "'layer3' changes its input in place"),
    ("layer3", {"trunk": nn.Conv2d(256, 1, 1)}, ValueError, r"output of shape \[1, 1, 4, 4\] for an input of shape"),
    (["layer3", "layer4"], {"trunk": nn.Identity()}, ValueError, "trunk is one module and cannot be in 2 places"),
    ("layer1", {"example_input": torch.zeros(1, 1, 8, 8)}, ValueError,
     r"ResNet does not run on an input of shape \(1, 1, 8, 8\) .* pass one that it takes as example_input"),
])
def test_errors_name_the_cause_and_leave_the_network_alone(
        where: object, args: dict[str, object], error: type[Exception], message: str) -> None:
    model = with_size("resnet18", 64)
    keys = list(model.state_dict())
    with pytest.raises(error, match=message):
        insert_attention(model, where, **args)
    assert list(model.state_dict()) == keys
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_errors_of_unsuitable_hosts() -> None:
    image = torch.zeros(1, 1, 28, 28)
    with pytest.raises(ValueError, match=r"'relu' \(ReLU\) must be run once in a forward pass .* it is run 2 times"):
        insert_attention(HandWritten(), "relu", example_input=image)
    with pytest.raises(ValueError, match=r"'unused' .* run 0 times"):
        insert_attention(HandWritten(), "unused", example_input=image)
    with pytest.raises(ValueError, match="where='stages' needs a timm model with feature_info, which HandWritten has"):
        insert_attention(HandWritten(), "stages", example_input=image)
    with pytest.raises(ValueError, match=r"example_input must be images .* got a tensor of shape \(5,\)"):
        insert_attention(HandWritten(), "stages", example_input=torch.zeros(5))
    with pytest.raises(ValueError, match="pass one that it takes as example_input"):
        insert_attention(HandWritten(), "block")
    with pytest.raises(ValueError, match=r"'blocks.0' \(Block\) must return a feature map .* returns \(1, 17, 192\)"):
        insert_attention(with_size("vit_tiny_patch16_224", 64, img_size=64), "stages")
    with pytest.raises(ValueError, match=r"'features.denseblock1' is a container \(DenseBlock\)"):
        insert_attention(with_size("densenet121", 64), "features.denseblock1")
    model = HandWritten()
    insert_attention(model, "block", example_input=image)
    with pytest.raises(ValueError, match="'block' has an Attention Module already"):
        insert_attention(model, "block", example_input=image)


def test_any_trunk_convnext_and_inception() -> None:
    for trunk, channels in ((ConvNeXtBlock(48), 48), (InceptionA(), 384)):
        module = AttentionModule(channels, trunk=trunk, mask_depth=2)
        x = torch.randn(2, channels, 9, 13, requires_grad=True)
        y = module(x)
        assert y.shape == x.shape
        pre = module.pre(x)
        expected = module.post((1 + module.mask(pre)) * trunk(pre))
        assert torch.allclose(y, expected, atol=1e-5)
        y.sum().backward()
        assert all(p.grad is not None for p in module.parameters())

    # The branch alone, beside a trunk that somebody has already.
    trunk, mask = ConvNeXtBlock(48), SoftMaskBranch(48, mask_depth=3)
    x = torch.randn(2, 48, 12, 12)
    assert ((1 + mask(x)) * trunk(x)).shape == x.shape


class ChannelsLast(nn.Module):
    """Maps whose channels come last, as many as rows and columns."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.block = nn.Linear(8, 8)

    def forward(self, x):
        return self.block(self.stem(x).permute(0, 2, 3, 1)).mean((1, 2))


def test_as_many_channels_as_rows_and_columns():
    model = ChannelsLast().eval()
    image = torch.randn(1, 3, 32, 32)
    expected = model(image)
    insert_attention(model, "block", example_input=image)
    assert torch.equal(model(image), expected)
    assert model(torch.randn(1, 3, 48, 64)).shape == (1, 8)
    assert model.block.inserted_attention.nhwc

    model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU()).eval()
    insert_attention(model, "1", example_input=image)
    assert model(torch.randn(1, 3, 48, 64)).shape == (1, 8, 12, 16)


class RunsItsChildren(nn.Module):
    """A stage as RegNet's: what it runs is its children, whichever they are."""

    def __init__(self, after: Callable[[torch.Tensor], torch.Tensor] | None = None, *more: object) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3)
        self.after, self.more = after, more

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, child in enumerate(self.children()):
            x = child(x, *(self.more if i > 1 else ()))
        return x if self.after is None else self.after(x)


def double(x: torch.Tensor) -> torch.Tensor:
    return x.mul_(2)


@pytest.mark.parametrize(("make", "where"), [
    (lambda: nn.Sequential(RunsItsChildren()), "0"), (lambda: with_size("regnetx_002", 64), "stages")],
    ids=["own", "RegNet"])
def test_hosts_that_run_their_children_run_the_module_once(make: Callable[[], nn.Module], where: str) -> None:
    model = make().eval()
    image = torch.randn(1, 3, 64, 64)
    expected = model(image)
    hosts = insert_attention(model, where)
    calls: list[str] = []
    for name in hosts:
        model.get_submodule(name).inserted_attention.register_forward_hook(lambda *_, name=name: calls.append(name))
    assert torch.equal(model(image), expected)
    assert calls == hosts
    assert remove_attention(model) == hosts
    assert torch.equal(model(image), expected)


@pytest.mark.parametrize("args", [(torch.neg,), (double,), (torch.neg, "mask")], ids=["new", "in place", "arguments"])
def test_hosts_that_do_more_behind_their_children_are_refused(args: tuple[object, ...]) -> None:
    model = nn.Sequential(RunsItsChildren(*args))
    with pytest.raises(ValueError, match=r"'0' is a container \(RunsItsChildren\) that runs its children in its own"):
        insert_attention(model, "0")
    assert list(model[0]._modules) == ["conv1", "conv2"]


def test_lazy_layers_take_their_shape_from_a_real_image() -> None:
    model = nn.Sequential(nn.LazyConv2d(8, 3))
    with pytest.raises(ValueError, match=r"Sequential has lazy layers, .* run it once, or pass example_input"):
        insert_attention(model, "0")
    assert isinstance(model[0], nn.LazyConv2d)
    assert insert_attention(model, "0", example_input=torch.zeros(1, 2, 9, 9)) == ["0"]
    assert model[0].in_channels == 2


@pytest.mark.parametrize("host", ["layer3", "maxpool"])
def test_inference_mode_does_not_keep_a_module_from_training(host: str) -> None:
    model = with_size("resnet18", 64)
    model.maxpool = nn.Identity()
    with torch.inference_mode():
        insert_attention(model, host, example_input=torch.zeros(1, 3, 64, 64))
        insert_attention(nn.Sequential(nn.Identity()), "0", example_input=torch.zeros(1, 3, 64, 64))
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert model.get_submodule(host).inserted_attention.gamma.grad.abs().sum() > 0


def test_a_compiled_part_is_hosted_by_what_was_compiled() -> None:
    model = with_size("resnet18", 64).eval()
    model.layer3 = torch.compile(model.layer3, backend="eager")
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=r"'layer3' is the result of torch.compile; name 'layer3._orig_mod'"):
        insert_attention(model, "layer3")
    assert list(model.state_dict()) == keys
    image = torch.randn(1, 3, 64, 64)
    expected = model(image)
    assert insert_attention(model, "layer3._orig_mod") == ["layer3._orig_mod"]
    assert torch.allclose(model(image), expected, atol=1e-5)
    nn.init.ones_(model.layer3._orig_mod.inserted_attention.gamma)
    assert not torch.allclose(model(image), expected, atol=1e-5)
    assert remove_attention(model) == ["layer3._orig_mod"]
    assert torch.allclose(model(image), expected, atol=1e-5)


@pytest.mark.parametrize(("name", "level"), [("hrnet_w18_small", "stem"), ("tresnet_m", "")])
def test_levels_that_are_no_modules_are_named(name: str, level: str) -> None:
    with pytest.raises(ValueError, match=f"where='stages' needs feature levels that are outputs .* level '{level}'"):
        insert_attention(timm.create_model(name), "stages")


def test_what_is_no_network_and_no_image():
    with pytest.raises(TypeError, match=r"model must be an nn.Module, got 'resnet18' \(str\)"):
        insert_attention("resnet18", "layer1")
    with pytest.raises(TypeError, match="example_input must be a tensor or None, got str"):
        insert_attention(nn.Sequential(nn.Conv2d(3, 8, 1)), "0", example_input="x")


@pytest.mark.parametrize(("conv", "shape"), [
    (nn.Conv2d(1, 16, 3, (1, 4), 1), (1, 1, 64, 400)), (nn.Conv2d(3, 8, 5), (1, 3, 20, 40)),
    (nn.Conv2d(3, 32, 3, (1, 2), 1), (1, 3, 32, 32))])
def test_a_width_is_not_taken_for_the_channels(conv, shape):
    net = nn.Sequential(conv, nn.ReLU())
    insert_attention(net, "0", example_input=torch.zeros(shape))
    module = net[0].inserted_attention
    assert not module.nhwc
    assert module.gamma.shape == (conv.out_channels,)


def test_a_compiled_network_takes_notice() -> None:
    model, x = with_size("resnet18", 64).eval(), torch.randn(2, 3, 64, 64)
    compiled = torch.compile(model, backend="eager")
    before = compiled(x).detach()  # with gradients, as below: another graph is made for a forward without
    insert_attention(model, ["layer1.0"])  # no Sequential: its module is run by a hook
    compiled(x).sum().backward()
    assert model.layer1[0].inserted_attention.gamma.grad is not None
    nn.init.ones_(model.layer1[0].inserted_attention.gamma)
    assert not torch.equal(compiled(x).detach(), before)
    assert remove_attention(compiled) == ["layer1.0"]
    assert torch.equal(compiled(x).detach(), before)
    assert insert_attention(compiled, "stages") == ["act1", "layer1", "layer2", "layer3", "layer4"]


def test_a_network_that_ran_compiled_or_recomputes_its_activations() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval(), torch.zeros(1, 3, 16, 16)
    model.compile(backend="eager")
    with torch.no_grad():
        model(x)
    assert insert_attention(model, ["0", "1"], example_input=x) == ["0", "1"]

    model = with_size("resnet18", 64)
    model.set_grad_checkpointing()
    assert insert_attention(model, "layer2") == ["layer2"]
    assert model.grad_checkpointing
    nn.init.ones_(model.layer2.inserted_attention.gamma)
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(p.grad is not None for p in model.layer2.inserted_attention.parameters())


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_export_follows_what_was_inserted_and_script_does_not() -> None:
    model, x = with_size("resnet18", 64).eval(), torch.randn(2, 3, 64, 64)
    insert_attention(model, ["layer1", "layer2.0"])  # a Sequential, and one with a hook
    for host in (model.layer1, model.layer2[0]):
        nn.init.constant_(host.inserted_attention.gamma, 0.5)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))
    with pytest.raises(RuntimeError):
        torch.jit.script(model)


def test_a_network_wrapped_for_several_processes_is_refused() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Conv2d(3, 8, 3)))
        for change in (lambda: insert_attention(model, "module.0"), lambda: remove_attention(model)):
            with pytest.raises(ValueError, match="before DistributedDataParallel, which knows the parameters"):
                change()
    finally:
        torch.distributed.destroy_process_group()


def test_a_network_that_takes_pixels_into_channels_first() -> None:
    class Folding(nn.Sequential):
        in_chans = 3

    model = Folding(nn.PixelUnshuffle(4), nn.Conv2d(48, 8, 1), nn.ReLU())
    assert insert_attention(model, "2") == ["2"]


def test_autocast_changes_neither_outputs_nor_parameters() -> None:
    model, x = randomize_norms(timm.create_model("ran_att56_cifar")).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = model(x)
        insert_attention(model, ["stages.3.blocks.0"])
        inserted = model.stages[3].blocks[0].inserted_attention
        assert inserted(torch.randn(2, 512, 2, 2).bfloat16()).dtype is torch.bfloat16
        assert torch.equal(model(x), before)
    assert {parameter.dtype for parameter in inserted.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["xception41", "convnext_atto", "ran_att56_cifar"])
def test_levels_that_hooks_collect_have_their_modules_in_them(name: str) -> None:
    model = timm.create_model(name, features_only=True, feature_cls="hook")
    hosts = insert_attention(model, "stages", example_input=torch.zeros(1, 3, 64, 64))
    sum(feature.square().mean() for feature in model(torch.randn(2, 3, 64, 64))).backward()
    assert [host for host in hosts if model.get_submodule(host).inserted_attention.gamma.grad is None] == []


@pytest.mark.parametrize(("name", "host", "end"), [
    ("efficientnet_b0", "blocks", "blocks.6"), ("ran_att56_cifar", "stages", "stages.3")])
def test_a_sequence_of_all_levels_is_refused(name: str, host: str, end: str) -> None:
    model, x = timm.create_model(name).eval(), torch.randn(1, 3, 64, 64)
    with pytest.raises(ValueError, match=rf"'{host}' holds the feature levels {host}\..*; name its end, '{end}'"):
        insert_attention(model, [host])
    insert_attention(model, end)
    model.get_submodule(end).inserted_attention.gamma.data.fill_(1)
    assert torch.equal(model.forward_intermediates(x)[0], model.forward_features(x))


def test_hooks_that_change_the_output_come_after_the_module() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(16, 4, 1))
    model[0].register_forward_hook(lambda module, args, output: torch.cat([output, output], 1))
    insert_attention(model, "0", example_input=torch.zeros(1, 3, 16, 16))
    assert len(model[0].inserted_attention.gamma) == 8
    assert model(torch.randn(1, 3, 16, 16)).shape == (1, 4, 16, 16)
