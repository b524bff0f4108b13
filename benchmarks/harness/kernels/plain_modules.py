"""What fused kernels must know of a module before they take its place, on a CPU and on a GPU."""
import torch
import torch.nn as nn

from ran_layers import AttentionModule, LocalMaskBranch, SoftMaskBranch
from ran_layers.fusion import only_runs
from ran_layers.layers.mask_branch import MaskActivation, MaskHead

# Without the first in AttentionNeXt, and more where an Attention Module was inserted.
LAYERS_OF_HEAD = ("norm1", "conv1", "norm2", "conv2", "act")


def are_unobserved(*modules: nn.Module) -> bool:
    """Whether to call ``modules`` is to run the forward of their classes, and nobody waits for their gradients."""
    return all(
        only_runs(module) and not module._backward_hooks and not module._backward_pre_hooks for module in modules)


def is_plain_conv(conv: nn.Module, size: int) -> bool:
    """Whether ``conv`` is a convolution of ``size`` and nothing else, of any equal strides."""
    return (
        type(conv) is nn.Conv2d and conv.bias is None and conv.groups == 1 and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros" and conv.kernel_size == (size, size)
        and conv.padding == (size // 2, size // 2) and conv.stride[0] == conv.stride[1])


def has_plain_gate(
        module: AttentionModule, act: type = MaskActivation, branches: tuple[type, ...] = (),
        heads: tuple[type, ...] = (),
) -> bool:
    """Whether the mask ends in a plain sigmoid, of the class ``act``, and weights the trunk as ``1 + M``.

    Args:
        branches, heads: Further classes of mask branches and of their heads, which have kernels.
    """
    mask = module.mask
    return (
        module.residual and type(mask) in (SoftMaskBranch, LocalMaskBranch, *branches)
        and type(mask.head) in (MaskHead, *heads)
        and type(mask.head.act) is act and mask.head.act.mask_act == "mixed")


def ends_in_gate(module: AttentionModule) -> bool:
    """Whether nothing is behind the sigmoid of the mask, or looks at it: that is to see the mask."""
    mask = module.mask
    return (are_unobserved(mask, mask.head, mask.head.act) and list(mask.head._modules)[-1] == "act"
            and list(mask._modules)[-1] == "head")


class DeferrableSigmoid(MaskActivation):
    """The end of a mask branch, left to its Attention Module where ``deferred``."""

    deferred = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.deferred else super().forward(x)


def logits_of(mask: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return what the mask is the sigmoid of, a :class:`DeferrableSigmoid`; whoever calls ``mask`` gets the mask."""
    act = mask.head.act
    act.deferred = True
    try:
        return mask(x)
    finally:
        act.deferred = False
