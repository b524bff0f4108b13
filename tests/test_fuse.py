"""Fused networks compute what the networks compute, without their normalisations."""
import importlib.util
import json
import types
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.nn.utils.prune as prune
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d, StdConv2d, freeze_batch_norm_2d
from torchvision.ops import FrozenBatchNorm2d

import ran_layers
from ran_layers import insert_attention
from ran_layers.fusion import ClampAct

ROOT = Path(__file__).parents[1]


def randomize_norms(model: nn.Module) -> nn.Module:
    """Give each BN the statistics and weights of a trained network: scales of both signs, none and next to none."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            with torch.no_grad():
                module.weight[:5] = torch.tensor([0.0, 0.0, 0.0, 1e-12, -1e-30])
                module.bias[:4] = torch.tensor([0.4, -0.4, 0.0, -0.4])
    return model.eval()


def count(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


# network, side of its input, BN before and after, clamps after
@pytest.mark.parametrize(("name", "size", "before", "after", "clamps"), [
    ("ran_att56_cifar", 32, 106, 1, 36),
    ("ran_att56_cifar_orig", 24, 106, 1, 36),
    ("plain_cnn8_cifar", 32, 7, 0, 0),
    ("resnet18", 32, 20, 0, 0),
    ("efficientnet_lite0", 32, 49, 0, 0),
    ("resnetv2_50", 32, 49, 1, 16),
])
def test_outputs_stay_and_norms_go(name: str, size: int, before: int, after: int, clamps: int) -> None:
    model = randomize_norms(timm.create_model(name))
    fused = ran_layers.fuse(model)
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = model(images)
        assert (fused(images) - expected).abs().max() < 1e-4
        assert (fused(images.to(memory_format=torch.channels_last)) - expected).abs().max() < 1e-4
        assert (fused.forward_features(images) - model.forward_features(images)).abs().max() < 1e-4
        levels = [network.forward_intermediates(images, intermediates_only=True) for network in (fused, model)]
        assert max((level - wanted).abs().max() / wanted.abs().max() for level, wanted in zip(*levels)) < 1e-4
    assert (count(model, nn.BatchNorm2d), count(fused, nn.BatchNorm2d), count(fused, ClampAct)) == (
        before, after, clamps)
    assert type(fused) is type(model)


@pytest.mark.parametrize("args", [
    {"mask": "local"}, {"learning": "naive"}, {"mask_act": "channel"}, {"mask_act": "spatial"},
    {"p": 2, "t": 1, "r": 2}, {"act_layer": "silu"}, {"norm_layer": "groupnorm1"},
    {"unit_layer": ran_layers.ResNeXtUnit},
], ids=str)
def test_every_form_of_the_module(args: dict[str, object]) -> None:
    module = randomize_norms(ran_layers.AttentionModule(64, mask_depth=2, **args))
    fused = ran_layers.fuse(module)
    x = torch.randn(2, 64, 7, 10)
    with torch.no_grad():
        assert (fused(x) - module(x)).abs().max() < 1e-4
    if "act_layer" in args:  # without a ReLU there is nothing that a clamp could stand for
        assert count(fused, ClampAct) == 0
        assert 0 < count(fused, nn.BatchNorm2d) < count(module, nn.BatchNorm2d)
    elif "norm_layer" not in args:
        assert count(fused, nn.BatchNorm2d) == 0


@pytest.mark.parametrize(("name", "kind", "before", "after"), [
    ("ran_att56_cifar", FrozenBatchNormAct2d, 106, 1), ("resnet18", FrozenBatchNorm2d, 20, 0)])
def test_frozen_norms_are_folded_too(name: str, kind: type[nn.Module], before: int, after: int) -> None:
    model = freeze_batch_norm_2d(randomize_norms(timm.create_model(name)))
    images = torch.randn(2, 3, 32, 32)
    fused = ran_layers.fuse(model)
    assert (count(model, kind), count(fused, kind)) == (before, after)
    with torch.no_grad():
        assert (fused(images) - model(images)).abs().max() < 1e-4


def test_inserted_modules_are_folded_too() -> None:
    overlay = {"input_size": (3, 64, 64)}
    model = timm.create_model("resnet18", pretrained_cfg_overlay=overlay)
    insert_attention(model, ["layer1", "layer2.0", "bn1", "layer2.1.conv1"])
    randomize_norms(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(0.5)
        images = torch.randn(1, 3, 64, 64)
        assert (ran_layers.fuse(model)(images) - model(images)).abs().max() < 1e-4


class Levels(nn.Module):
    """Feature levels that end in a convolution, or in a normalisation, and a stage somebody listens to."""

    feature_info = (dict(module="first"), dict(module="second"))

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3))
        self.norm1 = nn.BatchNorm2d(8)
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3), BatchNormAct2d(8), nn.Conv2d(8, 8, 3), BatchNormAct2d(8))
        self.third = nn.Sequential(nn.Conv2d(8, 8, 1))
        self.norm3 = nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm3(self.third(self.second(self.norm1(self.first(x)))))


def test_feature_levels_stay() -> None:
    model = randomize_norms(Levels())
    heard: dict[str, torch.Tensor] = {}
    model.third.register_forward_hook(lambda module, args, output: heard.update(third=output))
    fused = ran_layers.fuse(model)
    assert count(fused, nn.BatchNorm2d) == 2  # of four: those inside the second level are folded
    x = torch.randn(1, 3, 12, 12)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x))
        expected = heard["third"]
        fused(x)
        torch.testing.assert_close(heard["third"], expected)
        torch.testing.assert_close(fused.first(x), model.first(x))


def test_a_compiled_network_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model must be fused before it is compiled: torch.compile\(fuse\(model\)\)"):
        ran_layers.fuse(torch.compile(nn.Sequential(nn.Conv2d(3, 8, 1))))


class Awkward(nn.Module):
    """Everything that looks as if it could be folded and must not be."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Conv2d(6, 6, 1)  # called twice, one BN behind it
        self.norm1 = nn.BatchNorm2d(6)
        self.split = nn.Conv2d(6, 6, 1)  # its output goes elsewhere too
        self.norm2 = nn.BatchNorm2d(6)
        self.standardized = StdConv2d(6, 6, 1)  # computes its weights itself
        self.norm3 = nn.BatchNorm2d(6)
        self.preact = BatchNormAct2d(6)  # before a padded convolution, whose border is not BN's shift but zero
        self.padded = nn.Conv2d(6, 6, 1, padding=1)
        self.norm4 = nn.BatchNorm2d(6, track_running_stats=False)
        self.hooked = nn.Conv2d(6, 6, 1)
        self.hooked.register_forward_hook(double)
        self.norm5 = nn.BatchNorm2d(6)
        self.renamed, self.norm6 = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)  # both have a second name
        self.body = nn.Sequential(self.renamed, self.norm6)
        self.lent, self.norm7 = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)  # the weights go elsewhere too
        self.plain, self.norm8 = nn.Conv2d(6, 6, 1), _Doubled(6)  # computes more than a BN
        self.wrapped, self.norm9 = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
        self.wrapped.forward = types.MethodType(_halved, self.wrapped)
        self.tied, self.other, self.norm10 = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
        self.other.weight = self.tied.weight  # read under the second name
        self.last = nn.Conv2d(6, 6, 1)
        self.inner = nn.Sequential(nn.BatchNorm2d(6))
        self.inner.register_forward_pre_hook(lambda module, args: (args[0].clamp(min=0),))  # sees the folded map
        self.heard = BatchNormAct2d(6)
        self.heard.act.register_forward_hook(double)
        self.after = nn.Conv2d(6, 6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm1(self.shared(self.shared(x)))
        y = self.split(x)
        x = self.norm3(self.standardized(y + self.norm2(y)))
        x = self.norm4(self.padded(self.preact(x)))
        x = self.body(self.norm5(self.hooked(x)))
        x = self.norm7(self.lent(x)) + F.conv2d(x, self.lent.weight) + self.lent.bias.sum()
        x = self.norm9(self.wrapped(self.norm8(self.plain(x))))
        x = self.norm10(self.tied(x)) + F.conv2d(x, self.other.weight)
        return self.after(self.heard(self.inner(self.last(x))))


class _Doubled(BatchNormAct2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def _halved(self: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    return nn.Conv2d.forward(self, x).relu() / 2


def double(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
    return 2 * output + 1


def test_what_does_not_fit_stays_as_it_is() -> None:
    model = Awkward()
    model.train()
    for _ in range(3):  # statistics of its own, from data
        model(torch.randn(4, 6, 5, 5))
    model.eval()
    fused, x = ran_layers.fuse(model), torch.randn(2, 6, 5, 5)
    with torch.no_grad():
        assert (fused(x) - model(x)).abs().max() < 1e-4
    assert count(fused, nn.BatchNorm2d) == count(model, nn.BatchNorm2d) == 13


def test_copy_or_in_place() -> None:
    model = ran_layers.AttentionModule(16)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    fused = ran_layers.fuse(model)
    assert model.training
    assert not any(module.training for module in fused.modules())
    assert fused.pre[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in weights.items())
    assert ran_layers.fuse(model, inplace=True) is model
    assert model.state_dict().keys() == fused.state_dict().keys()


def test_checkpointed_and_bfloat16_networks() -> None:
    model = randomize_norms(timm.create_model("ran_att56_cifar"))
    model.set_grad_checkpointing()
    fused, images = ran_layers.fuse(model), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
        assert (fused(images) - expected).abs().max() < 1e-4
        low = fused.to(torch.bfloat16)(images.bfloat16()).float()
    assert (low - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("norms", [torch.bfloat16, torch.float32])
def test_networks_cast_before_they_are_fused(norms: torch.dtype) -> None:
    model, images = randomize_norms(timm.create_model("ran_att56_cifar")), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
        model.to(torch.bfloat16)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.to(norms)
        low = ran_layers.fuse(model)(images.bfloat16())
    assert low.dtype == torch.bfloat16
    assert (low.float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_weights_that_a_layer_of_ones_own_reads_keep_their_order() -> None:
    class WeightStandardized(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            deviation = self.weight.view(self.out_channels, -1).std(1).view(-1, 1, 1, 1)
            return F.conv2d(x, self.weight / (deviation + 1e-5), self.bias)

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.conv2d(x, self.conv.weight.view(64, 9).softmax(1).view(8, 8, 3, 3))

    model = nn.Sequential(WeightStandardized(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), Around()).eval()
    fused, images = ran_layers.fuse(model), torch.randn(2, 3, 9, 9)
    assert (fused(images) - model(images)).abs().max() < 1e-5
    assert fused[2].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_pruned_network_cannot_be_copied_and_is_fused_itself() -> None:
    model = randomize_norms(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)))
    prune.l1_unstructured(model[0], "weight", 0.5)
    x = torch.randn(1, 3, 4, 4)
    expected = model(x)
    with pytest.raises(ValueError, match=r"be fused with inplace=True; Sequential fails with: Only Tensors created"):
        ran_layers.fuse(model)
    assert count(model, nn.BatchNorm2d) == 2
    torch.testing.assert_close(ran_layers.fuse(model, inplace=True)(x), expected)
    assert count(model, nn.BatchNorm2d) == 1  # behind the pruned convolution, whose weight is made in each forward


def test_errors_say_what_is_wrong() -> None:
    class Untraceable(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    model = nn.Sequential(Untraceable(), nn.BatchNorm2d(1).eval())
    for inplace in (False, True):
        with pytest.raises(ValueError, match=r"forward pass that torch.fx can trace; Sequential has not"):
            ran_layers.fuse(model, inplace=inplace)
        assert [module.training for module in model.modules()] == [True, True, False]
    class Checkpointed(Untraceable):
        recompute = True

        def set_grad_checkpointing(self, enable: bool) -> None:
            self.recompute = enable

    with pytest.raises(ValueError, match="Checkpointed has not"):
        ran_layers.fuse(model := Checkpointed(), inplace=True)
    assert model.recompute
    with pytest.raises(TypeError, match=r"model must be an nn.Module, got 'resnet18'"):
        ran_layers.fuse("resnet18")
    with pytest.raises(ValueError, match=r"must not be wrapped in DataParallel: fuse\(model.module\)"):
        ran_layers.fuse(nn.DataParallel(nn.Conv2d(3, 3, 1)))


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    spec = importlib.util.spec_from_file_location("benchmark_fuse", ROOT / "benchmarks" / "fuse.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_benchmark_names_what_it_cannot_use(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for args, message in (
            (["--models", "resnet0"], "error: --models resnet0 is not a timm model"),
            (["--device", "abacus"], "error: --device abacus is not available here"),
            (["--rounds", "0"], "argument --rounds: must be at least 1, got 0")):
        with pytest.raises(SystemExit) as exit_info:
            benchmark.main(args)
        assert exit_info.value.code == 2
        assert message in capsys.readouterr().err


def test_benchmark_measures_and_writes(benchmark: Any, tmp_path: Path) -> None:
    out = tmp_path / "results"
    benchmark.main([
        "--models", "plain_cnn8_cifar", "--batch-sizes", "2", "--rounds", "2", "--device", "cpu", "--out", str(out)])
    report = json.loads((out / "fuse.json").read_text())
    assert report["hardware"]["device"] == "cpu"
    assert report["command"] == (
        "python benchmarks/fuse.py --models plain_cnn8_cifar --batch-sizes 2 --rounds 2 --device cpu")
    result, = report["results"]
    assert result["largest_difference"] < 1e-4
    assert result["speedup"]["plain"] == 1
    assert all(value > 0 for value in result["milliseconds"].values())


def test_committed_figures_reach_the_aim() -> None:
    report = json.loads((ROOT / "benchmarks" / "results" / "fuse.json").read_text())
    assert {result["batch_size"] for result in report["results"]} >= {1, 64}
    for result in report["results"]:
        assert result["largest_difference"] < 1e-4, result
        assert result["speedup"]["folded, channels last (fuse)"] >= 1.3, result


class _OptionalSum(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x, other=None):
        x = self.conv(x)
        return self.bn(x) + x if other is None else self.bn(x) + other


def test_an_argument_left_out_has_its_default():
    net = _OptionalSum().eval()
    nn.init.uniform_(net.bn.running_mean, 1, 2)
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(ran_layers.fuse(net)(x), net(x), rtol=1e-4, atol=1e-4)


def test_volumes_are_left_as_they_are():
    net = nn.Sequential(nn.Conv3d(3, 8, 3), nn.BatchNorm3d(8)).eval()
    x = torch.randn(1, 3, 5, 5, 5)
    torch.testing.assert_close(ran_layers.fuse(net)(x), net(x))


def test_what_is_frozen_stays_frozen():
    model = timm.create_model("ran_att56_cifar")
    model.stages[0].requires_grad_(False)
    fused = ran_layers.fuse(model)
    assert not any(param.requires_grad for param in fused.stages[0].parameters())
    assert all(param.requires_grad for param in fused.stages[2].parameters())
