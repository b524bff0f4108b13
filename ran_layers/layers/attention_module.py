"""The Attention Module: a trunk branch, a mask branch, and the residual product of the two.

`Residual Attention Network for Image Classification` - https://arxiv.org/abs/1704.06904
"""
from typing import Any

import torch
import torch.fx
import torch.nn as nn

from ._args import LayerType, check_choice, check_int, check_unit_layer
from ._hub_mixin import HubMixin
from .mask_branch import LocalMaskBranch, SoftMaskBranch, check_map_size
from .residual_unit import ResidualUnit


@torch.fx.wrap
def check_trunk_shape(trunk: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return the trunk's output if it has the shape of its input ``x``, and so of the mask.

    Raises:
        ValueError: It has another, which the product with the mask might silently broadcast.
    """
    # Returned, not only checked, so that graph passes which drop unused nodes keep the check.
    if trunk.shape != x.shape:
        raise ValueError(
            f"trunk must keep the shape of its input, got an output of shape {list(trunk.shape)} "
            f"for an input of shape {list(x.shape)}"
        )
    return trunk


@torch.fx.wrap
def check_input(x: torch.Tensor, channels: int, mask_depth: int) -> torch.Tensor:
    """Return ``x`` if it is a batch of maps of so many channels, large enough for the mask.

    Before the first unit runs, which would fail in words of its own, or draw statistics from what is then refused.

    Raises:
        ValueError: It is not.
    """
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(
            f"an Attention Module of {channels} channels takes maps of shape (batch, {channels}, height, width), "
            f"got {list(x.shape)}"
        )
    return check_map_size(x, mask_depth)


class AttentionModule(nn.Module, HubMixin):
    """Attention Module (Wang et al. 2017, section 3 and Figure 2).

    With ``x`` the input after ``p`` units, ``T`` the trunk branch (``t`` units on ``x``) and ``M`` the mask branch on
    ``x``, the output is ``p`` units on ``(1 + M) * T`` (attention residual learning, equation 3) or on ``M * T``
    (naive attention learning). It keeps the shape, so it fits between any two layers of a convolutional network and
    wherever timm takes an ``attn_layer``.

    Saves and loads by itself: ``save_pretrained``, ``push_to_hub``, ``from_pretrained`` (huggingface_hub's mixin). For
    normalisation over several processes convert with ``timm.layers.convert_sync_batchnorm``: torch's own conversion
    drops the ReLUs.

    Shapes:
        input and output ``(batch, channels, height, width)``; with a soft mask, height and width above
        ``2 ** (mask_depth - 1)``.

    Args:
        channels: Channels of the input and the output.
        p: Units before and after the two branches.
        t: Units of the trunk branch.
        r: Units at each step of the soft mask branch; a local one, with its two units, has no use for it, nor for
            ``mask_depth``.
        mask_depth: Poolings of the soft mask branch. The paper's networks have 3, 2, 1 in stages 1, 2, 3; the default
            of 1 suits any map of at least 2x2.
        skips: Skip connections of the soft mask branch; ``mask_depth - 1`` if None.
        mask: ``'soft'`` (bottom-up top-down) or ``'local'`` (units at one resolution, Table 4).
        learning: ``'residual'`` for ``(1 + M) * T`` or ``'naive'`` for ``M * T`` (Table 3).
        mask_act: ``'mixed'``, ``'channel'`` or ``'spatial'`` (section 3.3, Table 1).
        bottle_ratio: Inner channels over channels in each unit; the unit's own default if None.
        act_layer: Activation, a timm name or a class.
        norm_layer: Normalisation, a timm name or a class.
        drop_path: Probability of dropping a unit's residual branch in training, in [0, 1).
        unit_layer: The basic unit, a class with the arguments of :class:`ResidualUnit`.
        trunk: A trunk branch of your own that keeps the shape; ``t`` units if None. Its first operation must not be
            in place: the mask branch reads the same map.
        device, dtype: Where the parameters lie and their type, as in torch's layers.

    Raises:
        TypeError, ValueError: An argument is of the wrong type or outside its range; the message names it.
        ValueError: In ``forward``, the input has other channels, its map is too small for ``mask_depth``, or the
            trunk changes the shape.

    Example:
        >>> module = AttentionModule(64, mask_depth=2)
        >>> module(torch.randn(2, 64, 15, 20)).shape
        torch.Size([2, 64, 15, 20])
    """

    def __init__(
            self,
            channels: int,
            *,
            p: int = 1,
            t: int = 2,
            r: int = 1,
            mask_depth: int = 1,
            skips: int | None = None,
            mask: str = "soft",
            learning: str = "residual",
            mask_act: str = "mixed",
            bottle_ratio: float | None = None,
            act_layer: LayerType = nn.ReLU,
            norm_layer: LayerType = nn.BatchNorm2d,
            drop_path: float = 0.0,
            unit_layer: Any = ResidualUnit,
            trunk: nn.Module | None = None,
            device: Any = None,
            dtype: Any = None,
    ) -> None:
        super().__init__()
        channels, p, t = check_int("channels", channels, 1), check_int("p", p, 0), check_int("t", t, 0)
        r, mask_depth = check_int("r", r, 1), check_int("mask_depth", mask_depth, 1)
        check_choice("mask", mask, ("soft", "local"))
        if skips is not None:
            check_int("skips", skips, 0)
            if mask == "local":
                raise ValueError(f"skips must be None for mask='local', which has no skip connections, got {skips}")
        check_choice("learning", learning, ("residual", "naive"))
        if trunk is not None and not isinstance(trunk, nn.Module):
            raise TypeError(f"trunk must be an nn.Module or None, got {trunk!r} ({type(trunk).__name__})")
        unit_args: dict[str, Any] = dict(
            act_layer=act_layer, norm_layer=norm_layer, drop_path=drop_path, device=device, dtype=dtype)
        if bottle_ratio is not None:
            unit_args["bottle_ratio"] = bottle_ratio
        check_unit_layer(unit_layer, unit_args)

        def units(count: int) -> nn.Sequential:
            return nn.Sequential(*(unit_layer(channels, **unit_args) for _ in range(count)))

        self.channels = channels
        self.mask_depth = mask_depth if mask == "soft" else 0
        self.residual = learning == "residual"
        self.pre = units(p)
        self.trunk = units(t) if trunk is None else trunk
        self.mask: nn.Module
        if mask == "soft":
            self.mask = SoftMaskBranch(
                channels, mask_depth=mask_depth, r=r, skips=skips, mask_act=mask_act, unit_layer=unit_layer,
                **unit_args)
        else:
            self.mask = LocalMaskBranch(channels, mask_act=mask_act, unit_layer=unit_layer, **unit_args)
        self.post = units(p)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pre(check_input(x, self.channels, self.mask_depth))
        trunk, mask = check_trunk_shape(self.trunk(x), x), self.mask(x)
        # addcmul is trunk + mask * trunk in one pass: (1 + mask) * trunk without the map 1 + mask.
        x = torch.addcmul(trunk, mask, trunk) if self.residual else mask * trunk
        return self.post(x)
