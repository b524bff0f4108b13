"""Modules of a network that train with the kernels of `cpu_library.py`."""
from typing import Any

import torch
import torch.nn as nn
from timm.layers import BatchNormAct2d

from harness.distributed import normalize_globally
from harness.kernels.cpu_kernels import batch_norm_act, gate, norm_act_conv, norm_act_conv_and_shortcut
from harness.kernels.cpu_library import CHANNELS, fits
from harness.kernels.cpu_resample import max_pool, upsample
from harness.kernels.cpu_unit import residual_unit
from harness.kernels.plain_modules import (
    LAYERS_OF_HEAD,
    DeferrableSigmoid,
    are_unobserved,
    ends_in_gate,
    has_plain_gate,
    is_plain_conv,
    logits_of,
)
from ran_layers import AttentionModule, ResidualUnit, ResidualUnitDown, SoftMaskBranch
from ran_layers.layers.attention_module import check_input, check_trunk_shape
from ran_layers.layers.mask_branch import MaskHead, UpStep


def use_cpu_kernels(model: nn.Module, synced: bool = False) -> None:
    """Let ``model`` train with the kernels, where :func:`cpu_choice.why_no_kernels` says nothing.

    Batch normalisation with the ReLU and the convolution after it, residual units, the gate of an Attention Module, and
    the pooling and upsampling of its mask change the way they are computed in training, once differentiable.
    Parameters, statistics and what the model does in evaluation stay as they are, and maps that the kernels do not take
    go torch's way.

    Args:
        synced: Normalise over the batches of all processes.
    """
    for module in model.modules():
        if type(module) is AttentionModule and has_plain_gate(module):
            module.__class__ = _AttentionModule
            module.mask.head.act.__class__ = DeferrableSigmoid
        elif type(module) in _FASTER:
            module.__class__ = _FASTER[type(module)]
        if isinstance(module, _Norm):
            module.synced = synced


def _norm_fits(norm: nn.BatchNorm2d, x: torch.Tensor) -> bool:
    return norm.training and fits(x) and _normalizes(norm, x.shape[1])


def _normalizes(norm: nn.BatchNorm2d, channels: int) -> bool:
    """Whether ``norm`` normalises so many channels over the batch, and keeps all that the kernels update."""
    if not (norm.training and norm.track_running_stats and norm.momentum is not None):
        return False
    numbers, counter = (norm.weight, norm.bias, norm.running_mean, norm.running_var), norm.num_batches_tracked
    return counter is not None and counter.dtype is torch.int64 and all(
        values is not None and values.dtype is torch.float32 and values.shape == (channels,) and values.is_contiguous()
        for values in numbers)


class _Norm:
    """A batch normalisation that may be over the batches of all processes."""

    synced = False


class _BatchNorm2d(_Norm, nn.BatchNorm2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if _norm_fits(self, input):
            return batch_norm_act(self, input, relu=False, synced=self.synced)[0]
        return normalize_globally(self, input) if self.synced and self.training else super().forward(input)


class _BatchNormAct2d(_Norm, BatchNormAct2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.with_input(x)[0]

    def with_input(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the output, and the input for what goes past this layer."""
        if self.fits(x):
            return batch_norm_act(self, x, relu=type(self.act) is nn.ReLU, synced=self.synced)
        if self.synced and self.training:
            return self.act(self.drop(normalize_globally(self, x))), x
        return super().forward(x), x

    def fits(self, x: torch.Tensor) -> bool:
        return type(self.act) in (nn.ReLU, nn.Identity) and self.only_acts() and _norm_fits(self, x)

    def only_acts(self) -> bool:
        """Whether nothing but the activation follows the normalisation, and nobody looks at it."""
        return type(self.drop) is nn.Identity and are_unobserved(self.act, self.drop)


def _norm_act_conv(
        norm: Any, conv: nn.Conv2d, x: torch.Tensor, other: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``conv(norm(x)) + other``, and ``x`` for what goes past all that."""
    if _norm_act_fits(norm, x) and _conv_fits(conv, x, other):
        return norm_act_conv(norm, x, conv.weight, conv.stride[0], other, norm.synced)
    y, past = norm.with_input(x) if isinstance(norm, _BatchNormAct2d) and are_unobserved(norm) else (norm(x), x)
    y = conv(y)
    return y if other is None else y + other, past


def _is_norm_act(norm: Any) -> bool:
    return isinstance(norm, _BatchNormAct2d) and type(norm.act) is nn.ReLU and are_unobserved(norm)


def _norm_act_fits(norm: Any, x: torch.Tensor) -> bool:
    return _is_norm_act(norm) and norm.fits(x)


def _conv_fits(conv: nn.Conv2d, x: torch.Tensor, other: torch.Tensor | None) -> bool:
    """Whether the kernels have this convolution of the map ``x``, and the sum with ``other``."""
    if type(conv) is not nn.Conv2d:
        return False
    if conv.kernel_size == (3, 3):
        return other is None and _has_weight(conv, x, 3)
    return _has_weight(conv, x, 1) and conv.stride == (1, 1) and (other is None or (
        other.shape == (len(x), conv.out_channels, *x.shape[2:]) and other.dtype is x.dtype and fits(other)))


def _has_weight(conv: nn.Conv2d, x: torch.Tensor, size: int) -> bool:
    """Whether ``conv`` has such a weight as the kernels take, of ``size``, for a map like ``x``."""
    return _is_taken(conv, x.dtype, size) and conv.weight.shape[1] == x.shape[1]


def _is_taken(conv: nn.Conv2d, dtype: torch.dtype, size: int) -> bool:
    """Whether the kernels have ``conv``, of ``size``, for maps of ``dtype``."""
    computed_in = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    return (dtype is computed_in and _is_plain(conv, size) and are_unobserved(conv)
            and conv.weight.dtype is torch.float32)


def _is_plain(conv: nn.Conv2d, size: int) -> bool:
    """Whether ``conv`` is a convolution of ``size`` and nothing else, with channels that the kernels take."""
    return is_plain_conv(conv, size) and conv.in_channels % CHANNELS == conv.out_channels % CHANNELS == 0


def share_of_kernels(model: nn.Module) -> float:
    """Return the share of the weights of convolutions in ``model`` whose convolutions the kernels have."""
    weights = sum(conv.weight.numel() for conv in model.modules() if isinstance(conv, nn.Conv2d))
    taken = 0
    for unit in model.modules():
        if isinstance(unit, (ResidualUnit, MaskHead)):
            norms = [norm for name, norm in unit.named_children() if name.startswith("norm")]
            if all(isinstance(norm, BatchNormAct2d) and type(norm.act) is nn.ReLU for norm in norms):
                taken += sum(conv.weight.numel() for conv in unit.children()
                             if isinstance(conv, nn.Conv2d) and any(_is_plain(conv, size) for size in (1, 3)))
    return taken / max(1, weights)


def _unit_fits(unit: Any, x: torch.Tensor) -> bool:
    """Whether the kernels have this unit as a whole."""
    norms, convs = (unit.norm1, unit.norm2, unit.norm3), (unit.conv1, unit.conv2, unit.conv3)
    if unit.downsample is not None or not (
            fits(x)
            and all(_is_taken(conv, x.dtype, size) and conv.stride == (1, 1) for conv, size in zip(convs, (1, 3, 1)))
            and type(unit.drop_path) is nn.Identity and are_unobserved(unit.drop_path)):
        return False
    channels = x.shape[1], unit.conv1.out_channels, unit.conv1.out_channels
    shapes = [(out, into, size, size) for out, into, size in zip((*channels[1:], channels[0]), channels, (1, 3, 1))]
    return [tuple(conv.weight.shape) for conv in convs] == shapes and all(
        _is_norm_act(norm) and norm.only_acts() and _normalizes(norm, width) and not norm.synced
        and norm.eps == norms[0].eps and norm.momentum == norms[0].momentum for norm, width in zip(norms, channels))


class _ResidualUnit(ResidualUnit):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        if _unit_fits(self, x):
            return residual_unit(x, (self.norm1, self.norm2, self.norm3), (self.conv1, self.conv2, self.conv3))
        if self.downsample is None:
            x, shortcut = _norm_act_conv(self.norm1, self.conv1, x)
        elif _norm_act_fits(self.norm1, x) and all(_has_weight(conv, x, 1) for conv in (self.conv1, self.downsample)):
            x, shortcut = norm_act_conv_and_shortcut(
                self.norm1, x, self.conv1.weight, self.downsample.weight, self.downsample.stride[0], self.norm1.synced)
        else:
            preact = self.norm1(x)
            x, shortcut = self.conv1(preact), self.downsample(preact)
        x, _ = _norm_act_conv(self.norm2, self.conv2, x)
        if type(self.drop_path) is nn.Identity and are_unobserved(self.drop_path):
            return _norm_act_conv(self.norm3, self.conv3, x, shortcut)[0]
        return self.drop_path(_norm_act_conv(self.norm3, self.conv3, x)[0]) + shortcut


class _MaskHead(MaskHead):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or tuple(self._modules) != LAYERS_OF_HEAD:
            return super().forward(x)
        x, _ = _norm_act_conv(self.norm1, self.conv1, x)
        x, _ = _norm_act_conv(self.norm2, self.conv2, x)
        return self.act(x)


class _AttentionModule(AttentionModule):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plain = has_plain_gate(self, DeferrableSigmoid, (_SoftMaskBranch,), (_MaskHead,))
        if not (self.training and plain and ends_in_gate(self)):
            return super().forward(x)
        x = self.pre(check_input(x, self.channels, self.mask_depth))
        trunk, logits = check_trunk_shape(self.trunk(x), x), logits_of(self.mask, x)
        if fits(trunk, logits):
            x = gate(trunk, logits)
        else:
            x = torch.addcmul(trunk, torch.sigmoid(logits), trunk)
        return self.post(x)


class _MaxPool2d(nn.MaxPool2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        sizes = self.kernel_size, self.stride, self.padding, self.dilation, self.return_indices, self.ceil_mode
        return max_pool(input) if self.training and sizes == (3, 2, 1, 1, False, False) and fits(input) else (
            super().forward(input))


class _Upsampling:
    """What upsamples: a step of a soft mask branch, and its end."""

    training: bool

    def upsample(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if self.training and fits(x):
            return upsample(x, *target.shape[-2:])
        return super().upsample(x, target)  # type: ignore[misc]


class _UpStep(_Upsampling, UpStep):
    pass


class _SoftMaskBranch(_Upsampling, SoftMaskBranch):
    pass


_FASTER: dict[type, type] = {
    nn.BatchNorm2d: _BatchNorm2d, BatchNormAct2d: _BatchNormAct2d, ResidualUnit: _ResidualUnit,
    ResidualUnitDown: _ResidualUnit, MaskHead: _MaskHead, nn.MaxPool2d: _MaxPool2d, UpStep: _UpStep,
    SoftMaskBranch: _SoftMaskBranch}
