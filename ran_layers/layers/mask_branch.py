"""Mask branches: from a feature map, a mask of the same shape that weights the trunk's output.

`Residual Attention Network for Image Classification` - https://arxiv.org/abs/1704.06904
"""
from typing import Any

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F

from ._args import LayerType, check_choice, check_device_dtype, check_int, check_unit_layer, resolve_norm_act
from ._hub_mixin import HubMixin
from .residual_unit import ResidualUnit, is_preact

MASK_ACTIVATIONS = ("mixed", "channel", "spatial")


@torch.fx.wrap
def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` in float32 if it is shorter: squares overflow float16, and the least norm allowed is 0 in it."""
    return x if x.dtype == torch.float64 else x.float()


class MaskActivation(nn.Module):
    """The last step of a mask branch, in the three forms of the paper (section 3.3, equations 4 to 6).

    - ``mixed``: the sigmoid of each value, no constraint. The networks use this one.
    - ``channel``: each position's channels divided by their L2 norm.
    - ``spatial``: each channel's map standardised over its positions, then the sigmoid.

    Shapes:
        input and output ``(batch, channels, height, width)``.

    Args:
        mask_act: ``'mixed'``, ``'channel'`` or ``'spatial'``.

    Raises:
        TypeError, ValueError: ``mask_act`` is none of these.

    Example:
        >>> MaskActivation("channel")(torch.ones(1, 4, 1, 1)).flatten()
        tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """

    def __init__(self, mask_act: str = "mixed") -> None:
        super().__init__()
        self.mask_act = check_choice("mask_act", mask_act, MASK_ACTIVATIONS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.mask_act == "mixed":
            return torch.sigmoid(x)
        y = at_least_float32(x)
        if self.mask_act == "channel":
            return F.normalize(y, dim=1).to(x.dtype)
        # Not F.instance_norm: it refuses a map of one position in training.
        mean = y.mean(dim=(2, 3), keepdim=True)
        var = (y - mean).square().mean(dim=(2, 3), keepdim=True)
        return torch.sigmoid((y - mean) * torch.rsqrt(var + 1e-5)).to(x.dtype)

    def extra_repr(self) -> str:
        return repr(self.mask_act)


class MaskHead(nn.Sequential):
    """BN, ReLU, 1x1 convolution, twice, then the :class:`MaskActivation`; keeps the channels.

    With ``preact=False``, after units that end in their own activation (ResNeXt), the first BN and ReLU fall away.

    Example:
        >>> list(MaskHead(64, preact=False)._modules)
        ['conv1', 'norm2', 'conv2', 'act']
    """

    def __init__(
            self,
            channels: int,
            *,
            mask_act: str = "mixed",
            preact: bool = True,
            act_layer: LayerType = nn.ReLU,
            norm_layer: LayerType = nn.BatchNorm2d,
            device: Any = None,
            dtype: Any = None,
    ) -> None:
        dd = check_device_dtype(device, dtype)
        norm_act = resolve_norm_act(norm_layer, act_layer)
        super().__init__()
        if preact:
            self.norm1 = norm_act(channels, **dd)
        self.conv1 = nn.Conv2d(channels, channels, 1, bias=False, **dd)
        self.norm2 = norm_act(channels, **dd)
        self.conv2 = nn.Conv2d(channels, channels, 1, bias=False, **dd)
        self.act = MaskActivation(mask_act)


@torch.fx.wrap
def check_map_size(x: torch.Tensor, depth: int) -> torch.Tensor:
    """Return ``x`` if it has a position, and every one of ``depth`` poolings halves something.

    Raises:
        ValueError: The map is so small that it would reach one pixel before the last pooling, or is empty.
    """
    # Returned, not only checked, so that graph passes which drop unused nodes keep the check.
    least = (1 << depth) // 2 + 1  # a power would be a float in TorchScript
    if x.shape[-2] < least or x.shape[-1] < least:
        if depth == 0:
            raise ValueError(f"a local mask branch needs a map of at least 1x1, got {x.shape[-2]}x{x.shape[-1]}")
        raise ValueError(
            f"a soft mask branch with mask_depth={depth} needs a map of at least {least}x{least}, "
            f"got {x.shape[-2]}x{x.shape[-1]}; use a smaller mask_depth"
        )
    return x


class UpStep(nn.Module):
    """One step of the way up: upsample to the size of the step's feature map, add the skip connection, refine.

    Shapes:
        inputs ``(batch, channels, low height, low width)`` and ``(batch, channels, height, width)``, output as the
        second.

    Args:
        skip: What the feature map passes before it is added; None for no skip connection.
        units: What the sum passes.

    Example:
        >>> step = UpStep(ResidualUnit(64), ResidualUnit(64))
        >>> step(torch.zeros(1, 64, 4, 4), torch.zeros(1, 64, 7, 8)).shape
        torch.Size([1, 64, 7, 8])
    """

    def __init__(self, skip: nn.Module | None, units: nn.Module) -> None:
        super().__init__()
        self.skip = skip
        self.units = units

    def upsample(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return ``x`` at the height and width of ``target``; where a subclass may do it in another way."""
        return upsample_to(x, target)

    def forward(self, x: torch.Tensor, feature: torch.Tensor) -> torch.Tensor:
        x = self.upsample(x, feature)
        if self.skip is not None:
            x = x + self.skip(feature)
        return self.units(x)


def upsample_to(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Bilinear interpolation to the recorded height and width of ``target``: any size fits, odd ones too."""
    # Autocast interpolates in float32; all maps after it would stay in that.
    return F.interpolate(x, size=target.shape[-2:], mode="bilinear", align_corners=False).to(x.dtype)


class SoftMaskBranch(nn.Module, HubMixin):
    """Bottom-up top-down mask branch (Wang et al. 2017, section 3.2 and Figure 2).

    Down: ``mask_depth`` times a 3x3 max-pooling of stride 2 and ``r`` units. Bottom: ``r`` more units. Up: bilinear
    upsampling to the size of each map passed on the way down, plus a skip connection of one unit, and ``r`` units;
    at last bilinear upsampling to the size of the input. Head: :class:`MaskHead`.

    Saves and loads by itself: ``save_pretrained``, ``push_to_hub``, ``from_pretrained`` (huggingface_hub's mixin).

    Shapes:
        input and output ``(batch, channels, height, width)``, height and width above ``2 ** (mask_depth - 1)``.

    Args:
        channels: Channels of the input and of the mask.
        mask_depth: Number of poolings ``d`` (the paper's networks: 3, 2, 1 in stages 1, 2, 3).
        r: Units at each step between poolings.
        skips: Skip connections, from the highest resolution down; 0 to ``mask_depth - 1``, all of them if None.
        mask_act: ``'mixed'``, ``'channel'`` or ``'spatial'``, see :class:`MaskActivation`.
        unit_layer: The basic unit, a class called with ``(channels, act_layer=, norm_layer=, device=, dtype=)``.
        act_layer, norm_layer, device, dtype: As in :class:`ResidualUnit`.
        **unit_args: Further keyword arguments of ``unit_layer`` (``bottle_ratio``, ``groups``, ``drop_path``).

    Raises:
        TypeError, ValueError: An argument is of the wrong type or outside its range; the message names it.
        ValueError: In ``forward``, the map is too small for ``mask_depth``.

    Example:
        >>> mask = SoftMaskBranch(64, mask_depth=3)(torch.randn(2, 64, 17, 30))
        >>> mask.shape, bool(((0 < mask) & (mask < 1)).all())
        (torch.Size([2, 64, 17, 30]), True)
    """

    def __init__(
            self,
            channels: int,
            *,
            mask_depth: int = 1,
            r: int = 1,
            skips: int | None = None,
            mask_act: str = "mixed",
            unit_layer: Any = ResidualUnit,
            act_layer: LayerType = nn.ReLU,
            norm_layer: LayerType = nn.BatchNorm2d,
            device: Any = None,
            dtype: Any = None,
            **unit_args: Any,
    ) -> None:
        super().__init__()
        channels, r = check_int("channels", channels, 1), check_int("r", r, 1)
        mask_depth = check_int("mask_depth", mask_depth, 1)
        skips = check_int("skips", mask_depth - 1 if skips is None else skips, 0)
        if skips > mask_depth - 1:
            raise ValueError(f"skips must be at most mask_depth - 1 = {mask_depth - 1}, got {skips}")
        layer_args: dict[str, Any] = dict(act_layer=act_layer, norm_layer=norm_layer, device=device, dtype=dtype)
        check_unit_layer(unit_layer, [*layer_args, *unit_args])

        def units(count: int) -> list[nn.Module]:
            return [unit_layer(channels, **layer_args, **unit_args) for _ in range(count)]

        self.mask_depth = mask_depth
        self.down = nn.ModuleList(
            nn.Sequential(nn.MaxPool2d(3, 2, 1), *units(r)) for _ in range(mask_depth)
        )
        self.bottom = nn.Sequential(*units(r))
        self.up = nn.ModuleList(
            UpStep(units(1)[0] if level <= skips else None, nn.Sequential(*units(r)))
            for level in range(mask_depth - 1, 0, -1)
        )
        self.head = MaskHead(channels, mask_act=mask_act, preact=is_preact(unit_layer), **layer_args)

    def upsample(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return ``x`` at the height and width of ``target``; where a subclass may do it in another way."""
        return upsample_to(x, target)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = check_map_size(x, self.mask_depth)
        features = [x]
        for down in self.down:
            x = down(x)
            features.append(x)
        x = self.bottom(features.pop())
        for up in self.up:
            x = up(x, features.pop())
        return self.head(self.upsample(x, features.pop()))


class LocalMaskBranch(nn.Sequential, HubMixin):
    """Mask branch without down and up steps: units at the trunk's resolution, then the :class:`MaskHead`.

    The report's Local Mask Branch, the paper's "local convolutions" (section 4.1, Table 4).

    Saves and loads by itself: ``save_pretrained``, ``push_to_hub``, ``from_pretrained`` (huggingface_hub's mixin).

    Shapes:
        input and output ``(batch, channels, height, width)``.

    Args:
        channels: Channels of the input and of the mask.
        units: Number of units; 2 in the report.
        mask_act, unit_layer, act_layer, norm_layer, device, dtype, **unit_args: As in :class:`SoftMaskBranch`.

    Raises:
        TypeError, ValueError: An argument is of the wrong type or outside its range; the message names it.

    Example:
        >>> LocalMaskBranch(64)(torch.zeros(1, 64, 5, 7)).shape
        torch.Size([1, 64, 5, 7])
    """

    def __init__(
            self,
            channels: int,
            *,
            units: int = 2,
            mask_act: str = "mixed",
            unit_layer: Any = ResidualUnit,
            act_layer: LayerType = nn.ReLU,
            norm_layer: LayerType = nn.BatchNorm2d,
            device: Any = None,
            dtype: Any = None,
            **unit_args: Any,
    ) -> None:
        channels, units = check_int("channels", channels, 1), check_int("units", units, 0)
        layer_args: dict[str, Any] = dict(act_layer=act_layer, norm_layer=norm_layer, device=device, dtype=dtype)
        check_unit_layer(unit_layer, [*layer_args, *unit_args])
        super().__init__()
        self.units = nn.Sequential(*(unit_layer(channels, **layer_args, **unit_args) for _ in range(units)))
        self.head = MaskHead(channels, mask_act=mask_act, preact=is_preact(unit_layer), **layer_args)
