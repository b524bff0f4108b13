"""Draw images with the masks of a network's Attention Modules over them, as one picture.

The paper's Figure 1: a mask of low-level features dims the background, one of high-level features marks a part of
the object.
"""
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import reduce
from PIL import Image, ImageDraw, ImageFont

from .images import image_transforms, to_rgb
from .layers._args import check_int
from .masks import evaluating, record_masks

BATCH_SIZE = 16
MAX_TILES = 13  # widths of a small picture; a network with more modules gets several blocks, one below the other
INK, GREY, PAPER = (32, 33, 36), (118, 121, 128), (255, 255, 255)
# matplotlib's "inferno" (CC0) from 8 to 88 % at nine points: its lightness grows evenly, so it reads in grey print too.
COLOURS = np.array([
    (16, 9, 45), (57, 9, 99), (99, 20, 110), (139, 35, 105), (178, 50, 90), (215, 75, 63), (239, 111, 32),
    (251, 155, 6), (249, 203, 53)])


def draw_masks(
        model: nn.Module,
        images: Sequence[Image.Image],
        names: Sequence[str] | None = None,
        *,
        channels: int = 2,
        tile: int = 128,
        title: str = "",
) -> Image.Image:
    """Return a picture with a row for each image: the image, its class, and over it the masks of every module.

    For each Attention Module it shows the mean of the mask's channels and the channels that vary most over the
    positions, the same ones for all images. A mask is drawn over the part of the image that the network sees,
    bilinearly upsampled; its colours run from its own lowest to its highest value, which are printed below it.

    Args:
        model: A network with Attention Modules; its ``pretrained_cfg`` says how images are prepared for it and, as
            ``label_names``, what its classes are called.
        images: Pillow images of any mode and size; they are shown upright and in RGB, on white where transparent.
        names: What to call the images.
        channels: Single channels to show for each module, beside their mean.
        tile: Longer side of each small picture in pixels.
        title: Line above the picture.

    Raises:
        TypeError, ValueError: An argument is of the wrong type or outside its range, or ``model`` has no Attention
            Module or takes neither grey nor RGB images.

    Example:
        >>> image = Image.new("RGB", (40, 30), "teal")
        >>> draw_masks(timm.create_model("ran_att56_cifar"), [image], ["teal.png"]).save("masks.png")
    """
    check_int("channels", channels, 0)
    check_int("tile", tile, 32)
    if not (isinstance(images, Sequence) and all(isinstance(image, Image.Image) for image in images)):
        raise TypeError(f"images must be a sequence of Pillow images, got {type(images).__name__}"
                        + (f" of {type(images[0]).__name__}" if isinstance(images, Sequence) and images else ""))
    if not images:
        raise ValueError("images must hold at least one image, got none")
    if names is not None and len(names) != len(images):
        raise ValueError(f"names must have one entry per image, got {len(names)} for {len(images)} images")
    if not all(isinstance(name, str) for name in names or ()):
        raise TypeError(f"names must be strings, got {list(names or ())!r}")
    images, model = [to_rgb(image) for image in images], _inside(model)
    return draw_predicted(model, images, *predict(model, images), names, channels=channels, tile=tile, title=title)


def draw_predicted(
        model: nn.Module,
        images: Sequence[Image.Image],
        masks: dict[str, torch.Tensor],
        logits: torch.Tensor,
        names: Sequence[str] | None = None,
        *,
        channels: int,
        tile: int = 128,
        title: str = "",
) -> Image.Image:
    """Return the picture of :func:`draw_masks` for RGB images of which :func:`predict` gave masks and outputs."""
    _, to_tile = image_transforms(model, tile)
    rows = [
        Row(to_tile(image), "".join(f"{label} {p:.0%}" for label, p in classes), name)
        for image, classes, name in zip(images, top_classes(model, logits, 1), names or [""] * len(images))]
    groups = [mask_columns(name or type(model).__name__, mask, channels) for name, mask in masks.items()]
    return draw_page(rows, groups, title)


def _inside(model: nn.Module) -> nn.Module:
    """Return the network in what torch.compile and data parallelism wrap around it, which hides its configuration."""
    while (inner := getattr(model, "_orig_mod", None) or (
            model.module if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) else None)):
        model = inner
    return model


def predict(model: nn.Module, images: Sequence[Image.Image]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return the masks by module name and the model's outputs for RGB images, all on the CPU in float32.

    The outputs of a model that returns no tensor are empty.
    """
    to_input, _ = image_transforms(model, 1)
    kind: dict[str, Any] = next(({"device": p.device, "dtype": p.dtype} for p in model.parameters()), {})
    masks: list[dict[str, torch.Tensor]] = []
    outputs: list[torch.Tensor] = []
    for start in range(0, len(images), BATCH_SIZE):
        inputs = torch.stack([to_input(image) for image in images[start:start + BATCH_SIZE]])
        with record_masks(model) as recorded, evaluating(model):
            output = model(inputs.to(**kind))
        if not isinstance(output, torch.Tensor):  # feature maps, say no classes
            output = torch.empty(len(inputs), 0, 0)
        outputs.append(output.float().cpu())
        masks.append({name: mask.float().cpu() for name, mask in recorded.items()})
    return {name: torch.cat([part[name] for part in masks]) for name in masks[0]}, torch.cat(outputs)


def top_classes(model: nn.Module, logits: torch.Tensor, count: int) -> list[list[tuple[str, float]]]:
    """Return for each image the most probable classes by name, with their probabilities.

    A class without a name in the model's ``pretrained_cfg`` is called ``class INDEX``. No classes without a classifier.
    """
    if logits.ndim != 2 or getattr(model, "num_classes", 1) == 0:
        return [[] for _ in logits]
    names = (getattr(model, "pretrained_cfg", None) or {}).get("label_names") or ()
    # timm allows a list and a dictionary, whose keys are strings when it was read from JSON.
    names = {str(index): name for index, name in (names.items() if isinstance(names, dict) else enumerate(names))}
    if len(names) != logits.shape[1]:  # a new classifier keeps the old configuration
        names = {}
    top = logits.softmax(dim=1).topk(min(count, logits.shape[1]))
    return [
        [(str(names.get(str(index), f"class {index}")), p) for p, index in zip(probabilities, indices)]
        for probabilities, indices in zip(top.values.tolist(), top.indices.tolist())]


class Row(NamedTuple):
    """An image ``(height, width, 3)`` and the two lines below it."""

    pixels: Any
    prediction: str
    name: str


class Group(NamedTuple):
    """The columns of one Attention Module: for each its label and the maps of all images."""

    name: str
    mask_size: str
    columns: list[tuple[str, torch.Tensor]]


def mask_columns(name: str, mask: torch.Tensor, channels: int) -> Group:
    """Return the mean over the channels, and the channels that vary most over the positions."""
    spread = mask.var(dim=(2, 3), correction=0).mean(dim=0)
    most = spread.topk(min(channels, len(spread))).indices.tolist()
    return Group(
        name,
        " x ".join(map(str, mask.shape[1:])),
        [("mean", reduce(mask, "image c h w -> image h w", "mean")), *((f"channel {c}", mask[:, c]) for c in most)])


def overlay(pixels: Any, mask: torch.Tensor) -> Any:
    """Return a uint8 image ``(height, width, 3)``: its light and dark in the colours of the mask ``(h, w)``."""
    low, high = mask.min(), mask.max()
    level = (mask - low) / (high - low) if high - low > 1e-6 else torch.full_like(mask, 0.5)
    level = F.interpolate(
        level[None, None], size=pixels.shape[:2], mode="bilinear", align_corners=False, antialias=True)[0, 0]
    light = (pixels @ np.array([0.299, 0.587, 0.114]) / 255)[..., None]
    heat = colours(level)
    # The image shades the colour, and shows through where that is dark.
    return (heat * (0.4 + 0.6 * light) + 0.35 * light * (255 - heat)).clip(0, 255).round().astype(np.uint8)


def colours(level: Any) -> Any:
    """Return the colours ``(..., 3)``, up to 255, of values between 0 and 1."""
    return np.stack([np.interp(level, np.linspace(0, 1, len(COLOURS)), channel) for channel in COLOURS.T], axis=-1)


class Pen:
    """Writes single lines of text on a page."""

    def __init__(self, page: Image.Image, size: int) -> None:
        self.draw = ImageDraw.Draw(page)
        self.size = size
        self.font = ImageFont.load_default(size)  # the one in Pillow: the same picture on every machine

    def write(self, x: int, y: int, text: str, colour: tuple[int, int, int], room: int, align: str = "left") -> None:
        """Write ``text`` at most ``room`` pixels wide, cut with an ellipsis if it is longer."""
        text = " ".join(text.split())
        font = self.font_for(text)
        if self.draw.textlength(text, font) > room:
            while text and self.draw.textlength(f"{text}…", font) > room:
                text = text[:-1]
            text += "…"
        if align == "right":
            x += room - round(self.draw.textlength(text, font))
        self.draw.text((x, y), text, colour, font)

    def font_for(self, text: str) -> Any:
        """Pillow's own font has little more than ASCII; for the rest, one of the machine if there is one."""
        if not text.isascii():
            for name in ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial Unicode.ttf", "arial.ttf"):
                try:
                    return ImageFont.truetype(name, self.size)
                except OSError:
                    continue
        return self.font


def draw_page(rows: list[Row], groups: list[Group], title: str) -> Image.Image:
    """Lay the rows and columns out on one picture, as many modules beside each other as fit."""
    height, width = rows[0].pixels.shape[:2]
    tile = max(height, width)
    gap, line, margin = tile // 16, round(tile * 0.17), tile // 5
    row_height = height + 2 * line + 2 * gap
    head_height = 2 * line + 2 * gap  # of a block: the headings, the rule, the labels

    def group_width(group: Group) -> int:
        return margin + len(group.columns) * (width + gap) - gap

    room = MAX_TILES * tile - width
    blocks: list[list[Group]] = [[]]
    for group in groups:
        if blocks[-1] and sum(map(group_width, [*blocks[-1], group])) > room:
            blocks.append([])
        blocks[-1].append(group)

    page_width = 2 * margin + width + max(sum(map(group_width, block)) for block in blocks)
    block_height = head_height + len(rows) * row_height
    page = Image.new("RGB", (page_width, 2 * margin + line + len(blocks) * (margin + block_height)), PAPER)
    pen = Pen(page, round(tile * 0.125))

    # The first line: the title, and at its right the colours.
    bar = np.broadcast_to(colours(np.linspace(0, 1, width)), (line - gap // 2, width, 3)).round().astype(np.uint8)
    right = page_width - margin - width
    page.paste(Image.fromarray(bar), (right, margin))
    pen.write(right - gap - 2 * width, margin, "each map's lowest to highest", GREY, 2 * width, "right")
    pen.write(margin, margin, title, INK, right - margin - 2 * width - 2 * gap)

    top = 2 * margin + line
    for block in blocks:
        for i, row in enumerate(rows):
            y = top + head_height + i * row_height
            page.paste(Image.fromarray(row.pixels), (margin, y))
            pen.write(margin, y + height + gap // 2, row.prediction, INK, width)
            pen.write(margin, y + height + gap // 2 + line, row.name, GREY, width)
        x = margin + width
        for group in block:
            start, x = x + margin, x + group_width(group)
            pen.write(start, top, group.name, INK, x - start)
            pen.write(start, top, group.mask_size, GREY, x - start, "right")
            pen.draw.line((start, top + line + gap // 2, x - 1, top + line + gap // 2), GREY)
            for j, (label, maps) in enumerate(group.columns):
                left = start + j * (width + gap)
                pen.write(left, top + line + gap, label, GREY, width)
                for i, (row, mask) in enumerate(zip(rows, maps)):
                    y = top + head_height + i * row_height
                    page.paste(Image.fromarray(overlay(row.pixels, mask)), (left, y))
                    pen.write(left, y + height + gap // 2, f"{mask.min():.2f} to {mask.max():.2f}", GREY, width)
        top += block_height + margin
    return page
