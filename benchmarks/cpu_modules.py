"""Modules of a network that train with the kernels of `cpu_kernels.py`."""
import torch
import torch.nn as nn
from cpu_kernels import batch_norm_act, fits, gate, pointwise_conv_add
from timm.layers import BatchNormAct2d

from ran_layers import AttentionModule, LocalMaskBranch, ResidualUnit, ResidualUnitDown, SoftMaskBranch
from ran_layers.layers.attention_module import check_channels, check_trunk_shape
from ran_layers.layers.mask_branch import MaskActivation


def use_cpu_kernels(model: nn.Module) -> None:
    """Let ``model`` train with the kernels, where :func:`cpu_kernels.why_no_kernels` says nothing.

    Batch normalisation with the ReLU after it, the sum of a residual unit and the gate of an Attention Module change
    the way they are computed in training. Parameters, statistics and what the model does in evaluation stay as they
    are, and maps that the kernels do not take go torch's way.
    """
    for module in model.modules():
        if type(module) is AttentionModule and _has_plain_gate(module):
            module.__class__ = _AttentionModule
            module.mask.head.act.__class__ = _DeferrableSigmoid
        elif type(module) in _FASTER:
            module.__class__ = _FASTER[type(module)]


def _has_plain_gate(module: AttentionModule) -> bool:
    return (
        module.residual and type(module.mask) in (SoftMaskBranch, LocalMaskBranch)
        and module.mask.head.act.kind == "mixed")


def _norm_fits(norm: nn.BatchNorm2d, x: torch.Tensor) -> bool:
    return (
        norm.training and norm.affine and norm.running_mean is not None and norm.momentum is not None
        and norm.weight.dtype is torch.float32 and fits(x))


class _BatchNorm2d(nn.BatchNorm2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return batch_norm_act(self, input, relu=False)[0] if _norm_fits(self, input) else super().forward(input)


class _BatchNormAct2d(BatchNormAct2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.with_input(x)[0]

    def with_input(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the output, and the input for what goes past this layer."""
        act = type(self.act)
        if act not in (nn.ReLU, nn.Identity) or type(self.drop) is not nn.Identity or not _norm_fits(self, x):
            return super().forward(x), x
        return batch_norm_act(self, x, relu=act is nn.ReLU)


class _ResidualUnit(ResidualUnit):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or type(self.norm1) is not _BatchNormAct2d:
            return super().forward(x)
        preact, shortcut = self.norm1.with_input(x)
        if self.downsample is not None:
            shortcut = self.downsample(preact)
        x = self.norm3(self.conv2(self.norm2(self.conv1(preact))))
        plain = type(self.conv3) is nn.Conv2d and type(self.drop_path) is nn.Identity
        if plain and x.dtype is shortcut.dtype and fits(x) and fits(shortcut):
            return pointwise_conv_add(x, self.conv3.weight, shortcut)
        return self.drop_path(self.conv3(x)) + shortcut


class _AttentionModule(AttentionModule):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.mask._forward_hooks:  # those who look at the mask shall see the mask
            return super().forward(x)
        x = self.pre(check_channels(x, self.channels))
        trunk, logits = check_trunk_shape(self.trunk(x), x), self._logits(x)
        if fits(trunk, logits):
            x = gate(trunk, logits)
        else:
            x = torch.addcmul(trunk, torch.sigmoid(logits), trunk)
        return self.post(x)

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the mask is the sigmoid of; whoever calls the mask branch otherwise gets the mask."""
        act = self.mask.head.act
        act.deferred = True
        try:
            return self.mask(x)
        finally:
            act.deferred = False


class _DeferrableSigmoid(MaskActivation):
    """The end of a mask branch, left to its Attention Module where ``deferred``."""

    deferred = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.deferred else super().forward(x)


_FASTER: dict[type, type] = {
    nn.BatchNorm2d: _BatchNorm2d, BatchNormAct2d: _BatchNormAct2d, ResidualUnit: _ResidualUnit,
    ResidualUnitDown: _ResidualUnit}
