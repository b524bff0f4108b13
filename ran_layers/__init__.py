"""Residual Attention Networks: the layers, and the networks as timm models.

    >>> import timm, ran_layers
    >>> model = timm.create_model("ran_att56_cifar")
"""
from . import models
from .fusion import fuse
from .hub import push_to_hub
from .insert import insert_attention, remove_attention
from .layers import AttentionModule, LocalMaskBranch, ResidualUnit, ResidualUnitDown, ResNeXtUnit, SoftMaskBranch
from .masks import attention_maps, record_masks

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
