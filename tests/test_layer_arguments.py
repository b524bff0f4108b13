"""Wrong arguments of the layers: each gets one error that names the argument, what came and what is allowed."""
import functools

import pytest
import torch
import torch.nn as nn

from ran_layers import AttentionModule, LocalMaskBranch, ResidualUnit, ResidualUnitDown, ResNeXtUnit, SoftMaskBranch


def batch_norm(channels, device=None, dtype=None):
    return nn.BatchNorm2d(channels, device=device, dtype=dtype)


class LayerNorm2d(nn.LayerNorm):
    """A class of one's own, with the name of one of timm's."""


@pytest.mark.parametrize(("layer", "args", "error", "message"), [
    (AttentionModule, {"channels": 0}, ValueError, "channels must be at least 1, got 0"),
    (AttentionModule, {"channels": "8"}, TypeError, "channels must be an int of at least 1, got '8' (str)"),
    (AttentionModule, {"channels": 8.0}, TypeError, "channels must be an int of at least 1, got 8.0 (float)"),
    (AttentionModule, {"channels": True}, TypeError, "channels must be an int of at least 1, got True (bool)"),
    (AttentionModule, {"channels": None}, TypeError, "channels must be an int of at least 1, got None (NoneType)"),
    (AttentionModule, {"p": -1}, ValueError, "p must be at least 0, got -1"),
    (AttentionModule, {"t": 1.5}, TypeError, "t must be an int of at least 0, got 1.5 (float)"),
    (AttentionModule, {"r": 0}, ValueError, "r must be at least 1, got 0"),
    (AttentionModule, {"r": 0, "mask": "local"}, ValueError, "r must be at least 1, got 0"),
    (AttentionModule, {"mask_depth": 0}, ValueError, "mask_depth must be at least 1, got 0"),
    (AttentionModule, {"mask_depth": [3]}, TypeError, "mask_depth must be an int of at least 1, got [3] (list)"),
    (AttentionModule, {"skips": -1}, ValueError, "skips must be at least 0, got -1"),
    (AttentionModule, {"skips": 2, "mask_depth": 2}, ValueError, "skips must be at most mask_depth - 1 = 1, got 2"),
    (AttentionModule, {"mask": "hard"}, ValueError, "mask must be one of 'soft', 'local', got 'hard'"),
    (AttentionModule, {"mask": 1}, TypeError, "mask must be one of 'soft', 'local', got 1 (int)"),
    (AttentionModule, {"learning": "x"}, ValueError, "learning must be one of 'residual', 'naive', got 'x'"),
    (AttentionModule, {"mask_act": "relu"}, ValueError,
     "mask_act must be one of 'mixed', 'channel', 'spatial', got 'relu'"),
    (AttentionModule, {"mask_act": None, "mask": "local"}, TypeError,
     "mask_act must be one of 'mixed', 'channel', 'spatial', got None (NoneType)"),
    (AttentionModule, {"bottle_ratio": 0}, ValueError, "bottle_ratio must be in (0, 1], got 0"),
    (AttentionModule, {"bottle_ratio": 2}, ValueError, "bottle_ratio must be in (0, 1], got 2"),
    (AttentionModule, {"bottle_ratio": "4"}, TypeError, "bottle_ratio must be a number in (0, 1], got '4' (str)"),
    (AttentionModule, {"drop_path": 1.0}, ValueError, "drop_path must be in [0, 1), got 1.0"),
    (AttentionModule, {"drop_path": float("nan")}, ValueError, "drop_path must be in [0, 1), got nan"),
    (AttentionModule, {"act_layer": "nope"}, ValueError, "act_layer='nope'"),
    (AttentionModule, {"act_layer": None}, TypeError, "act_layer must be a layer's timm name or class, got None"),
    (AttentionModule, {"act_layer": nn.Linear}, ValueError, "act_layer=<class 'torch.nn.modules.linear.Linear'>"),
    (AttentionModule, {"norm_layer": "nope"}, ValueError, "norm_layer='nope'"),
    (AttentionModule, {"norm_layer": 5}, TypeError, "norm_layer must be a layer's timm name or class, got 5 (int)"),
    (AttentionModule, {"norm_layer": nn.Linear}, ValueError, "norm_layer=<class 'torch.nn.modules.linear.Linear'>"),
    (AttentionModule, {"unit_layer": 5}, TypeError, "unit_layer must be a layer class, got 5 (int)"),
    (AttentionModule, {"trunk": "conv"}, TypeError, "trunk must be an nn.Module or None, got 'conv' (str)"),
    (AttentionModule, {"device": "gpu"}, ValueError, "'cuda:1', ...) or None, got 'gpu'"),
    (AttentionModule, {"dtype": "float32"}, TypeError,
     "dtype must be a floating-point torch.dtype or None, got 'float32' (str)"),
    (LocalMaskBranch, {"units": 0, "dtype": 32}, TypeError,
     "dtype must be a floating-point torch.dtype or None, got 32 (int)"),
    (AttentionModule, {"dtype": torch.int64}, TypeError,
     "dtype must be a floating-point torch.dtype or None, got torch.int64"),
    (AttentionModule, {"mask": "local", "skips": 0}, ValueError,
     "skips must be None for mask='local', which has no skip connections, got 0"),
    (AttentionModule, {"unit_layer": nn.Conv2d}, TypeError, "Conv2d cannot be: missing a required argument: 'out_chan"),
    (SoftMaskBranch, {"depth": 2}, TypeError, "ResidualUnit cannot be: got an unexpected keyword argument 'depth'"),
    (LocalMaskBranch, {"mask_depth": 2}, TypeError, "unit_layer must be called with channels and act_layer,"),
    (SoftMaskBranch, {"channels": -8}, ValueError, "channels must be at least 1, got -8"),
    (SoftMaskBranch, {"mask_depth": "3"}, TypeError, "mask_depth must be an int of at least 1, got '3' (str)"),
    (SoftMaskBranch, {"r": None}, TypeError, "r must be an int of at least 1, got None (NoneType)"),
    (SoftMaskBranch, {"skips": 1}, ValueError, "skips must be at most mask_depth - 1 = 0, got 1"),
    (SoftMaskBranch, {"unit_layer": "x"}, TypeError, "unit_layer must be a layer class, got 'x' (str)"),
    (LocalMaskBranch, {"units": -1}, ValueError, "units must be at least 0, got -1"),
    (LocalMaskBranch, {"unit_layer": None}, TypeError, "unit_layer must be a layer class, got None (NoneType)"),
    (ResidualUnit, {"in_channels": 0}, ValueError, "in_channels must be at least 1, got 0"),
    (ResidualUnit, {"out_channels": "8"}, TypeError, "out_channels must be an int of at least 1, got '8' (str)"),
    (ResidualUnit, {"device": 1.5}, TypeError, "device must be a torch.device"),
    (AttentionModule, {"act_layer": object}, TypeError, "act_layer must be a layer's timm name or class, got <class"),
    (AttentionModule, {"unit_layer": object}, TypeError, "unit_layer must be a layer class, got <class 'object'>"),
    (AttentionModule, {"norm_layer": "inplaceabn"}, ValueError,
     "norm_layer must take 8 channels and the arguments device, dtype, 'inplaceabn' does not"),
    (AttentionModule, {"norm_layer": "groupnorm"}, ValueError, "(num_channels (8) must be divisible by num_groups"),
    (AttentionModule, {"act_layer": ""}, ValueError, "act_layer=''"),
    (ResNeXtUnit, {"act_layer": "", "groups": 1}, ValueError, "act_layer=''"),
    (AttentionModule, {"norm_layer": functools.partial(nn.GroupNorm, 4)}, ValueError,
     "norm_layer must be a partial with arguments by name, which timm keeps, got functools.partial("),
    (AttentionModule, {"norm_layer": batch_norm}, ValueError,
     "as .act, as timm has it; batch_norm returns BatchNorm2d"),
    (AttentionModule, {"norm_layer": nn.LayerNorm}, ValueError,
     "norm_layer must take maps (batch, channels, height, width), as 'layernorm2d' does"),
    (AttentionModule, {"norm_layer": "layernorm"}, ValueError, "'layernorm' takes channels last"),
    (AttentionModule, {"norm_layer": LayerNorm2d}, ValueError,
     "norm_layer must be a timm name, a class of torch or timm, or a function that returns"),
    (AttentionModule, {"norm_layer": functools.partial(LayerNorm2d, eps=1e-3)}, ValueError,
     "norm_layer must be a timm name, a class of torch or timm, or a function"),
    (AttentionModule, {"norm_layer": "evonorms0"}, ValueError,
     "norm_layer must take 8 channels, 'evonorms0' has 32 groups of them"),
    (AttentionModule, {"unit_layer": functools.partial(ResidualUnit, act_layer=nn.SiLU)}, ValueError,
     "unit_layer must not bind act_layer, which the units are given anew; pass act_layer= beside it"),
    (ResidualUnit, {"stride": 0}, ValueError, "stride must be at least 1, got 0"),
    (ResidualUnit, {"groups": 3}, ValueError,
     "groups must divide the inner channels (out_channels * bottle_ratio = 2), got 3"),
    (ResidualUnitDown, {"stride": 1}, TypeError, "ResidualUnitDown has stride 2, got stride=1"),
    (ResNeXtUnit, {"drop_path": -0.1, "groups": 1}, ValueError, "drop_path must be in [0, 1), got -0.1"),
])
def test_wrong_arguments(layer, args, error, message):
    first = "channels" if layer in (AttentionModule, SoftMaskBranch, LocalMaskBranch) else "in_channels"
    with pytest.raises(error) as raised:
        layer(**{first: 8, **args})
    assert message in str(raised.value)
