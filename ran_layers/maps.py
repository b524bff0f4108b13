"""Draw images with the masks of a network over them.

    python -m ran_layers.maps cat.png photos/ --model ran_att56_cifar.cifar10 --out masks.png
"""
import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import timm
import torch
import torch.nn as nn
from PIL import Image
from timm.models import get_pretrained_cfg, is_model

from .images import find_images, open_image
from .mask_figure import draw_masks
from .masks import attention_modules


def load_model(name: str) -> tuple[nn.Module, bool]:
    """Return a network with Attention Modules, in evaluation mode, and whether its weights are trained ones.

    Args:
        name: A timm name (``ran_att56_cifar.cifar10``), ``hf-hub:user/name``, or a folder with ``config.json`` and
            ``model.safetensors``, with or without ``local-dir:`` in front.

    Raises:
        ValueError: There is no such model, it cannot be loaded, or it has no Attention Module; one line that names it.
    """
    folder = Path(name.removeprefix("local-dir:"))
    trained = True
    if name.startswith("local-dir:") or (os.path.isdir(folder) and not is_model(name)):
        for file in ("config.json", "model.safetensors"):
            if not os.path.isfile(folder / file):
                raise ValueError(f"model folder {folder} has no {file}")
        name = f"local-dir:{folder}"
    elif ":" not in name and not is_model(name):
        raise ValueError(f"model must be a timm name, hf-hub:USER/NAME or a folder, got {name!r}")
    try:
        if ":" not in name:
            cfg = get_pretrained_cfg(name)
            trained = bool(cfg and cfg.has_weights)
            torch.manual_seed(0)  # without weights, the same picture again
            attention_modules(timm.create_model(name))  # before weights are downloaded for nothing
        model = timm.create_model(name, pretrained=trained)
        attention_modules(model)
    except Exception as error:  # timm and the Hub raise many kinds
        raise ValueError(f"cannot use model {name}: {' '.join(str(error).split())[:300]}") from error
    return model.eval(), trained


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 1 if an image is missing or cannot be read, 2 if model, device or output are unusable."""
    args = parse_args(argv)
    try:
        model, trained = load_model(args.model)
    except ValueError as error:
        return fail(str(error))
    try:
        if torch.device(args.device).type == "meta":
            raise RuntimeError("it has shapes but no numbers")
        model.to(args.device)
    except (RuntimeError, AssertionError) as error:  # an assertion where torch was built without CUDA
        return fail(f"cannot use device {args.device}: {str(error).splitlines()[0]}")
    title = args.model.removeprefix("hf-hub:")
    if title == args.model:  # of a folder its name, not where it is on this machine
        title = Path(args.model.removeprefix("local-dir:")).resolve().name
    if not trained:
        print(f"{args.model} has no trained weights: these masks are those of random ones", file=sys.stderr)
        title += " (random weights)"

    files, failures = find_images(args.images)
    images: list[Image.Image] = []
    names: list[str] = []
    for file in files:
        if len(images) == args.limit:
            print(f"drawing the first {args.limit} images; --limit sets how many", file=sys.stderr)
            break
        try:
            images.append(open_image(file))
            names.append(file.name)
        except OSError as error:
            failures.append(str(error))
    for failure in failures:
        print(f"skipped {failure}", file=sys.stderr)
    if not images:
        print("no image to draw", file=sys.stderr)
        return 1

    try:
        figure = draw_masks(model, images, names, channels=args.channels, tile=args.size, title=title)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        figure.save(args.out)
    except (OSError, ValueError) as error:
        return fail(f"cannot write {args.out}: {error}" if isinstance(error, OSError) else str(error))
    print(f"{args.out}: {len(images)} image{'s' * (len(images) > 1)}, {figure.width} x {figure.height} pixels")
    return 1 if failures else 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments of the command line; exits with code 2 on wrong ones."""
    parser = argparse.ArgumentParser(
        prog="python -m ran_layers.maps", description="Draw images with the masks of a network over them.")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files and folders of images")
    parser.add_argument(
        "--model", required=True, metavar="NAME_OR_DIR",
        help="timm name, hf-hub:USER/NAME, or a folder with config.json and model.safetensors")
    parser.add_argument("--out", required=True, type=Path, help="picture to write; its suffix says the format")
    parser.add_argument("--channels", type=at_least(0), default=2, help="channels beside the mean (%(default)s)")
    parser.add_argument("--size", type=at_least(32), default=128, help="pixels of each small picture (%(default)s)")
    parser.add_argument("--limit", type=at_least(1), default=20, help="images to draw at most (%(default)s)")
    parser.add_argument("--device", default="cpu", help="torch device (%(default)s)")
    args = parser.parse_args(argv)
    if Image.registered_extensions().get(args.out.suffix.lower()) not in Image.SAVE:
        parser.error(f"argument --out: must end in the suffix of an image, such as .png, got {str(args.out)!r}")
    return args


def at_least(minimum: int, most: int | None = None) -> Callable[[str], int]:
    """Return an argument type: an integer of at least ``minimum``, and at most ``most``."""
    def integer(text: str) -> int:
        if int(text) < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {text}")
        if most is not None and int(text) > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, got {text}")
        return int(text)

    return integer


def fail(message: str) -> int:
    """Print the error; return the exit code."""
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
