"""The report's plain convolutional network of 8 layers, the baseline that shows what depth and attention add.

The report (section 5.3) gives its depth and its CIFAR-10 error of 22.08 %, not its widths. This one has seven 3x3
convolutions with BN and ReLU, max-pooling after the second, fourth and sixth, global average pooling after the
seventh, and a linear classifier.
"""
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from ..layers._args import LayerType, check_device_dtype, resolve_norm_act
from ._cifar import cifar_cfgs
from ._pretrained import safetensors_only
from ._timm_interface import Stage, StagedNet, check_stages, feature_cfg

__all__ = ["PlainCNN"]


class PlainCNN(StagedNet):
    """Plain convolutional network (the report, section 5.3).

    Shapes:
        input ``(batch, in_chans, height, width)``; logits ``(batch, num_classes)``.

    Args:
        channels: Width of each stage; each stage after the first halves the resolution.
        depths: Convolutions in each stage.
        num_classes, in_chans, global_pool, drop_rate, act_layer, norm_layer: As in timm's networks.
        drop_path_rate: Accepted for timm's interface; there is no residual path to drop.
        device, dtype: Where the parameters lie and their type, as in torch's layers.

    Raises:
        TypeError, ValueError: An argument is of the wrong type or outside its range; the message names it.

    Example:
        >>> PlainCNN(num_classes=100)(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 100])
    """

    def __init__(
            self,
            channels: Sequence[int] = (32, 64, 128, 256),
            depths: Sequence[int] = (2, 2, 2, 1),
            num_classes: int = 10,
            in_chans: int = 3,
            global_pool: str = "avg",
            drop_rate: float = 0.0,
            drop_path_rate: float = 0.0,
            act_layer: LayerType = nn.ReLU,
            norm_layer: LayerType = nn.BatchNorm2d,
            device: Any = None,
            dtype: Any = None,
    ) -> None:
        super().__init__(num_classes, in_chans, drop_rate, drop_path_rate)
        dd = check_device_dtype(device, dtype)
        norm_act = resolve_norm_act(norm_layer, act_layer)
        channels, depths = check_stages(channels=(channels, 1), depths=(depths, 1))
        feature_info: list[dict[str, Any]] = []
        in_channels = in_chans
        for i, (out_channels, depth) in enumerate(zip(channels, depths)):
            blocks = nn.Sequential()
            if i > 0:
                blocks.add_module("pool", nn.MaxPool2d(2))
            for j in range(depth):
                blocks.add_module(f"conv{j}", nn.Conv2d(in_channels, out_channels, 3, 1, 1, bias=False, **dd))
                blocks.add_module(f"norm{j}", norm_act(out_channels, **dd))
                in_channels = out_channels
            self.stages.append(Stage(blocks))
            feature_info.append(dict(num_chs=out_channels, reduction=2 ** i, module=f"stages.{i}"))
        self.set_head(feature_info, global_pool, dd)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that put the parameters into ordered groups, for timm's layer decay."""
        return dict(stem=r"^stages\.0", blocks=r"^stages\.(\d+)")


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 10, "interpolation": "bilinear", "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stages.0.blocks.conv0", "classifier": "head.fc", "license": "apache-2.0",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(cifar_cfgs("plain_cnn8_cifar", _cfg, pool_size=(4, 4)))


@register_model
def plain_cnn8_cifar(pretrained: bool = False, **kwargs: Any) -> PlainCNN:
    """The report's plain 8-layer network: 0.59 M parameters."""
    variant, channels = "plain_cnn8_cifar", kwargs.get("channels", (32, 64, 128, 256))
    return build_model_with_cfg(
        PlainCNN, variant, pretrained, feature_cfg=feature_cfg(channels),
        **safetensors_only(variant, pretrained, kwargs))
