"""The building blocks of Residual Attention Networks."""
from .attention_module import AttentionModule
from .mask_branch import LocalMaskBranch, MaskActivation, SoftMaskBranch
from .residual_unit import ResidualUnit, ResidualUnitDown, ResNeXtUnit

__all__ = [
    "AttentionModule",
    "LocalMaskBranch",
    "MaskActivation",
    "ResNeXtUnit",
    "ResidualUnit",
    "ResidualUnitDown",
    "SoftMaskBranch",
]
