"""Residual Attention Networks: the layers, and the networks as timm models.

    >>> import timm, ran_layers
    >>> model = timm.create_model("ran_att56_cifar")
"""
from typing import TYPE_CHECKING, Any

from . import models
from .fuse import fuse
from .insert import insert_attention, remove_attention
from .layers import AttentionModule, LocalMaskBranch, ResidualUnit, ResidualUnitDown, ResNeXtUnit, SoftMaskBranch
from .masks import attention_maps, record_masks

if TYPE_CHECKING:
    from .hub import push_to_hub

__all__ = [
    "AttentionModule",
    "LocalMaskBranch",
    "ResNeXtUnit",
    "ResidualUnit",
    "ResidualUnitDown",
    "SoftMaskBranch",
    "attention_maps",
    "fuse",
    "insert_attention",
    "models",
    "push_to_hub",
    "record_masks",
    "remove_attention",
]
__version__ = "0.1.0"


if not TYPE_CHECKING:  # to a type checker, it would make every name one of this package
    def __getattr__(name: str) -> Any:
        # Publishing is imported when it is asked for: most users only build networks.
        if name == "push_to_hub":
            from .hub import push_to_hub
            return push_to_hub
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
