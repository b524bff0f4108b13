"""What the examples share: the loaders of `benchmarks/`, a short training, and accuracy."""
import copy
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from harness.arguments import Parser, check_models, positive, positive_number
from harness.augment import crop_flip, normalize
from harness.checkpoint import check_out, write_json
from harness.data import Dataset, load_dataset
from harness.environment import hardware, pick_device, synchronize, versions
from harness.errors import RunError, first_line, one_line_errors

__all__ = [
    "Dataset",
    "Parser",
    "RunError",
    "accuracy",
    "check_model",
    "check_out",
    "first_line",
    "load_dataset",
    "names_weights",
    "one_line_errors",
    "pick_device",
    "positive",
    "positive_number",
    "steps_of",
    "train",
    "write_report",
]


def train(
        model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, data: Dataset, *,
        epochs: int, batch_size: int, images: int, device: torch.device, seed: int = 0,
) -> float:
    """Train on the first ``images`` rows with random crops (and flips, digits apart); return the seconds it took.

    ``scheduler`` is one of timm's that counts steps.
    """
    x, y = data.train_images[:images].to(device), data.train_labels[:images].to(device)
    mean, std = statistics_of(data, device)
    generator = torch.Generator(device).manual_seed(seed)
    batch_size = min(batch_size, len(x))
    model.train()
    if device.type == "cuda":  # a first step loads and tries kernels, which is not part of the training
        batch = normalize(x[:batch_size], mean, std)
        F.cross_entropy(copy.deepcopy(model)(batch), y[:batch_size]).backward()
    synchronize(device)
    start, step = time.perf_counter(), 0
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=generator, device=device)
        for rows in order.split(batch_size):
            if len(rows) < batch_size:  # the rest, which is too few for batch statistics
                continue
            scheduler.step_update(step)
            flip = torch.rand(len(rows), generator=generator, device=device) < (0 if data.name == "digits" else 0.5)
            batch = normalize(crop_flip(x[rows], flip, 4, "reflect", generator), mean, std)
            loss = F.cross_entropy(model(batch), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    synchronize(device)
    return time.perf_counter() - start


def steps_of(data: Dataset, images: int, batch_size: int, epochs: int) -> int:
    """Return how many steps :func:`train` takes."""
    rows = min(images, len(data.train_labels))
    return epochs * (rows // min(batch_size, rows))


@torch.no_grad()
def accuracy(model: nn.Module, data: Dataset, device: torch.device) -> float:
    """Return the fraction of the test images that the network classifies correctly."""
    mean, std = statistics_of(data, device)
    model.eval()
    correct = sum(
        int((model(normalize(x.to(device), mean, std)).argmax(1) == y.to(device)).sum())
        for x, y in zip(data.test_images.split(500), data.test_labels.split(500)))
    return correct / len(data.test_labels)


def statistics_of(data: Dataset, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of the channels in the units of the pixels."""
    return torch.tensor(data.mean, device=device) * 255, torch.tensor(data.std, device=device) * 255


def check_model(name: str, flag: str, weights: Path | None = None) -> None:
    """Raise a :class:`RunError` where timm does not know a model ``name``, or its ``weights`` are not a file.

    Of folders and the Hub timm tells itself.
    """
    if ":" not in name:
        check_models([name], flag)
    if weights and not weights.is_file():
        raise RunError(f"--weights {weights} is not a file")


def names_weights(name: str) -> bool:
    """Whether a model's name says which weights: it has a tag, or is that of a folder or on the Hub."""
    return "." in name or ":" in name


def write_report(path: Path, device: torch.device, **figures: Any) -> None:
    """Write the figures of a run and what they depend on as JSON."""
    write_json(path, {**hardware(device), **versions(), **figures})
    print(f"figures written to {path}")
