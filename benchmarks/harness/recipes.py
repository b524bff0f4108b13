"""The training recipes: tables of hyper-parameters, and the optimiser and learning rate they describe.

Each entry of a recipe is a command line flag of `cifar.py` too (`batch_size` is `--batch-size`).
"""
import math
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn as nn

from harness.errors import RunError
from harness.muon import Muon


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of one training run."""

    epochs: int = 60
    batch_size: int = 128
    optimizer: str = "sgd"  # sgd (Nesterov), adam, muon
    lr: float = 0.2
    momentum: float = 0.9
    muon_momentum: float = 0.95  # muon: of the convolutions it orthogonalises; `momentum` is that of the rest
    muon_sgd_lr: float = 0.1  # muon: of the rest, the first convolution, normalisations and the classifier
    weight_decay: float = 5e-4  # on convolution and linear weights; with muon on those it orthogonalises
    schedule: str = "onecycle"  # onecycle (linear up, linear down to 0), step, constant
    warmup: float = 0.2  # onecycle: fraction of the training on the way up
    milestones: tuple[float, ...] = ()  # step: fractions of the training at which lr is divided by 10
    label_smoothing: float = 0.1
    ema_decay: float = 0.0  # moving average of the weights per step; 0 is off
    pad: int = 4  # random crop after padding by this many pixels
    pad_mode: str = "reflect"  # reflect, zeros
    flip: str = "alternate"  # random, alternate (each image flipped in every second epoch), none
    rotate: float = 0.0  # largest rotation, degrees
    shift: float = 0.0  # largest shift, fraction of the image
    cutout: int = 0  # side of the erased square, pixels
    mixup: float = 0.0  # alpha of the Beta distribution; 0 is off
    cutmix: float = 0.0
    resolutions: tuple[float, ...] = ()  # (from fraction, pixels) pairs, flat; training images shrink to these
    standardize: bool = True  # channel means and deviations; otherwise pixels / 255
    drop_path: float = 0.0


RECIPES: dict[str, Recipe] = {
    # Plain one-cycle SGD, for a first look.
    "quick": Recipe(epochs=10),
    # The report, section 4: "learning rate 0.1, decay 0.0001, momentum 0.9 ... divided by 10 at 80th and 120th epoch".
    "report": Recipe(
        epochs=160, batch_size=64, lr=0.1, weight_decay=1e-4, schedule="step", milestones=(0.5, 0.75),
        label_smoothing=0.0, pad=0, flip="random", rotate=15.0, shift=0.1, standardize=False,
    ),
    # The paper, section 4.1: 160k iterations of 64 images, lr 0.1 divided by 10 at 64k and 96k.
    "paper": Recipe(
        epochs=205, batch_size=64, lr=0.1, weight_decay=1e-4, schedule="step", milestones=(0.4, 0.6),
        label_smoothing=0.0, pad_mode="zeros", flip="random",
    ),
    "best": Recipe(
        epochs=60, batch_size=256, optimizer="muon", lr=0.04, weight_decay=0.03, warmup=0.1, ema_decay=0.996,
        resolutions=(0.0, 24, 0.4, 32),
    ),
}

# What a data set changes in every recipe: digits have a meaning that flips and large shifts destroy.
DATASET_CHANGES: dict[str, dict[str, Any]] = {
    "digits": dict(epochs=8, batch_size=32, lr=0.05, pad=2, pad_mode="zeros", flip="none"),
}

# Bounds of what is a share, or a sum that converges.
_BELOW_ONE = ("momentum", "muon_momentum", "ema_decay", "drop_path")
_UP_TO_ONE = ("warmup", "label_smoothing", "shift")

CHOICES: dict[str, tuple[str, ...]] = {
    "optimizer": ("sgd", "adam", "muon"),
    "schedule": ("onecycle", "step", "constant"),
    "pad_mode": ("reflect", "zeros"),
    "flip": ("alternate", "random", "none"),
}


def make_recipe(name: str, dataset: str, overrides: dict[str, Any]) -> Recipe:
    """Return the recipe ``name`` for ``dataset`` with ``overrides`` in place of its own values."""
    recipe = replace(RECIPES[name], **{**DATASET_CHANGES.get(dataset, {}), **overrides})
    for name in ("epochs", "batch_size"):
        if getattr(recipe, name) < 1:
            raise RunError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(recipe, name)}")
    for field in fields(recipe):
        value = getattr(recipe, field.name)
        flag = "--" + field.name.replace("_", "-")
        if field.name in CHOICES and value not in CHOICES[field.name]:
            raise RunError(f"{flag} must be one of {', '.join(CHOICES[field.name])}, got {value}")
        if isinstance(value, (int, float)) and not 0 <= value < math.inf:  # nor NaN
            raise RunError(f"{flag} must be finite and not negative, got {value}")
        if field.name in _BELOW_ONE and value >= 1:
            raise RunError(f"{flag} must be below 1, got {value:g}")
        if field.name in _UP_TO_ONE and value > 1:
            raise RunError(f"{flag} must be at most 1, got {value:g}")
    if len(recipe.resolutions) % 2:
        raise RunError(f"--resolutions must be pairs of fraction and pixels, got {recipe.resolutions}")
    fractions, pixels = (*recipe.milestones, *recipe.resolutions[::2]), recipe.resolutions[1::2]
    if any(side % 1 for side in pixels):
        raise RunError(f"--resolutions must have whole numbers of pixels, got {recipe.resolutions}")
    if not all(0 <= fraction <= 1 for fraction in fractions) or not all(1 <= n < math.inf for n in pixels):
        raise RunError("--milestones and --resolutions must have fractions from 0 to 1 and at least 1 pixel, got "
                       f"{recipe.milestones} and {recipe.resolutions}")
    if list(recipe.resolutions[::2]) != sorted(recipe.resolutions[::2]):
        raise RunError(f"--resolutions must have rising fractions, got {recipe.resolutions}")
    return recipe


def lr_scale(recipe: Recipe, progress: float) -> float:
    """Factor on the learning rate at ``progress``, the fraction of the training that is done."""
    if recipe.schedule == "constant":
        return 1.0
    if recipe.schedule == "step":
        return 0.1 ** sum(progress >= milestone for milestone in recipe.milestones)
    if progress < recipe.warmup:
        return progress / recipe.warmup
    return (1 - progress) / (1 - recipe.warmup)


def resolution_at(recipe: Recipe, progress: float, full: int) -> int:
    """Side of the training images in pixels at ``progress``."""
    for start, pixels in zip(recipe.resolutions[::2], recipe.resolutions[1::2]):
        if progress >= start:
            full = int(pixels)
    return full


def resolutions(recipe: Recipe, full: int) -> list[int]:
    """Sides of the training images in the order in which they come."""
    changes = sorted({0.0, *recipe.resolutions[::2]})
    return list(dict.fromkeys(resolution_at(recipe, start, full) for start in changes))


def pixels_seen(recipe: Recipe, progress: float, full: int) -> float:
    """Pixels of each training image up to ``progress``, in those of one image times the whole training.

    The time that a training takes goes by it.
    """
    changes = sorted({0.0, progress, *(start for start in recipe.resolutions[::2] if start < progress)})
    return sum(resolution_at(recipe, start, full) ** 2 * (end - start) for start, end in pairwise(changes))


def make_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """Return the recipe's optimiser; weight decay is for weights of convolutions and linear layers only.

    With Muon it is for those that Muon orthogonalises: not for the first convolution and the classifier.

    Raises:
        RunError: The optimiser is Muon, and the network has nothing for it.

    Each group's ``base_lr`` is what the schedule scales.
    """
    optimizer = _make_optimizer(recipe, model)
    for group in optimizer.param_groups:
        group["base_lr"] = group["lr"]
    return optimizer


def _make_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    if recipe.optimizer == "muon":
        # As its authors advise, the first convolution and the classifier stay with SGD.
        convs = [p for p in model.parameters() if p.ndim == 4][1:]
        if not convs:
            raise RunError("--optimizer muon orthogonalises the weights of convolutions beyond the first, of which "
                           "this network has none; give --optimizer sgd or adam, and an --lr for it")
        chosen = {id(p) for p in convs}
        rest = [p for p in model.parameters() if id(p) not in chosen]
        return Muon([
            dict(params=convs, lr=recipe.lr, momentum=recipe.muon_momentum, weight_decay=recipe.weight_decay,
                 orthogonalize=True),
            dict(params=rest, lr=recipe.muon_sgd_lr, momentum=recipe.momentum),
        ])
    decay = [p for p in model.parameters() if p.ndim >= 2]
    no_decay = [p for p in model.parameters() if p.ndim < 2]
    groups: list[dict[str, Any]] = [
        dict(params=decay, weight_decay=recipe.weight_decay), dict(params=no_decay, weight_decay=0.0)]
    if recipe.optimizer == "adam":
        # Capturable: its step count lies where a CUDA graph can raise it.
        return torch.optim.Adam(groups, lr=recipe.lr, fused=True, capturable=decay[0].is_cuda)
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0, fused=True)
