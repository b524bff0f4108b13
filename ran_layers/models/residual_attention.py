"""Residual Attention Networks for 32-px and 224-px images, in timm's form.

`Residual Attention Network for Image Classification` - https://arxiv.org/abs/1704.06904

Three families and a network of our own share one class:

- ``ran_att56``, ``ran_att92``, ``ran_attnext56``: the authors' ImageNet networks (Table 2), parameter for parameter.
- ``ran_att*_cifar_orig``: the paper's CIFAR networks (section 4.1), three stages at 32, 16 and 8 px.
- ``ran_att*_cifar``: the CIFAR networks of a student report on the paper, a quarter of the ImageNet widths behind a
  stem of stride 2, which makes them the fastest to train.
- ``ran_att92_cifar_wide``: three times the report's widths behind a stem of stride 1.
"""
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import calculate_drop_path_rates
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from ..layers import AttentionModule, ResidualUnit, ResNeXtUnit
from ..layers._args import LayerType, check_device_dtype, check_int, check_unit_layer, resolve_norm_act
from ..layers.residual_unit import is_preact
from ._cifar import cifar_cfgs
from ._pretrained import safetensors_only
from ._timm_interface import Stage, StagedNet, check_stages, feature_cfg

__all__ = ["ResidualAttentionNet"]


class ResidualAttentionNet(StagedNet):
    """Residual Attention Network (Wang et al. 2017, Table 2 and section 4.1).

    Shapes:
        input ``(batch, in_chans, height, width)``; logits ``(batch, num_classes)``.

    Args:
        channels: Output channels of each stage; the first stage keeps the stem's resolution, the others halve it.
        modules: Attention Modules in each stage.
        closing_units: Units after the Attention Modules in each stage.
        mask_depths: Poolings of the soft mask branches in each stage.
        stem_chs: Channels of the stem's convolution.
        stem_type: ``'7x7'`` (stride 2, BN, ReLU, max-pooling of stride 2), ``'3x3s2'`` or ``'3x3'`` (one convolution).
        unit_layer: The basic unit, a class called with
            ``(in_channels, out_channels, stride, act_layer=, norm_layer=, drop_path=, device=, dtype=)``.
        attention_args: Arguments of every :class:`~ran_layers.AttentionModule`, each in place of the network's own
            (``t``, ``r``, ``p``, ``mask``, ``learning``, ``mask_act``, ...). ``skips`` may be what one of the stages
            has room for; the others then have all of theirs. A ``trunk`` keeps its weights.
        num_classes: Number of classes; 0 for none.
        in_chans: Channels of the input image.
        global_pool: timm's pooling name; '' for none.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; earlier ones grow to it linearly.
        act_layer, norm_layer: timm names or classes.
        device, dtype: Where the parameters lie and their type, as in torch's layers.

    Raises:
        TypeError, ValueError: An argument is of the wrong type or outside its range; the message names it.

    Example:
        >>> net = ResidualAttentionNet(channels=(32, 64), modules=(1, 1), closing_units=(0, 2), mask_depths=(2, 1),
        ...                            stem_chs=16, stem_type="3x3", num_classes=10)
        >>> net(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """

    def __init__(
            self,
            channels: Sequence[int] = (256, 512, 1024, 2048),
            modules: Sequence[int] = (1, 1, 1, 0),
            closing_units: Sequence[int] = (0, 0, 0, 2),
            mask_depths: Sequence[int] = (3, 2, 1, 1),
            stem_chs: int = 64,
            stem_type: str = "7x7",
            unit_layer: Any = ResidualUnit,
            attention_args: dict[str, Any] | None = None,
            num_classes: int = 1000,
            in_chans: int = 3,
            global_pool: str = "avg",
            drop_rate: float = 0.0,
            drop_path_rate: float = 0.0,
            act_layer: LayerType = nn.ReLU,
            norm_layer: LayerType = nn.BatchNorm2d,
            device: Any = None,
            dtype: Any = None,
    ) -> None:
        super().__init__(num_classes, in_chans, drop_rate, drop_path_rate)
        dd = check_device_dtype(device, dtype)
        stem_chs = check_int("stem_chs", stem_chs, 1)
        layer_args: dict[str, Any] = dict(act_layer=act_layer, norm_layer=norm_layer, **dd)
        norm_act = resolve_norm_act(norm_layer, act_layer)
        channels, modules, closing_units, mask_depths = check_stages(
            channels=(channels, 1), modules=(modules, 0), closing_units=(closing_units, 0),
            mask_depths=(mask_depths, 1))
        check_unit_layer(unit_layer, ["drop_path", *layer_args], ("in_channels", "out_channels", "stride"))
        shared_args = {"unit_layer": unit_layer, **layer_args, **_check_attention_args(attention_args)}
        trunk = shared_args.get("trunk")
        if sum(modules) > 1 and isinstance(trunk, nn.Module):
            raise ValueError(f"attention_args: trunk is one module and cannot be in {sum(modules)} places")
        mask_depths = [check_int("mask_depth", shared_args.get("mask_depth", depth), 1) for depth in mask_depths]
        skips = shared_args.get("skips")
        if skips is not None:
            skips = check_int("skips", skips, 0)

        self.stem, stride = _create_stem(stem_type, in_chans, stem_chs, norm_act, dd)
        self.stem_levels = 1
        layers = list(self.stem._modules)
        pooled = layers[-1] == "pool"
        self.stem_feat_idx = len(layers) - 1 - pooled  # the last map before the pooling is the first level
        feature_info: list[dict[str, Any]] = [
            dict(num_chs=stem_chs, reduction=stride, module=f"stem.{layers[self.stem_feat_idx]}")]
        reduction = 2 * stride if pooled else stride
        depths = [1 + m + c for m, c in zip(modules, closing_units)]
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        in_channels = stem_chs
        for i, out_channels in enumerate(channels):
            stride = 1 if i == 0 else 2
            rates = iter(drop_paths[i])
            module_args = {**shared_args, "mask_depth": mask_depths[i]}
            if skips is not None and skips < max(mask_depths):
                module_args["skips"] = min(skips, mask_depths[i] - 1)
            # The first unit alone changes channels and resolution (Table 2), so that all else may be a module.
            self.stages.append(Stage(nn.Sequential(
                unit_layer(in_channels, out_channels, stride, drop_path=next(rates), **layer_args),
                *(AttentionModule(out_channels, **{"drop_path": next(rates), **module_args})
                  for _ in range(modules[i])),
                *(unit_layer(out_channels, drop_path=next(rates), **layer_args) for _ in range(closing_units[i])),
            )))
            in_channels = out_channels
            reduction *= stride
            feature_info.append(dict(num_chs=out_channels, reduction=reduction, module=f"stages.{i}"))

        # Units that are not pre-activated (ResNeXt) end in their own ReLU.
        last_unit = shared_args["unit_layer"] if modules[-1] and not closing_units[-1] else unit_layer
        self.norm = norm_act(in_channels, **dd) if is_preact(last_unit) else nn.Identity()
        self.set_head(feature_info, global_pool, dd)
        self.init_weights(keep=trunk if sum(modules) else None)

    @torch.jit.ignore
    def init_weights(self, keep: nn.Module | None = None) -> None:
        """He initialisation of the convolutions, small normal weights in the classifier, norms as PyTorch does.

        Args:
            keep: A module of the network whose weights stay as they are, as those of a trunk that came trained.
        """
        kept = set() if keep is None else set(keep.modules())
        for module in self.modules():
            if module in kept:
                continue
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                else:
                    nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif callable(reset := getattr(module, "reset_parameters", None)):
                reset()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that put the parameters into ordered groups, for timm's layer decay."""
        fine = [(r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        return dict(stem=r"^stem", blocks=r"^stages\.(\d+)" if coarse else fine)


def _check_attention_args(value: Any) -> dict[str, Any]:
    """Return the arguments of the Attention Modules as a dictionary."""
    if not isinstance(value, Mapping | None):
        raise TypeError(f"attention_args must be a dictionary or None, got {value!r} ({type(value).__name__})")
    for name, reason in (("channels", "which are those of each stage"), ("device", "which is the network's"),
                         ("dtype", "which is the network's")):
        if value and name in value:
            raise ValueError(f"attention_args must not hold {name}, {reason}")
    return dict(value or {})


def _create_stem(
        stem_type: str, in_chans: int, stem_chs: int, norm_act: Any, dd: dict[str, Any]) -> tuple[nn.Sequential, int]:
    """Return the stem and the stride of its convolution."""
    stem = nn.Sequential()
    if stem_type == "7x7":
        stem.add_module("conv", nn.Conv2d(in_chans, stem_chs, 7, 2, 3, bias=False, **dd))
        stem.add_module("norm", norm_act(stem_chs, **dd))
        stem.add_module("pool", nn.MaxPool2d(3, 2, 1))
        return stem, 2
    if stem_type in ("3x3", "3x3s2"):
        stride = 2 if stem_type == "3x3s2" else 1
        stem.add_module("conv", nn.Conv2d(in_chans, stem_chs, 3, stride, 1, bias=False, **dd))
        return stem, stride
    raise ValueError(f"stem_type must be '7x7', '3x3' or '3x3s2', got {stem_type!r}")


def _create_ran(variant: str, pretrained: bool = False, **kwargs: Any) -> ResidualAttentionNet:
    return build_model_with_cfg(
        ResidualAttentionNet, variant, pretrained,
        feature_cfg=feature_cfg(kwargs.get("channels", (256, 512, 1024, 2048)), stem_levels=1),
        **safetensors_only(variant, pretrained, kwargs),
    )


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000, "input_size": (3, 224, 224), "min_input_size": (3, 64, 64), "pool_size": (7, 7),
        "crop_pct": 0.875, "interpolation": "bilinear", "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv", "classifier": "head.fc", "license": "apache-2.0",
        "paper_name": "Residual Attention Network for Image Classification", "paper_ids": "arXiv:1704.06904",
        **kwargs,
    }


default_cfgs = generate_default_cfgs({
    "ran_att56.untrained": _cfg(),
    "ran_att92.untrained": _cfg(),
    "ran_attnext56.untrained": _cfg(),
    **cifar_cfgs("ran_att56_cifar", _cfg, pool_size=(2, 2)),
    **cifar_cfgs("ran_att92_cifar", _cfg, pool_size=(2, 2)),
    **cifar_cfgs("ran_att92_cifar_wide", _cfg, pool_size=(4, 4)),
    **cifar_cfgs("ran_att56_cifar_orig", _cfg, pool_size=(8, 8)),
    **cifar_cfgs("ran_att92_cifar_orig", _cfg, pool_size=(8, 8)),
    **cifar_cfgs("ran_att128_cifar_orig", _cfg, pool_size=(8, 8)),
    **cifar_cfgs("ran_att164_cifar_orig", _cfg, pool_size=(8, 8)),
    **cifar_cfgs("ran_att236_cifar_orig", _cfg, pool_size=(8, 8)),
    **cifar_cfgs("ran_att452_cifar_orig", _cfg, pool_size=(8, 8)),
})

# What the networks of a family share. The report's CIFAR widths are a quarter of the ImageNet ones.
_CIFAR_REPORT: dict[str, Any] = dict(channels=(64, 128, 256, 512), stem_chs=64, stem_type="3x3s2")
_CIFAR_ORIG: dict[str, Any] = dict(
    channels=(64, 128, 256), closing_units=(1, 1, 1), mask_depths=(3, 2, 1), stem_chs=16, stem_type="3x3")


@register_model
def ran_att56(pretrained: bool = False, **kwargs: Any) -> ResidualAttentionNet:
    """Attention-56 for ImageNet (Table 2): 31.8 M parameters."""
    return _create_ran("ran_att56", pretrained, **{"modules": (1, 1, 1, 0), **kwargs})


@register_model
def ran_att92(pretrained: bool = False, **kwargs: Any) -> ResidualAttentionNet:
    """Attention-92 for ImageNet (Table 2): 52.5 M parameters."""
    return _create_ran("ran_att92", pretrained, **{"modules": (1, 2, 3, 0), **kwargs})


@register_model
def ran_attnext56(pretrained: bool = False, **kwargs: Any) -> ResidualAttentionNet:
    """AttentionNeXt-56 for ImageNet (section 4.2): ResNeXt units, 31.3 M parameters."""
    return _create_ran("ran_attnext56", pretrained, **{"unit_layer": ResNeXtUnit, **kwargs})


@register_model
def ran_att56_cifar(pretrained: bool = False, **kwargs: Any) -> ResidualAttentionNet:
    """The report's Attention-56 for CIFAR (its Table 2): 1.88 M parameters."""
    return _create_ran("ran_att56_cifar", pretrained, **{**_CIFAR_REPORT, **kwargs})


@register_model
def ran_att92_cifar(pretrained: bool = False, **kwargs: Any) -> ResidualAttentionNet:
    """The report's Attention-92 for CIFAR (its Table 2): 2.69 M parameters."""
    return _create_ran("ran_att92_cifar", pretrained, **{**_CIFAR_REPORT, "modules": (2, 2, 2, 0), **kwargs})


@register_model
def ran_att92_cifar_wide(pretrained: bool = False, **kwargs: Any) -> ResidualAttentionNet:
    """Our wide Attention-92 for CIFAR: three times the report's widths, stem of stride 1: 24.0 M parameters."""
    args = dict(channels=(192, 384, 768, 1536), modules=(2, 2, 2, 0), stem_chs=64, stem_type="3x3")
    return _create_ran("ran_att92_cifar_wide", pretrained, **{**args, **kwargs})


@register_model
def ran_att56_cifar_orig(pretrained: bool = False, **kwargs: Any) -> ResidualAttentionNet:
    """The paper's Attention-56 for CIFAR (section 4.1), m = 1: 1.03 M parameters."""
    return _create_ran("ran_att56_cifar_orig", pretrained, **{**_CIFAR_ORIG, "modules": (1, 1, 1), **kwargs})


@register_model
def ran_att92_cifar_orig(pretrained: bool = False, **kwargs: Any) -> ResidualAttentionNet:
    """The paper's Attention-92 for CIFAR (section 4.1), m = 2: 1.84 M parameters."""
    return _create_ran("ran_att92_cifar_orig", pretrained, **{**_CIFAR_ORIG, "modules": (2, 2, 2), **kwargs})


@register_model
def ran_att128_cifar_orig(pretrained: bool = False, **kwargs: Any) -> ResidualAttentionNet:
    """The paper's Attention-128 for CIFAR (section 4.1), m = 3: 2.65 M parameters."""
    return _create_ran("ran_att128_cifar_orig", pretrained, **{**_CIFAR_ORIG, "modules": (3, 3, 3), **kwargs})


@register_model
def ran_att164_cifar_orig(pretrained: bool = False, **kwargs: Any) -> ResidualAttentionNet:
    """The paper's Attention-164 for CIFAR (section 4.1), m = 4: 3.46 M parameters."""
    return _create_ran("ran_att164_cifar_orig", pretrained, **{**_CIFAR_ORIG, "modules": (4, 4, 4), **kwargs})


@register_model
def ran_att236_cifar_orig(pretrained: bool = False, **kwargs: Any) -> ResidualAttentionNet:
    """The paper's Attention-236 for CIFAR (Table 6), m = 6: 5.08 M parameters."""
    return _create_ran("ran_att236_cifar_orig", pretrained, **{**_CIFAR_ORIG, "modules": (6, 6, 6), **kwargs})


@register_model
def ran_att452_cifar_orig(pretrained: bool = False, **kwargs: Any) -> ResidualAttentionNet:
    """The paper's Attention-452 for CIFAR (Table 6), m = 6 with p = 2, t = 4, r = 3: 10.2 M parameters."""
    attention_args = {"p": 2, "t": 4, "r": 3, **_check_attention_args(kwargs.pop("attention_args", None))}
    args = dict(_CIFAR_ORIG, modules=(6, 6, 6), attention_args=attention_args)
    return _create_ran("ran_att452_cifar_orig", pretrained, **{**args, **kwargs})
