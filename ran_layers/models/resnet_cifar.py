"""timm's ResNet-18 behind the stem that 32-px images call for: the usual baseline on CIFAR.

`Deep Residual Learning for Image Recognition` - https://arxiv.org/abs/1512.03385

timm's own `resnet18` starts with a 7x7 convolution and a pooling that reduce 32 pixels to 8 before the first unit.
"""
from typing import Any

import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet

from ..layers._args import check_int
from ._cifar import cifar_cfgs
from ._pretrained import safetensors_only

__all__ = ["ResNetCifar"]


class ResNetCifar(ResNet):
    """timm's ResNet with a 3x3 convolution of stride 1 as its stem, without pooling.

    Shapes:
        input ``(batch, in_chans, height, width)``; logits ``(batch, num_classes)``.

    Args:
        block, layers, in_chans, device, dtype, **kwargs: As in timm's ``ResNet``.
        output_stride: How much smaller the last stage's map is than the image: 8, 4 or 2, by dilated convolutions.

    Raises:
        TypeError, ValueError: ``output_stride`` is another, or there is an argument for the stem that this network has
            not.

    Example:
        >>> from timm.models.resnet import BasicBlock
        >>> ResNetCifar(BasicBlock, (1, 1, 1, 1), num_classes=10)(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """

    def __init__(
            self, block: Any, layers: Any, *, in_chans: int = 3, output_stride: int = 8, device: Any = None,
            dtype: Any = None, **kwargs: Any,
    ) -> None:
        if check_int("output_stride", output_stride, 2) not in (2, 4, 8):
            raise ValueError(f"output_stride must be 2, 4 or 8, got {output_stride!r}")
        if kwargs.get("stem_type"):
            raise ValueError(f"stem_type must be '', the 3x3 stem of this network, got {kwargs['stem_type']!r}")
        if kwargs.get("replace_stem_pool"):
            raise ValueError("replace_stem_pool must be False: the stem of this network has no pooling")
        # timm counts from its own stem, which reduces the image to a quarter.
        super().__init__(block, layers, in_chans=in_chans, output_stride=4 * output_stride, device=device, dtype=dtype,
                         **kwargs)
        net: Any = self  # timm declares these attributes as what its own stems make them
        net.conv1 = nn.Conv2d(in_chans, net.conv1.out_channels, 3, 1, 1, bias=False, device=device, dtype=dtype)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        net.maxpool = nn.Identity()
        # Neither the stem nor a pooling reduces the image any more.
        for i, level in enumerate(net.feature_info):
            level["reduction"] //= 2 if i == 0 else 4


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 10, "interpolation": "bilinear", "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD,
        "first_conv": "conv1", "classifier": "fc", "license": "apache-2.0", **kwargs,
    }


default_cfgs = generate_default_cfgs(cifar_cfgs("resnet18_cifar", _cfg, pool_size=(4, 4)))


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> ResNetCifar:
    """ResNet-18 for CIFAR: 11.2 M parameters, 0.56 GMACs at 32 px."""
    args = {"block": BasicBlock, "layers": (2, 2, 2, 2), **kwargs}
    variant = "resnet18_cifar"
    return build_model_with_cfg(ResNetCifar, variant, pretrained, **safetensors_only(variant, pretrained, args))
