"""The error of trained networks on test images with noise, blur, less contrast and JPEG artefacts.

    python benchmarks/robustness.py --data-dir DIR --out benchmarks/results   # all weights in the package
    python benchmarks/robustness.py --models local-dir:RUN --data-dir DIR     # a run of cifar.py

Three strengths of each corruption, with the parameters of severities 1, 3 and 5 of CIFAR-10-C (Hendrycks and
Dietterich, 2019).
"""
from harness import ctrl_c, extras, openmp  # noqa: F401  (before torch, see there)

# isort: split
import io
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torchvision.transforms.functional import gaussian_blur

import ran_layers
from harness.arguments import Parser, check_models, positive
from harness.checkpoint import check_out, write_json
from harness.data import DATASETS, SPECS, read_split
from harness.environment import command_line, hardware, pick_device, versions
from harness.errors import RunError, first_line, one_line_errors
from harness.evaluate import evaluate
from harness.precision import exact_float32


def add_noise(images: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian noise of standard deviation ``sigma``, of pixels in [0, 1]."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return _to_uint8(images.float() + 255 * sigma * noise)


def blur(images: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian blur of ``sigma`` pixels."""
    size = 2 * math.ceil(4 * sigma) + 1
    return _to_uint8(gaussian_blur(images.permute(0, 3, 1, 2).float(), [size, size], [sigma, sigma])
                     .permute(0, 2, 3, 1))


def reduce_contrast(images: torch.Tensor, factor: float) -> torch.Tensor:
    """Distances from each image's and channel's mean times ``factor``."""
    mean = images.float().mean((1, 2), keepdim=True)
    return _to_uint8((images - mean) * factor + mean)


def compress(images: torch.Tensor, quality: float) -> torch.Tensor:
    """Through JPEG of ``quality`` from 1 to 95."""
    decoded = []
    for image in images.numpy():
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=int(quality))
        decoded.append(np.asarray(Image.open(buffer)))
    return torch.from_numpy(np.stack(decoded))


def _to_uint8(images: torch.Tensor) -> torch.Tensor:
    return images.round().clamp(0, 255).to(torch.uint8)


# Name, function of uint8 images (rows, height, width, channels) and a parameter, its values from weak to strong.
CORRUPTIONS: tuple[tuple[str, Callable[[torch.Tensor, float], torch.Tensor], tuple[float, ...]], ...] = (
    ("Gaussian noise", add_noise, (0.04, 0.08, 0.10)),
    ("Gaussian blur", blur, (0.4, 0.7, 1.0)),
    ("contrast", reduce_contrast, (0.75, 0.4, 0.15)),
    ("JPEG", compress, (80, 58, 40)),
)


def measure(name: str, data_dir: str | None, rows: int | None, device: torch.device) -> dict[str, Any]:
    """Return the error of ``name`` on clean test images and on each corruption, percent.

    Raises:
        RunError: There are no such weights, or they are for another data set than CIFAR.
    """
    if ":" not in name:  # of folders and the Hub timm tells itself
        check_models([name], "--models")
    try:
        model = timm.create_model(name, pretrained=True).eval().to(device, memory_format=torch.channels_last)
    except Exception as error:  # timm and safetensors have many names for a missing or damaged file
        raise RunError(f"--models {name}: {first_line(error)}") from error
    if any(isinstance(module, ran_layers.AttentionModule) for module in model.modules()):
        model = ran_layers.fuse(model)  # the same function up to rounding, faster
    dataset = next((key for key, spec in SPECS.items() if spec.classes == model.num_classes), None)
    if dataset is None:
        raise RunError(f"--models {name} has {model.num_classes} classes; CIFAR-10 has 10 and CIFAR-100 has 100")
    tag = model.pretrained_cfg.get("tag")  # cifar.py writes the data set there; others write other things
    if tag in DATASETS and tag != dataset:
        raise RunError(f"--models {name} was trained on {tag}, not on {dataset}")
    images, labels, _ = read_split(dataset, "test", data_dir, rows)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=False)

    def error_on(images: torch.Tensor) -> float:
        return round(100 - evaluate(model, images, labels, device, autocast)["top1"], 4)

    result: dict[str, Any] = dict(model=name, dataset=dataset, rows=len(labels), clean=error_on(images), corruptions=[])
    for kind, corrupt, strengths in CORRUPTIONS:
        errors = [error_on(corrupt(images, strength)) for strength in strengths]
        result["corruptions"].append(dict(name=kind, strengths=strengths, errors=errors))
        print(f"{name}, {kind}: {', '.join(f'{error:.2f} %' for error in errors)}", flush=True)
    result["mean"] = round(statistics.fmean(error for row in result["corruptions"] for error in row["errors"]), 4)
    print(f"{name}: clean {result['clean']:.2f} %, mean of the corrupted {result['mean']:.2f} %")
    return result


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="+", metavar="NAME",
                        help="timm models with weights (default: all weights in the package)")
    parser.add_argument("--data-dir", help="Parquet files on disk, in the Hub's layout (default: the Hub)")
    parser.add_argument("--rows", type=positive, help="the first rows of the test set only")
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    parser.add_argument("--out", type=Path, help="folder for robustness.json")
    args = parser.parse_args(argv)
    with one_line_errors():
        device = pick_device(args.device)
        if args.out:
            check_out(args.out / "robustness.json")
        exact_float32()
        names = args.models or timm.list_pretrained("ran_*")
        results = [measure(name, args.data_dir, args.rows, device) for name in names]
        if args.out:
            report = dict(
                command=command_line("robustness.py", sys.argv[1:] if argv is None else argv),
                hardware=hardware(device), versions=versions(), results=results)
            write_json(args.out / "robustness.json", report)


if __name__ == "__main__":
    main()
