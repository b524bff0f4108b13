"""What `torch.compile` gets of a network: its units, one by one, or the whole."""
from typing import Any

import torch
import torch._dynamo
import torch.nn as nn
from timm.models.resnet import BasicBlock, Bottleneck
from timm.models.resnetv2 import PreActBasic, PreActBottleneck

from harness.errors import RunError
from ran_layers import ResidualUnit, ResidualUnitDown, ResNeXtUnit
from ran_layers.layers.mask_branch import MaskHead

_UNITS = (ResidualUnit, ResidualUnitDown, ResNeXtUnit, MaskHead, BasicBlock, Bottleneck, PreActBasic, PreActBottleneck)
# A network has some twenty kinds of units, told apart by channels and size of the map; torch gives up after eight.
_KINDS_OF_UNITS = 256


def compile_model(model: nn.Module, mode: str) -> Any:
    """Return ``model`` compiled by ``torch.compile``: unit by unit, as a whole, or (``"off"``) not at all.

    Units of one kind share their code, so that a deep network compiles in the time of a shallow one. The blocks of
    timm's ResNets are units too; a network that does not consist of units for the most part is compiled as a whole.
    """
    if mode == "off":
        return model
    units = _units(model) if mode == "units" else []
    if not units and any(_has_kernels(module) for module in model.modules()):
        raise RunError("--gpu-kernels: this network would be compiled as a whole, which leaves nothing to them; give "
                       "--compile off or leave the kernels out")
    if not units:
        return torch.compile(model, dynamic=False)  # each resolution its own kernels
    config: Any = torch._dynamo.config  # by its older name, which all versions know
    config.cache_size_limit = max(config.cache_size_limit, _KINDS_OF_UNITS)
    for unit in units:
        if not any(_has_kernels(module) for module in unit.modules()):
            unit.compile(dynamic=False)
    return model


def _units(model: nn.Module) -> list[nn.Module]:
    """Return the outermost units of ``model``, none if they do not hold most of its parameters."""
    units: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if _is_unit(module) and not any(name.startswith(f"{outer}.") for outer in units):
            units[name] = module
    inside = sum(param.numel() for unit in units.values() for param in unit.parameters())
    return list(units.values()) if 2 * inside >= sum(param.numel() for param in model.parameters()) else []


def _has_kernels(module: nn.Module) -> bool:
    """Whether the module calls the kernels of `gpu_kernels.py`, which Triton compiles by itself."""
    return hasattr(module, "kernel_zeros")


def _is_unit(module: nn.Module) -> bool:
    return type(module) in _UNITS or (_has_kernels(module) and isinstance(module, _UNITS))
