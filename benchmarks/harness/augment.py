"""Augmentation of whole batches on the device that trains, without per-image Python.

Images are ``(batch, height, width, channels)`` uint8 until :func:`normalize`; a fraction, an angle or a flip is drawn
for each image from the generator that is passed in.
"""
import math

import torch
import torch.nn.functional as F

from harness.recipes import Recipe, resolution_at


def augment_batch(
        images: torch.Tensor, flip: torch.Tensor, targets: torch.Tensor, recipe: Recipe, progress: float,
        mean: torch.Tensor, std: torch.Tensor, generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the network sees of a batch at ``progress`` of the training, and the targets mixed alike.

    Args:
        images: uint8 ``(batch, height, width, channels)``.
        flip: Which images to mirror, ``(batch,)``; the recipe's ``flip`` decides that over whole epochs.
        targets: Class probabilities ``(batch, classes)``.
        mean, std: Of the pixels in [0, 255], per channel.
    """
    x = crop_flip(images, flip, recipe.pad, recipe.pad_mode, generator)
    x = normalize(x, mean, std)
    if recipe.rotate or recipe.shift:
        x = rotate_shift(x, recipe.rotate, recipe.shift, generator)
    x = resize(x, resolution_at(recipe, progress, x.shape[-1]))
    if recipe.cutout:
        x = cutout(x, round(recipe.cutout * x.shape[-1] / images.shape[2]), generator)  # as large a part of the image
    return mix(x, targets, recipe.mixup, recipe.cutmix, generator)


def crop_flip(
        images: torch.Tensor, flip: torch.Tensor, pad: int, pad_mode: str, generator: torch.Generator) -> torch.Tensor:
    """Random crop after padding by ``pad`` pixels, and horizontal flip where ``flip`` is set, in one gather.

    Padded pixels are mirrored (``reflect``) or black before normalisation (``zeros``).
    """
    batch, height, width, _ = images.shape
    device = images.device
    shifts = torch.randint(-pad, pad + 1, (2, batch, 1), generator=generator, device=device)
    rows = torch.arange(height, device=device) + shifts[0]
    columns = torch.arange(width, device=device)
    columns = torch.where(flip[:, None], columns.flip(0), columns) + shifts[1]
    inside = ((0 <= rows) & (rows < height))[:, :, None] & ((0 <= columns) & (columns < width))[:, None, :]
    rows, columns = _reflect(rows, height), _reflect(columns, width)
    index = torch.arange(batch, device=device)[:, None, None]
    images = images[index, rows[:, :, None], columns[:, None, :]]
    return images if pad_mode == "reflect" else images * inside[..., None]


def _reflect(index: torch.Tensor, size: int) -> torch.Tensor:
    """Mirror indices outside ``[0, size)`` at the border pixels, as ``reflect`` padding does."""
    index = index.abs()
    return (size - 1) - ((size - 1) - index).abs()


def normalize(images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """uint8 ``(batch, height, width, channels)`` to float ``(batch, channels, height, width)``, channels last."""
    return ((images.to(mean.dtype) - mean) / std).permute(0, 3, 1, 2)


def rotate_shift(images: torch.Tensor, degrees: float, shift: float, generator: torch.Generator) -> torch.Tensor:
    """Rotate by up to ``degrees`` and shift by up to the fraction ``shift`` of each side, repeating border pixels."""
    draws = 2 * torch.rand(3, len(images), generator=generator, device=images.device) - 1
    angle = draws[0] * math.radians(degrees)
    offsets = 2 * shift * draws[1:]  # the grid runs from -1 to 1
    cos, sin = angle.cos(), angle.sin()
    theta = torch.stack([torch.stack([cos, -sin, offsets[0]], 1), torch.stack([sin, cos, offsets[1]], 1)], 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def resize(images: torch.Tensor, side: int) -> torch.Tensor:
    """Shrink the images to ``side`` pixels."""
    if images.shape[-1] == side:
        return images
    return F.interpolate(images, size=(side, side), mode="bilinear", antialias=True, align_corners=False)


def cutout(images: torch.Tensor, side: int, generator: torch.Generator) -> torch.Tensor:
    """Erase (to 0, the mean after normalisation) one square of ``side`` pixels, cut at the border, in each image."""
    batch, _, height, width = images.shape
    rows = torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    y = torch.randint(height, (batch, 1), generator=generator, device=images.device)
    x = torch.randint(width, (batch, 1), generator=generator, device=images.device)
    hole_rows = (rows >= y - side // 2) & (rows < y + (side + 1) // 2)
    hole_columns = (columns >= x - side // 2) & (columns < x + (side + 1) // 2)
    return images.masked_fill((hole_rows[:, :, None] & hole_columns[:, None, :])[:, None], 0.0)


def mix(
        images: torch.Tensor, targets: torch.Tensor, mixup: float, cutmix: float, generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixup or CutMix (a coin decides where both are on) of the batch with a shuffled copy of itself.

    Args:
        images: ``(batch, channels, height, width)``.
        targets: One-hot or smoothed class probabilities ``(batch, classes)``.
        mixup, cutmix: Alpha of the Beta distribution of the mixing weight; 0 switches the method off.
    """
    if not (mixup or cutmix):
        return images, targets
    device = images.device
    order = torch.randperm(len(images), generator=generator, device=device)
    coin = torch.rand((), generator=generator, device=device)
    use_cutmix = coin < 0.5 if mixup and cutmix else torch.full((), bool(cutmix), device=device)
    alpha = torch.where(use_cutmix, cutmix or 1.0, mixup or 1.0)
    # Beta(a, a) from two Gamma draws that use the generator, as torch.distributions does not.
    gammas = torch._standard_gamma(alpha.expand(2).clone().float(), generator=generator)
    weight = (gammas[0] / gammas.sum()).clamp(0, 1)

    height, width = images.shape[-2:]
    cut = (1 - weight).sqrt() / 2
    y = torch.rand((), generator=generator, device=device) * height
    x = torch.rand((), generator=generator, device=device) * width
    rows = torch.arange(height, device=device) + 0.5  # where the centres of the pixels are
    columns = torch.arange(width, device=device) + 0.5
    box = (((rows - y).abs() < cut * height)[:, None] & ((columns - x).abs() < cut * width)[None, :]).float()
    keep = torch.where(use_cutmix, 1 - box, weight)
    images = images * keep + images[order] * (1 - keep)
    weight = torch.where(use_cutmix, keep.mean(), weight)
    return images, targets * weight + targets[order] * (1 - weight)
