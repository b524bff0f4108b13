"""Residual Attention Networks: the layers, and the networks as timm models.

    >>> import timm, ran_layers
    >>> model = timm.create_model("ran_att56_cifar")
"""
from . import models
from .layers import AttentionModule, LocalMaskBranch, ResidualUnit, ResidualUnitDown, ResNeXtUnit, SoftMaskBranch

__all__ = [
    "AttentionModule",
    "LocalMaskBranch",
    "ResNeXtUnit",
    "ResidualUnit",
    "ResidualUnitDown",
    "SoftMaskBranch",
    "models",
]
__version__ = "0.1.0"
