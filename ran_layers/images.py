"""Read images of any kind for a network: any file that Pillow knows, any size and mode."""
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from einops import rearrange
from PIL import Image, ImageCms, ImageOps
from timm.data import create_transform, resolve_data_config

# The centre crop of a network never sees the ends of a longer strip, but resizing them would take gigabytes.
MAX_ASPECT = 16
# What often lies beside images and is not an image: in a folder it is silently skipped.
COMPANIONS = (
    ".csv", ".db", ".html", ".ini", ".json", ".log", ".md", ".parquet", ".pt", ".py", ".safetensors", ".txt", ".xml",
    ".yaml", ".yml")


def open_image(path: str | Path, formats: list[str] | None = None) -> Image.Image:
    """Return the image of a file as 8-bit RGB, upright; of an animation the first frame, on white where transparent.

    Args:
        path: The file.
        formats: Pillow's names of those that it may have; any if None.

    Raises:
        OSError: The file cannot be read, or not as an image; the message names it.
    """
    try:
        if Path(path).is_fifo():
            raise OSError("not a file")  # opening it would wait for somebody to write
        with Image.open(path, formats=formats) as image:
            return to_rgb(image)
    except Exception as error:  # damaged files make Pillow's decoders raise anything
        unknown = "not an image that Pillow can read" if formats is None else f"not an image of {', '.join(formats)}"
        reason = getattr(error, "strerror", None) or (
            unknown if isinstance(error, Image.UnidentifiedImageError) else error)
        raise OSError(f"{path}: {reason}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Return any Pillow image as 8-bit RGB, upright, on white where it is transparent."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        return _to_8_bit(image).convert("RGB")
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB") or image
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _to_8_bit(image: Image.Image) -> Image.Image:
    # convert("L") would cut everything above 255 off. The white level is that of the narrowest usual range it fits in.
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0)
    peak = max(float(values.max()), 0)
    ranges = (65535,) if ";16" in image.mode else (255, 65535) if image.mode == "I" else (1, 255, 65535)
    white = next((level for level in ranges if peak <= level), peak)
    return Image.fromarray((values.clip(0) * 255 / white).round().astype(np.uint8))


def find_images(paths: Iterable[str | Path]) -> tuple[list[Path], list[str]]:
    """Return the files among ``paths`` and in the folders among them, and one line for each failure.

    A folder is walked to its end, in alphabetical order. Every file in it counts, whatever its name, so that a damaged
    or unknown one is not lost silently; but hidden files and folders and those in ``COMPANIONS`` do not.
    """
    files: list[Path] = []
    failures: list[str] = []
    for path in map(Path, paths):
        if not os.path.isdir(path):  # pathlib raises where the path may not be searched
            files.append(path)
            continue
        found: list[Path] = []
        walked = {os.path.realpath(path)}  # links to folders are followed, and lead nowhere twice
        for folder, folders, names in os.walk(
                path, onerror=lambda error: failures.append(f"{error.filename}: {error.strerror}"), followlinks=True):
            kept = []
            for name in sorted(folders, key=lambda name: (os.path.islink(os.path.join(folder, name)), name)):
                real = os.path.realpath(os.path.join(folder, name))
                if not name.startswith(".") and real not in walked:
                    walked.add(real)
                    kept.append(name)
            folders[:] = sorted(kept)
            found += [
                Path(folder, name) for name in sorted(names)
                if not name.startswith(".") and not name.lower().endswith(COMPANIONS)]
        if not found:
            failures.append(f"{path}: no image in this folder")
        files += found
    return files, failures


def image_transforms(
        model: nn.Module, tile: int) -> tuple[Callable[[Image.Image], torch.Tensor], Callable[[Image.Image], Any]]:
    """Return what makes the network's input of an RGB image, and what cuts out the same part of it to be looked at.

    Both are timm's evaluation transforms for the model's ``pretrained_cfg``. The first gives the normalised tensor
    ``(in_chans, height, width)``; the second a uint8 array ``(height, width, 3)`` whose longer side is ``tile``.

    Raises:
        ValueError: The model takes neither grey nor RGB images.
    """
    config = resolve_data_config(model=model)
    in_chans = getattr(model, "in_chans", config["input_size"][0])
    if in_chans not in (1, 3):
        raise ValueError(f"the model must take images of 1 or 3 channels, it takes {in_chans}")
    height, width = config["input_size"][-2:]
    if in_chans == 1:  # a grey image through a configuration that may have been written for colour
        config.update(mean=(float(np.mean(config["mean"])),), std=(float(np.mean(config["std"])),))
    normalise = create_transform(**config)
    zoom = tile / max(height, width)
    shape = (3, max(round(height * zoom), 1), max(round(width * zoom), 1))
    shown = {**config, "input_size": shape, "mean": (*config["mean"] * 3,)[:3]}
    look = create_transform(**{**shown, "interpolation": "lanczos"}, normalize=False)

    def to_input(image: Image.Image) -> torch.Tensor:
        image = _without_far_ends(image)
        return normalise(image.convert("L") if in_chans == 1 else image)

    def to_tile(image: Image.Image) -> Any:
        return rearrange(look(_without_far_ends(image)), "c h w -> h w c").numpy()

    return to_input, to_tile


def _without_far_ends(image: Image.Image) -> Image.Image:
    width, height = image.size
    reach = MAX_ASPECT * min(width, height)
    x, y = max(width - reach, 0) // 2, max(height - reach, 0) // 2
    return image.crop((x, y, width - x, height - y)) if x or y else image
