"""Arguments of the networks: wrong ones get one error that names them, and those of a variant are replaced singly."""
import numpy as np
import pytest
import timm
import torch
import torch.nn as nn

import ran_layers  # noqa: F401  (registers the networks with timm)
from ran_layers import ResidualUnit


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
    assert model.num_classes == model.head.fc.out_features == 10


def test_numbers_of_numpy_and_units_with_linear_layers():
    class Unit(ResidualUnit):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.extra = nn.Linear(2, 2, bias=False)

    model = timm.create_model(
        "ran_att56_cifar", num_classes=np.int64(3), drop_path_rate=np.float32(0.1), unit_layer=Unit)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)


@pytest.mark.parametrize(("kwargs", "error", "message"), [
    ({"modules": (-1, 1, 1, 0)}, ValueError, r"modules\[0\] must be at least 0, got -1"),
    ({"modules": (1, 1.5, 1, 0)}, TypeError, r"modules\[1\] must be an int"),
    ({"mask_depths": (3, 2, 0, 1)}, ValueError, r"mask_depths\[2\] must be at least 1, got 0")])
def test_counts_of_a_stage_are_checked(kwargs, error, message):
    with pytest.raises(error, match=message):
        timm.create_model("ran_att56_cifar", **kwargs)


def test_arguments_of_a_variant_are_replaced_one_by_one():
    def size(**kwargs):
        with torch.device("meta"):
            return sum(p.numel() for p in timm.create_model("ran_att452_cifar_orig", **kwargs).parameters())

    assert size(attention_args={"learning": "naive"}) == size(attention_args={}) == size(attention_args=None) == size()
    assert size(attention_args={"r": 1}) < size()
    assert len(timm.create_model("resnet18_cifar", layers=(1, 1, 1, 1)).layer1) == 1
