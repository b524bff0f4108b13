"""Arguments of the networks: wrong ones get one error that names them, and those of a variant are replaced singly."""
import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from timm.models import generate_default_cfgs

import ran_layers  # noqa: F401  (registers the networks with timm)
from ran_layers import AttentionModule, ResidualUnit, ResNeXtUnit
from ran_layers.models import _cifar


@pytest.mark.parametrize(("args", "error", "message"), [
    ({"num_classes": -1}, ValueError, "num_classes must be at least 0, got -1"),
    ({"in_chans": "3"}, TypeError, "in_chans must be an int of at least 1, got '3'"),
    ({"drop_rate": 2.0}, ValueError, r"drop_rate must be in \[0, 1\), got 2.0"),
    ({"drop_path_rate": 1.0}, ValueError, r"drop_path_rate must be in \[0, 1\), got 1.0"),
    ({"stem_type": "5x5"}, ValueError, "stem_type must be '7x7', '3x3' or '3x3s2', got '5x5'"),
    ({"modules": (1, 1)}, ValueError, "must have one entry per stage"),
    ({"unit_layer": 1}, TypeError, r"unit_layer must be a layer class, got 1 \(int\)"),
    ({"attention_args": {"t": -1}}, ValueError, "t must be at least 0, got -1"),
    ({"attention_args": {"trunk": nn.Identity()}}, ValueError, "trunk is one module and cannot be in 3 places"),
    ({"stem_chs": 0}, ValueError, "stem_chs must be at least 1, got 0"),
    ({"stem_chs": "64"}, TypeError, "stem_chs must be an int of at least 1, got '64'"),
    ({"device": "gpu9"}, ValueError, "device must be a torch.device, its name"),
    ({"channels": (), "modules": (), "closing_units": (), "mask_depths": ()}, ValueError, "channels must have at"),
    ({"channels": 64}, TypeError, r"channels must be a sequence with an int for each stage, got 64 \(int\)"),
    ({"modules": 2}, TypeError, r"modules must be a sequence with an int for each stage, got 2 \(int\)"),
    ({"mask_depths": "3211"}, TypeError, r"mask_depths must be a sequence with an int for each stage, got '3211'"),
    ({"global_pool": "mean"}, ValueError, "global_pool must be one of 'avg', 'max', .* got 'mean'"),
    ({"attention_args": 5}, TypeError, r"attention_args must be a dictionary or None, got 5 \(int\)"),
    ({"attention_args": {"channels": 3}}, ValueError, "attention_args must not hold channels"),
    ({"attention_args": {"dtype": torch.float16}}, ValueError, "attention_args must not hold dtype, which is the netw"),
    ({"attention_args": {"skips": 3}}, ValueError, "skips must be at most mask_depth - 1 = 2, got 3"),
    ({"attention_args": {"skips": 2, "mask_depth": 2}}, ValueError, "skips must be at most mask_depth - 1 = 1, got 2"),
    ({"attention_args": {"skips": True}}, TypeError, r"skips must be an int of at least 0, got True \(bool\)"),
    ({"attention_args": {"mask_depth": "2"}}, TypeError, "mask_depth must be an int of at least 1, got '2'"),
    ({"unit_layer": lambda channels, **kwargs: nn.Identity()}, TypeError,
     "unit_layer must be called with in_channels, out_channels, stride and drop_path, act_layer"),
    ({"global_pool": ""}, ValueError, "global_pool must not be '' for a classifier; give num_classes=0 with it"),
])
def test_wrong_arguments(args, error, message):
    with pytest.raises(error, match=message):
        timm.create_model("ran_att56_cifar", **args)


@pytest.mark.parametrize(("name", "kwargs", "error", "message"), [
    ("plain_cnn8_cifar", {"depths": (2, 0, 2, 1)}, ValueError, r"depths\[1\] must be at least 1, got 0"),
    ("plain_cnn8_cifar", {"channels": (0, 64, 128, 256)}, ValueError, r"channels\[0\] must be at least 1, got 0"),
    ("plain_cnn8_cifar", {"depths": 2}, TypeError, "depths must be a sequence with an int for each stage, got 2"),
    ("plain_cnn8_cifar", {"dtype": torch.int32}, TypeError, "dtype must be a floating-point torch.dtype"),
    ("resnet18_cifar", {"stem_type": "deep"}, ValueError, "stem_type must be '', the 3x3 stem of this network, got 'd"),
    ("resnet18_cifar", {"replace_stem_pool": True}, ValueError, "replace_stem_pool must be False: the stem of this"),
])
def test_wrong_arguments_of_the_baselines(name, kwargs, error, message):
    with pytest.raises(error, match=message):
        timm.create_model(name, **kwargs)


def test_a_classifier_of_less_than_no_classes():
    model = timm.create_model("ran_att56_cifar")
    with pytest.raises(ValueError, match="num_classes must be at least 0, got -3"):
        model.reset_classifier(-3)
    with pytest.raises(ValueError, match=r"global_pool must be one of 'avg', 'max', .* got 'mean'"):
        model.reset_classifier(4, "mean")
    with pytest.raises(ValueError, match="global_pool must not be '' for a classifier"):
        model.reset_classifier(4, "")
    assert model.num_classes == model.head.fc.out_features == 10


@pytest.mark.parametrize("name", ["ran_att56_cifar", "plain_cnn8_cifar"])
def test_a_pooling_that_is_not_given_stays_as_in_timm(name):
    """timm's own tests of models take the pooling away, and then ask for a classifier on the meta device."""
    model = timm.create_model(name)
    model.reset_classifier(0, "")
    model.reset_classifier(2)
    assert model.get_classifier().out_features == 2
    assert model.head.global_pool.is_identity()
    model.reset_classifier(2, "avg")
    assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 2)


def test_numbers_of_numpy_and_units_with_linear_layers():
    class Unit(ResidualUnit):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.extra = nn.Linear(2, 2, bias=False)

    model = timm.create_model(
        "ran_att56_cifar", num_classes=np.int64(3), drop_path_rate=np.float32(0.1), unit_layer=Unit)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)


def test_counts_of_numpy_become_ints_that_compilers_know():
    sizes: dict = {
        "channels": (64, 128, 256, 512), "modules": (1, 1, 1, 0), "mask_depths": (3, 2, 1, 1)}
    sizes = {name: [np.int64(n) for n in ns] for name, ns in sizes.items()}
    model = timm.create_model(
        "ran_att56_cifar", stem_chs=np.int64(64), attention_args={"t": np.int64(2)}, **sizes)
    model.reset_classifier(np.int64(5))
    counts = [model.num_classes, model.head.fc.out_features, model.num_features]
    counts += [level["num_chs"] for level in model.feature_info]
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, AttentionModule)):
            names = ("channels", "mask_depth", "in_channels", "out_channels")
            counts += [value for name, value in vars(module).items() if name in names]
    assert {type(count) for count in counts} == {int}
    module = AttentionModule(np.int64(8), mask_depth=np.int32(2)).eval()
    x = torch.randn(1, 8, 9, 9)
    assert torch.equal(torch.compile(module, fullgraph=True, backend="eager")(x), module(x))


@pytest.mark.parametrize(("kwargs", "error", "message"), [
    ({"modules": (-1, 1, 1, 0)}, ValueError, r"modules\[0\] must be at least 0, got -1"),
    ({"modules": (1, 1.5, 1, 0)}, TypeError, r"modules\[1\] must be an int"),
    ({"mask_depths": (3, 2, 0, 1)}, ValueError, r"mask_depths\[2\] must be at least 1, got 0")])
def test_counts_of_a_stage_are_checked(kwargs, error, message):
    with pytest.raises(error, match=message):
        timm.create_model("ran_att56_cifar", **kwargs)


def test_arguments_of_a_variant_are_replaced_one_by_one():
    def size(**kwargs):
        return sum(p.numel() for p in timm.create_model("ran_att452_cifar_orig", **kwargs).parameters())

    default = size()
    assert size(attention_args={"learning": "naive"}) == size(attention_args={}) == size(attention_args=None) == default
    assert size(attention_args={"r": 1}) < default
    assert len(timm.create_model("resnet18_cifar", layers=(1, 1, 1, 1)).layer1) == 1


@pytest.mark.parametrize(("skips", "expected"), [(None, [2, 1, 0]), (1, [1, 1, 0]), (np.int64(0), [0, 0, 0])])
def test_skips_as_far_as_a_stage_has_room(skips, expected):
    model = timm.create_model("ran_att56_cifar", attention_args={"skips": skips}, device="meta")
    masks = [module.mask for module in model.modules() if isinstance(module, AttentionModule)]
    assert [sum(step.skip is not None for step in mask.up) for mask in masks] == expected


def test_a_trunk_keeps_its_weights():
    trunk = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64))
    before = {name: tensor.fill_(3).clone() for name, tensor in trunk.state_dict().items()}
    model = timm.create_model("ran_att56_cifar", modules=(1, 0, 0, 0), attention_args={"trunk": trunk})
    torch.testing.assert_close(model.stages[0].blocks[1].trunk.state_dict(), before)
    model.init_weights()
    assert trunk[0].weight.std() > 0
    assert (trunk[0].bias == 0).all()


@pytest.mark.parametrize(("args", "norm"), [
    ({"unit_layer": ResNeXtUnit, "attention_args": {"unit_layer": ResidualUnit}}, True),
    ({"attention_args": {"unit_layer": ResNeXtUnit}}, False),
    ({"attention_args": {"unit_layer": ResNeXtUnit}, "closing_units": (0, 0, 0, 1)}, True),
])
def test_the_final_norm_is_that_of_the_last_unit(args, norm):
    args = {"modules": (1, 1, 1, 1), "closing_units": (0, 0, 0, 0), **args}
    model = timm.create_model("ran_att56_cifar", device="meta", **args)
    assert isinstance(model.norm, nn.Identity) is not norm


@pytest.mark.parametrize("stages", [3, 5])
def test_levels_of_other_numbers_of_stages(stages):
    x = torch.randn(1, 3, 32, 32)
    baseline = timm.create_model("plain_cnn8_cifar", channels=[8] * stages, depths=[1] * stages, features_only=True)
    assert [tuple(level.shape[1:]) for level in baseline(x)] == [(8, 32 >> i, 32 >> i) for i in range(stages)]


@pytest.mark.parametrize("shipped", [(), ("cifar100",), ("cifar10", "cifar100")])
def test_cifar10_is_the_default_whichever_weights_there_are(shipped, tmp_path, monkeypatch):
    (tmp_path / "weights").mkdir()
    for dataset in shipped:
        (tmp_path / "weights" / f"some_net.{dataset}.safetensors").touch()
    monkeypatch.setattr(_cifar, "files", lambda package: tmp_path)
    cfgs = generate_default_cfgs(_cifar.cifar_cfgs("some_net", dict))["some_net"]
    assert list(cfgs.tags) == ["cifar10", "cifar100"]
    assert {tag for tag, cfg in cfgs.cfgs.items() if cfg.has_weights} == set(shipped)
