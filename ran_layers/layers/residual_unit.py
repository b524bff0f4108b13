"""Residual units, the basic unit of which the trunk and the mask branches are made.

`Identity Mappings in Deep Residual Networks` (pre-activation units) - https://arxiv.org/abs/1603.05027
`Aggregated Residual Transformations for Deep Neural Networks` (ResNeXt) - https://arxiv.org/abs/1611.05431
"""
from typing import Any

import torch
import torch.nn as nn
from timm.layers import DropPath, create_act_layer

from ._args import LayerType, check_device_dtype, check_fraction, check_int, resolve_norm_act


class ResidualUnit(nn.Module):
    """Pre-activation bottleneck unit (Wang et al. 2017, section 3 and Table 2).

    BN, ReLU, 1x1 convolution to ``out_channels * bottle_ratio``; BN, ReLU, 3x3 convolution that carries the stride;
    BN, ReLU, 1x1 convolution to ``out_channels``; plus the shortcut. The shortcut is the identity unless channels or
    resolution change; then it is a strided 1x1 convolution of the pre-activated input. No convolution has a bias.

    Shapes:
        input ``(batch, in_channels, height, width)``,
        output ``(batch, out_channels, ceil(height / stride), ceil(width / stride))``.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output; those of the input if None.
        stride: Stride of the 3x3 convolution.
        bottle_ratio: Inner channels over output channels, in (0, 1].
        groups: Groups of the 3x3 convolution.
        act_layer: Activation, a timm name or a class.
        norm_layer: Normalisation, a timm name or a class.
        drop_path: Probability of dropping the residual branch in training (stochastic depth), in [0, 1).
        device, dtype: Where the parameters lie and their type, as in torch's layers.

    Raises:
        TypeError, ValueError: An argument is of the wrong type or outside its range; the message names it.

    Example:
        >>> ResidualUnit(64, 128, stride=2)(torch.zeros(1, 64, 15, 20)).shape
        torch.Size([1, 128, 8, 10])
    """

    preact = True

    def __init__(
            self,
            in_channels: int,
            out_channels: int | None = None,
            stride: int = 1,
            *,
            bottle_ratio: float = 0.25,
            groups: int = 1,
            act_layer: LayerType = nn.ReLU,
            norm_layer: LayerType = nn.BatchNorm2d,
            drop_path: float = 0.0,
            device: Any = None,
            dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = check_device_dtype(device, dtype)
        norm_act = resolve_norm_act(norm_layer, act_layer)
        in_channels, mid_channels, out_channels, stride, groups = _check_unit(
            in_channels, out_channels, stride, bottle_ratio, groups, drop_path)

        self.norm1 = norm_act(in_channels, **dd)
        self.conv1 = nn.Conv2d(in_channels, mid_channels, 1, bias=False, **dd)
        self.norm2 = norm_act(mid_channels, **dd)
        self.conv2 = nn.Conv2d(mid_channels, mid_channels, 3, stride, 1, groups=groups, bias=False, **dd)
        self.norm3 = norm_act(mid_channels, **dd)
        self.conv3 = nn.Conv2d(mid_channels, out_channels, 1, bias=False, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.downsample = (
            nn.Conv2d(in_channels, out_channels, 1, stride, bias=False, **dd)
            if stride != 1 or in_channels != out_channels else None
        )

    def zero_init_last(self) -> None:
        """Let the unit begin as its shortcut; timm's ResNets call this, by name, of every module in them.

        They begin each block at zero, and a unit that normalises almost nothing would answer the first step with
        features of size one.
        """
        nn.init.zeros_(self.conv3.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        preact = self.norm1(x)
        shortcut = x if self.downsample is None else self.downsample(preact)
        x = self.conv1(preact)
        x = self.conv2(self.norm2(x))
        x = self.conv3(self.norm3(x))
        return self.drop_path(x) + shortcut


class ResidualUnitDown(ResidualUnit):
    """:class:`ResidualUnit` with stride 2: halves the height and width (the report's "Residual Unit Down Sampling").

    Takes the arguments of :class:`ResidualUnit`, ``stride`` apart.

    Example:
        >>> ResidualUnitDown(64, 128)(torch.zeros(1, 64, 16, 16)).shape
        torch.Size([1, 128, 8, 8])
    """

    def __init__(self, in_channels: int, out_channels: int | None = None, **kwargs: Any) -> None:
        if "stride" in kwargs:
            raise TypeError(f"ResidualUnitDown has stride 2, got stride={kwargs['stride']!r}; use ResidualUnit")
        super().__init__(in_channels, out_channels, stride=2, **kwargs)


class ResNeXtUnit(nn.Module):
    """Post-activation ResNeXt unit, the basic unit of AttentionNeXt (Wang et al. 2017, section 4.2).

    Three convolutions with BN, ReLU after the first two, the 3x3 one grouped and carrying the stride; the shortcut,
    where channels or resolution change, is a strided 1x1 convolution with BN; ReLU after the sum.

    Shapes, arguments and errors as in :class:`ResidualUnit`.

    Example:
        >>> ResNeXtUnit(64, 128, stride=2)(torch.zeros(2, 64, 16, 16)).shape
        torch.Size([2, 128, 8, 8])
    """

    preact = False

    def __init__(
            self,
            in_channels: int,
            out_channels: int | None = None,
            stride: int = 1,
            *,
            bottle_ratio: float = 0.5,
            groups: int = 32,
            act_layer: LayerType = nn.ReLU,
            norm_layer: LayerType = nn.BatchNorm2d,
            drop_path: float = 0.0,
            device: Any = None,
            dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = check_device_dtype(device, dtype)
        norm_act = resolve_norm_act(norm_layer, act_layer)
        in_channels, mid_channels, out_channels, stride, groups = _check_unit(
            in_channels, out_channels, stride, bottle_ratio, groups, drop_path)

        self.conv1 = nn.Conv2d(in_channels, mid_channels, 1, bias=False, **dd)
        self.norm1 = norm_act(mid_channels, **dd)
        self.conv2 = nn.Conv2d(mid_channels, mid_channels, 3, stride, 1, groups=groups, bias=False, **dd)
        self.norm2 = norm_act(mid_channels, **dd)
        self.conv3 = nn.Conv2d(mid_channels, out_channels, 1, bias=False, **dd)
        self.norm3 = norm_act(out_channels, apply_act=False, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.downsample = (
            nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False, **dd),
                norm_act(out_channels, apply_act=False, **dd),
            )
            if stride != 1 or in_channels != out_channels else None
        )
        self.act = create_act_layer(act_layer).to(device, dtype)

    def zero_init_last(self) -> None:
        """Let the unit begin as its shortcut, as :meth:`ResidualUnit.zero_init_last`."""
        weight = getattr(self.norm3, "weight", None)
        if isinstance(weight, torch.Tensor):
            nn.init.zeros_(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.norm1(self.conv1(x))
        x = self.norm2(self.conv2(x))
        x = self.norm3(self.conv3(x))
        return self.act(self.drop_path(x) + shortcut)


def is_preact(unit_layer: Any) -> bool:
    """Whether what follows such units has to normalise and activate first (also for a ``functools.partial`` of one)."""
    return getattr(getattr(unit_layer, "func", unit_layer), "preact", True)


def _check_unit(
        in_channels: int, out_channels: int | None, stride: int, bottle_ratio: float, groups: int, drop_path: float,
) -> tuple[int, int, int, int, int]:
    """Check the arguments of a unit; return its input, inner and output channels, stride and groups."""
    in_channels = check_int("in_channels", in_channels, 1)
    out_channels = check_int("out_channels", in_channels if out_channels is None else out_channels, 1)
    stride, groups = check_int("stride", stride, 1), check_int("groups", groups, 1)
    check_fraction("bottle_ratio", bottle_ratio, zero=False, one=True)
    check_fraction("drop_path", drop_path, zero=True, one=False)
    mid_channels = max(1, int(out_channels * bottle_ratio + 1e-6))  # 100 * 0.29 is 28.999...
    if mid_channels % groups:
        raise ValueError(
            f"groups must divide the inner channels (out_channels * bottle_ratio = {mid_channels}), got {groups}"
        )
    return in_channels, mid_channels, out_channels, stride, groups
