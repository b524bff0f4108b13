"""ResNet-18 for CIFAR, the baseline: timm's network behind another stem."""
import pytest
import timm
import torch

import ran_layers  # noqa: F401  (registers the networks)


def test_size_is_that_of_the_usual_cifar_resnet18():
    model = timm.create_model("resnet18_cifar", num_classes=10, device="meta")
    assert sum(p.numel() for p in model.parameters()) == 11_173_962


def test_feature_maps_are_as_large_as_they_say():
    model = timm.create_model("resnet18_cifar", features_only=True, in_chans=1)
    maps = model(torch.randn(1, 1, 32, 48))
    assert model.feature_info.reduction() == [1, 1, 2, 4, 8]
    for feature, channels, reduction in zip(maps, model.feature_info.channels(), model.feature_info.reduction()):
        assert feature.shape == (1, channels, 32 // reduction, 48 // reduction)


def test_configuration_and_classifier():
    model = timm.create_model("resnet18_cifar.cifar100")
    assert model.num_classes == 100
    assert model.pretrained_cfg["input_size"] == (3, 32, 32)
    assert dict(model.named_modules())[model.pretrained_cfg["first_conv"]].weight.shape == (64, 3, 3, 3)
    model.reset_classifier(0, "")
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 512, 4, 4)


@pytest.mark.parametrize("stride", [2, 4, 8])
def test_the_output_stride_is_the_one_asked_for(stride):
    model = timm.create_model("resnet18_cifar", output_stride=stride)
    assert model.forward_features(torch.randn(1, 3, 64, 64)).shape == (1, 512, 64 // stride, 64 // stride)
    assert model.feature_info[-1]["reduction"] == stride


def test_an_output_stride_that_it_cannot_have():
    with pytest.raises(ValueError, match="output_stride must be 2, 4 or 8, got 32"):
        timm.create_model("resnet18_cifar", output_stride=32)
    with pytest.raises(TypeError, match=r"output_stride must be an int of at least 2, got 2\.0"):
        timm.create_model("resnet18_cifar", output_stride=2.0)
