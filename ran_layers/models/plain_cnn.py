"""The report's plain convolutional network of 8 layers, the baseline that shows what depth and attention add.

The report (section 5.3) gives its depth and its CIFAR-10 error of 22.08 %, not its widths. This one has seven 3x3
convolutions with BN and ReLU, max-pooling after the second, fourth, sixth and seventh, and a linear classifier.
"""
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices

from ..layers._args import LayerType, check_fraction, check_int, resolve_norm_act
from ._cifar import cifar_cfgs
from ._pretrained import safetensors_only

__all__ = ["PlainCNN"]


class PlainStage(nn.Module):
    """Convolutions of one width, each with BN and ReLU, behind the pooling that halves the resolution."""

    def __init__(self, in_channels: int, out_channels: int, depth: int, pool: bool, norm_act: Any, dd: Any) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.blocks = nn.Sequential()
        if pool:
            self.blocks.add_module("pool", nn.MaxPool2d(2))
        for i in range(depth):
            self.blocks.add_module(f"conv{i}", nn.Conv2d(in_channels, out_channels, 3, 1, 1, bias=False, **dd))
            self.blocks.add_module(f"norm{i}", norm_act(out_channels, **dd))
            in_channels = out_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


class PlainCNN(nn.Module):
    """Plain convolutional network (the report, section 5.3).

    Shapes:
        input ``(batch, in_chans, height, width)``; logits ``(batch, num_classes)``.

    Args:
        channels: Width of each stage; each stage after the first halves the resolution.
        depths: Convolutions in each stage.
        num_classes, in_chans, global_pool, drop_rate, act_layer, norm_layer: As in timm's networks.
        drop_path_rate: Accepted for timm's interface; there is no residual path to drop.
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
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        norm_act = resolve_norm_act(norm_layer, act_layer)
        if len(channels) != len(depths):
            raise ValueError(f"channels and depths must have one entry per stage, got {channels}, {depths}")
        check_int("num_classes", num_classes, 0)
        check_int("in_chans", in_chans, 1)
        check_fraction("drop_rate", drop_rate, zero=True, one=False)
        check_fraction("drop_path_rate", drop_path_rate, zero=True, one=False)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.stages = nn.Sequential()
        self.feature_info = []
        in_channels = in_chans
        for i, (out_channels, depth) in enumerate(zip(channels, depths)):
            self.stages.append(PlainStage(in_channels, out_channels, depth, i > 0, norm_act, dd))
            self.feature_info.append(dict(num_chs=out_channels, reduction=2 ** i, module=f"stages.{i}"))
            in_channels = out_channels
        self.num_features = in_channels
        self.head = ClassifierHead(in_channels, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.head_hidden_size = in_channels * self.head.global_pool.feat_mult()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that put the parameters into ordered groups, for timm's layer decay."""
        return dict(stem=r"^stages\.0", blocks=r"^stages\.(\d+)")

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade computation for memory: recompute each stage in the backward pass."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the classifier layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one of ``num_classes`` (0 for none), and the pooling if given."""
        self.num_classes = num_classes
        self.head.in_features = self.num_features  # fewer than at first if stages were pruned
        self.head.reset(num_classes, global_pool)
        self.head.to(next(self.parameters()))  # its device and dtype
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: int | list[int] | None = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = "NCHW",
            intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the last features and the stages' feature maps; arguments as in timm's networks."""
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got '{output_fmt}'")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        intermediates = []
        if torch.jit.is_scripting() or not stop_early:  # a slice cannot be scripted
            stages = self.stages
        else:
            stages = self.stages[:max_index + 1]
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in take_indices:
                intermediates.append(x)
        if intermediates_only:
            return intermediates
        return x, intermediates

    def prune_intermediate_layers(
            self,
            indices: int | list[int] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> list[int]:
        """Drop what is not needed for the intermediate feature maps ``indices``; return their indices."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        cut = max_index < len(self.stages) - 1
        self.stages = self.stages[:max_index + 1]
        if cut:
            self.num_features = self.feature_info[max_index]["num_chs"]
        if prune_head or cut:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Return the map of the last stage, ``(batch, num_features, height, width)``."""
        return self.stages(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Pool and classify; stop before the classifier if ``pre_logits``."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 10, "interpolation": "bilinear", "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stages.0.blocks.conv0", "classifier": "head.fc", "license": "apache-2.0",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(cifar_cfgs("plain_cnn8_cifar", _cfg, pool_size=(4, 4)))


@register_model
def plain_cnn8_cifar(pretrained: bool = False, **kwargs: Any) -> PlainCNN:
    """The report's plain 8-layer network: 0.58 M parameters."""
    feature_cfg = dict(out_indices=(0, 1, 2, 3), flatten_sequential=True)
    return build_model_with_cfg(
        PlainCNN, "plain_cnn8_cifar", pretrained, feature_cfg=feature_cfg, **safetensors_only(pretrained, kwargs))
