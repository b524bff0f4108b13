"""The training recipes: tables of hyper-parameters, and the optimiser and learning rate they describe.

Each entry of a recipe is a command line flag of `cifar.py` too (`batch_size` is `--batch-size`).
"""
import math
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn as nn

from harness.errors import RunError
from harness.muon import Muon


def setting(default: Any, meaning: str) -> Any:
    """Return a field of a recipe, with what its flag's help says."""
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of one training run."""

    epochs: int = setting(60, "passes over the training images")
    batch_size: int = setting(128, "images of a step, of all processes together")
    optimizer: str = setting(
        "sgd", "Nesterov SGD, Adam, or Muon, which orthogonalises the updates of all convolutions but the first, with "
        "SGD for the rest")
    lr: float = setting(0.2, "highest learning rate; of what Muon orthogonalises, where that is the optimizer")
    momentum: float = setting(0.9, "of SGD")
    muon_momentum: float = setting(0.95, "of what Muon orthogonalises")
    muon_sgd_lr: float = setting(0.1, "highest learning rate of what Muon leaves to SGD")
    weight_decay: float = setting(
        5e-4, "of the weights of convolutions and linear layers; with Muon, of those that it orthogonalises")
    schedule: str = setting(
        "onecycle", "of the learning rate: linearly up, then down to 0; divided by 10 at each milestone; constant")
    warmup: float = setting(0.2, "share of the training on the way up of onecycle")
    milestones: tuple[float, ...] = setting((), "of step, as shares of the training")
    label_smoothing: float = setting(0.1, "share of the target that all classes have in common")
    ema_decay: float = setting(0.0, "of the moving average of the weights, which is kept, for each step; 0 is none")
    pad: int = setting(4, "pixels around an image before it is cropped at random to its size")
    pad_mode: str = setting("reflect", "what those pixels are")
    flip: str = setting(
        "alternate", "mirror images: each in every second epoch, at random, or none")
    rotate: float = setting(0.0, "largest rotation, degrees")
    shift: float = setting(0.0, "largest shift, as a share of the image")
    cutout: int = setting(0, "side of a square that is erased from each image, pixels")
    mixup: float = setting(0.0, "alpha of the Beta distribution by which images are mixed; 0 is off")
    cutmix: float = setting(0.0, "alpha of the Beta distribution by which rectangles are exchanged; 0 is off")
    resolutions: tuple[float, ...] = setting(
        (), "pairs of a share of the training and the pixels to which images are shrunk from there on; none: full size")
    standardize: bool = setting(True, "by mean and deviation of each channel; otherwise pixels are divided by 255")
    drop_path: float = setting(0.0, "highest rate of stochastic depth, of models that have it")


RECIPES: dict[str, Recipe] = {
    # One-cycle SGD for a first look, in the least time: small images first, and little augmentation.
    "quick": Recipe(epochs=15, pad=2, resolutions=(0.0, 16, 0.3, 24, 0.6, 32)),
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
    for entry in fields(recipe):
        value = getattr(recipe, entry.name)
        flag = "--" + entry.name.replace("_", "-")
        if entry.name in CHOICES and value not in CHOICES[entry.name]:
            raise RunError(f"{flag} must be one of {', '.join(CHOICES[entry.name])}, got {value}")
        if isinstance(value, (int, float)) and not 0 <= value < math.inf:  # nor NaN
            raise RunError(f"{flag} must be finite and not negative, got {value}")
        if entry.name in _BELOW_ONE and value >= 1:
            raise RunError(f"{flag} must be below 1, got {value:g}")
        if entry.name in _UP_TO_ONE and value > 1:
            raise RunError(f"{flag} must be at most 1, got {value:g}")
    if len(recipe.resolutions) % 2:
        raise RunError(f"--resolutions must be pairs of fraction and pixels, got {recipe.resolutions}")
    fractions, pixels = recipe.resolutions[::2], recipe.resolutions[1::2]
    if any(side % 1 for side in pixels):
        raise RunError(f"--resolutions must have whole numbers of pixels, got {recipe.resolutions}")
    if not all(0 <= fraction <= 1 for fraction in fractions) or not all(1 <= n < math.inf for n in pixels):
        raise RunError("--resolutions must have fractions from 0 to 1 and at least 1 pixel, got "
                       f"{recipe.resolutions}")
    if not all(0 <= fraction <= 1 for fraction in recipe.milestones):
        raise RunError(f"--milestones must be fractions of the training from 0 to 1, got {recipe.milestones}")
    if list(fractions) != sorted(fractions):
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


def sides_seen(recipe: Recipe, progress: float, full: int) -> float:
    """Sides in pixels of each training image up to ``progress``, in those of one image times the whole training.

    The time that a training takes goes by it, not by the pixels: the convolutions of these networks are so small that
    a quarter of the pixels takes not much less than half of the time (``images_per_s`` by epoch in the results).
    """
    changes = sorted({0.0, progress, *(start for start in recipe.resolutions[::2] if start < progress)})
    return sum(resolution_at(recipe, start, full) * (end - start) for start, end in pairwise(changes))


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
