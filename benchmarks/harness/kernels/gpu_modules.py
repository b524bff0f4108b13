"""Modules of a network that train with the kernels of `gpu_kernels.py`."""
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import BatchNormAct2d

from harness.errors import RunError
from harness.kernels.gpu_kernels import (
    LARGEST_MATRIX,
    Norm,
    Zeros,
    as_map,
    backward_of_norm_relu,
    moments,
    norm_relu,
    norm_relu_conv,
)
from harness.kernels.gpu_mask_kernels import gate, gate_backward, upsample, upsample_backward
from harness.kernels.plain_modules import (
    LAYERS_OF_HEAD,
    DeferrableSigmoid,
    are_unobserved,
    ends_in_gate,
    has_plain_gate,
    is_plain_conv,
    logits_of,
)
from ran_layers import AttentionModule, ResidualUnit, SoftMaskBranch
from ran_layers.layers.attention_module import check_input, check_trunk_shape
from ran_layers.layers.mask_branch import MaskHead, UpStep, upsample_to


def use_gpu_kernels(model: nn.Module, full: dict[nn.Parameter, nn.Parameter] | None = None) -> Zeros:
    """Let ``model``, channels last and in training, compute its units and mask heads with the kernels.

    Units that change the channels or the resolution, and whatever else the kernels do not take, stay as they are. For
    a network that nobody else has: hooks that come later are not seen.

    Args:
        full: For weights of 1x1 convolutions those in float32 that they were cast from, which get the gradients.

    Returns:
        What is to be cleared before each step.

    Raises:
        RunError: They take nothing of this network.
    """
    zeros = Zeros()
    for module in model.modules():
        if type(module) is ResidualUnit and _is_plain_unit(module):
            module.__class__ = FusedUnit
        elif type(module) is MaskHead and _is_plain_head(module):
            module.__class__ = FusedHead
        elif type(module) is AttentionModule and has_plain_gate(module) and ends_in_gate(module):
            module.__class__ = FusedAttentionModule
            module.mask.head.act.__class__ = DeferrableSigmoid
        elif type(module) is SoftMaskBranch and are_unobserved(module):
            module.__class__ = FusedSoftMaskBranch
        elif type(module) is UpStep and are_unobserved(module):
            module.__class__ = FusedUpStep
        if isinstance(module, _Fused):
            module.kernel_zeros = zeros
            for conv in module.children():
                if isinstance(conv, nn.Conv2d):
                    # In a list, since it is not a parameter of the layer.
                    conv.full = [(full or {}).get(conv.weight, conv.weight)]
    if not any(isinstance(module, _Fused) for module in model.modules()):
        raise RunError("--gpu-kernels: this network has no residual unit, mask head or mask that they take")
    return zeros


def _is_plain_norm(norm: Any) -> bool:
    return (type(norm) is BatchNormAct2d and type(norm.act) is nn.ReLU and type(norm.drop) is nn.Identity
            and norm.track_running_stats and norm.momentum is not None and norm.affine
            and norm.weight.dtype is torch.float32 and _is_power_of_two(norm.num_features)
            and are_unobserved(*norm.modules()))


def _is_power_of_two(channels: int) -> bool:
    return channels >= 16 and channels & (channels - 1) == 0


def _is_plain_conv(conv: Any, size: int) -> bool:
    return (is_plain_conv(conv, size) and conv.stride == (1, 1) and are_unobserved(conv)
            and (size > 1 or conv.weight.numel() <= LARGEST_MATRIX))


def _is_plain_unit(unit: ResidualUnit) -> bool:
    return (unit.downsample is None and type(unit.drop_path) is nn.Identity and are_unobserved(unit)
            and all(_is_plain_norm(norm) for norm in (unit.norm1, unit.norm2, unit.norm3))
            and all(_is_plain_conv(conv, size) for conv, size in ((unit.conv1, 1), (unit.conv2, 3), (unit.conv3, 1)))
            and list(unit._modules) == ["norm1", "conv1", "norm2", "conv2", "norm3", "conv3", "drop_path"])


def _is_plain_head(head: MaskHead) -> bool:
    return (tuple(head._modules) == LAYERS_OF_HEAD and are_unobserved(head)
            and all(_is_plain_norm(norm) for norm in (head.norm1, head.norm2))
            and all(_is_plain_conv(conv, 1) for conv in (head.conv1, head.conv2)))


class _Fused(nn.Module):
    """A module with kernels."""

    kernel_zeros: Zeros

    def takes(self, x: torch.Tensor, *others: torch.Tensor) -> bool:
        """Whether the kernels take these maps: of one type, more than one position, and counted in 32 bits."""
        return (self.training and _is_power_of_two(x.shape[1]) and x.shape[1] < x.numel() < 2 ** 31
                and all(other.dtype is x.dtype for other in others))


def sums_of(x: torch.Tensor, zeros: Zeros) -> torch.Tensor:
    """Return the sums of a map: those that came with it from the kernel that made it, or they are added up."""
    sums, version = getattr(x, "channel_sums", (None, None))
    return moments(x.detach(), zeros) if version != x._version else sums  # not those from before a change in place


def _with_sums(x: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    # They go with the tensor to the module that reads it.
    x.channel_sums = sums, x._version  # type: ignore[attr-defined]
    return x


def _map_and_sums(ctx: Any, y: torch.Tensor, sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a function of autograd does: a map, and its sums, which have no gradient."""
    ctx.mark_non_differentiable(sums)
    ctx.set_materialize_grads(False)
    return y, sums


class FusedUnit(_Fused, ResidualUnit):
    """A residual unit with an identity shortcut: thirteen kernels, forward and backward, instead of some thirty."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.takes(x, self.conv1.weight) or x.shape[1] != self.conv1.in_channels:
            return super().forward(x)
        x = as_map(x)
        return _with_sums(*_Unit.apply(
            self, x, sums_of(x, self.kernel_zeros), self.norm1.weight, self.norm1.bias, self.conv1.full[0],
            self.norm2.weight, self.norm2.bias, self.conv2.weight, self.norm3.weight, self.norm3.bias,
            self.conv3.full[0]))


class _Unit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, unit, x, sums, weight1, bias1, full1, weight2, bias2, conv2, weight3, bias3, full3):
        norm1, norm2, norm3 = norms = [Norm(norm, unit.kernel_zeros) for norm in (unit.norm1, unit.norm2, unit.norm3)]
        conv1, conv3 = unit.conv1.weight.detach(), unit.conv3.weight.detach()
        y1, sums1 = norm_relu_conv(x, sums, norm1, conv1)
        inner = norm_relu(y1, sums1, norm2)
        y2 = as_map(F.conv2d(inner, conv2, padding=1))
        sums2 = moments(y2, unit.kernel_zeros)
        y, sums_of_y = norm_relu_conv(y2, sums2, norm3, conv3, other=x)
        ctx.save_for_backward(x, sums, conv1, y1, sums1, inner, conv2, y2, sums2, conv3)
        ctx.norms = norms
        return _map_and_sums(ctx, y, sums_of_y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, _):
        x, sums, conv1, y1, sums1, inner, conv2, y2, sums2, conv3 = ctx.saved_tensors
        (norm1, norm2, norm3), dy = ctx.norms, as_map(dy)
        dy2, dnorm3, dconv3 = backward_of_norm_relu(y2, sums2, norm3, dy, conv3)
        dinner, dconv2, _ = torch.ops.aten.convolution_backward(
            dy2, inner, conv2, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False])
        dy1, dnorm2, _ = backward_of_norm_relu(y1, sums1, norm2, as_map(dinner))
        dx, dnorm1, dconv1 = backward_of_norm_relu(x, sums, norm1, dy1, conv1, other=dy)
        return (None, dx, None, dnorm1[1], dnorm1[0], dconv1, dnorm2[1], dnorm2[0], dconv2, dnorm3[1], dnorm3[0],
                dconv3)


class _NormReluConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, norm, conv, with_sums, x, sums, weight, bias, full):
        y, sums_of_y = norm_relu_conv(x, sums, norm, conv, with_sums=with_sums)
        ctx.save_for_backward(x, sums, conv)
        ctx.norm = norm
        return _map_and_sums(ctx, y, sums_of_y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, _):
        x, sums, conv = ctx.saved_tensors
        dx, dnorm, dconv = backward_of_norm_relu(x, sums, ctx.norm, as_map(dy), conv)
        return None, None, None, dx, None, dnorm[1], dnorm[0], dconv


class FusedHead(_Fused, MaskHead):
    """The head of a mask branch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.takes(x, self.conv1.weight) or x.shape[1] != self.conv1.in_channels:
            return super().forward(x)
        x = as_map(x)
        sums = sums_of(x, self.kernel_zeros)
        for norm, conv in ((self.norm1, self.conv1), (self.norm2, self.conv2)):
            x, sums = _NormReluConv.apply(
                Norm(norm, self.kernel_zeros), conv.weight.detach(), conv is self.conv1, x, sums, norm.weight,
                norm.bias, conv.full[0])
        return self.act(x)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, zeros, trunk, logits):
        ctx.save_for_backward(trunk, logits)
        y, sums = gate(trunk, logits, zeros)
        return _map_and_sums(ctx, y, sums)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, _):
        return None, *gate_backward(*ctx.saved_tensors, as_map(dy))


class FusedAttentionModule(_Fused, AttentionModule):
    """An Attention Module whose mask ends in a plain sigmoid: that and the product are one kernel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pre(check_input(x, self.channels, self.mask_depth))
        trunk, logits = check_trunk_shape(self.trunk(x), x), logits_of(self.mask, x)
        if not self.takes(trunk, logits):
            return self.post(torch.addcmul(trunk, torch.sigmoid(logits), trunk))
        return self.post(_with_sums(*_Gate.apply(self.kernel_zeros, as_map(trunk), as_map(logits))))


class _Upsample(torch.autograd.Function):
    @staticmethod
    def forward(ctx, zeros, x, other):
        y, sums = upsample(x, zeros, other)
        ctx.has_other = other is not None
        return _map_and_sums(ctx, y, sums)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, _):
        return None, upsample_backward(as_map(dy)), dy if ctx.has_other else None


def _upsample_to(
        module: _Fused, x: torch.Tensor, target: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
    others = [] if other is None else [other]
    if target.shape[2:] == (2 * x.shape[2], 2 * x.shape[3]) and module.takes(target, x, *others):
        return _with_sums(*_Upsample.apply(module.kernel_zeros, as_map(x), None if other is None else as_map(other)))
    x = upsample_to(x, target)
    return x if other is None else x + other


class FusedUpStep(_Fused, UpStep):
    """A step of the way up: to twice the size, with the skip connection, in one kernel."""

    def forward(self, x: torch.Tensor, feature: torch.Tensor) -> torch.Tensor:
        other = None if self.skip is None else self.skip(feature)
        return self.units(_upsample_to(self, x, feature, other))


class FusedSoftMaskBranch(_Fused, SoftMaskBranch):
    """A soft mask branch whose last step up is one kernel."""

    def upsample(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return _upsample_to(self, x, target)
