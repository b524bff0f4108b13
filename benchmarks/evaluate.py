"""Scoring a network on images in memory, counting its cost, and saving and loading it in timm's form."""
import copy
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import augment
import torch
from arguments import check_models
from checkpoint import write_atomic
from distributed import World
from errors import RunError, first_line
from safetensors import SafetensorError
from timm import create_model
from timm.models import save_for_hf
from torch.utils.flop_counter import FlopCounterMode


@torch.inference_mode()
def evaluate(
        model: Any, images: torch.Tensor, labels: torch.Tensor, device: torch.device, autocast: Any,
        flip: bool = False, world: World | None = None,
) -> dict[str, float]:
    """Return top-1 and top-5 accuracy in percent of ``model`` on uint8 ``images`` ``(rows, height, width, channels)``.

    Args:
        world: Each of its processes takes a part of the images; all get the figures of the whole.
        flip: Average the logits of each image and its mirror image (test-time augmentation).
    """
    was_training = model.training
    model.eval()
    # On a GPU so many at once that an evaluation takes less time than it would take to compile it.
    batch_size = 2500 if device.type == "cuda" else 500
    mean = torch.tensor(model.pretrained_cfg["mean"], device=device) * 255
    std = torch.tensor(model.pretrained_cfg["std"], device=device) * 255
    correct = torch.zeros(2, dtype=torch.long, device=device)
    world = world or World()
    parts = images[world.rank::world.size], labels[world.rank::world.size]
    for x, y in zip(parts[0].split(batch_size), parts[1].split(batch_size)):
        x, y = augment.normalize(x.to(device), mean, std), y.to(device)
        with autocast, torch.compiler.set_stance("force_eager"):
            logits = model(x).float()
            if flip:
                logits = logits + model(x.flip(3)).float()
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == y[:, None]
        correct += torch.stack([ranked[:, 0].sum(), ranked.sum()])
    model.train(was_training)
    top1, top5 = (100 * world.sum(correct).double() / len(labels)).tolist()
    return {"top1": top1, "top5": top5}


def count_macs(model: torch.nn.Module, side: int | None = None) -> int:
    """Return the multiply-accumulate operations of convolutions and linear layers for one image.

    The image has the size the model is configured for, or ``side`` pixels each way.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    # With gradients: without them the counter fails where a module is given a parameter, as a token of a transformer.
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        channels, *size = model.pretrained_cfg["input_size"]
        model(torch.zeros(1, channels, *([side] * 2 if side else size), device=device))
    model.train(was_training)
    return counter.get_total_flops() // 2


def export_model(model: Any, out: Path, model_args: dict[str, Any]) -> None:
    """Write ``model.safetensors`` and ``config.json`` in timm's form; ``local-dir:OUT`` loads them.

    Raises:
        RunError: The disk is full, ...
    """
    model = copy.deepcopy(model).cpu().to(memory_format=torch.contiguous_format)
    for left in out.glob(".export-*"):  # by a run that was killed here
        shutil.rmtree(left, ignore_errors=True)
    try:
        with TemporaryDirectory(prefix=".export-", dir=out) as folder:
            # timm writes in place; write_atomic puts the files where they belong.
            save_for_hf(model, folder, model_args=model_args, safe_serialization=True)
            for name in ("model.safetensors", "config.json"):
                write_atomic(out / name, (Path(folder) / name).read_bytes())
    except (OSError, SafetensorError) as error:
        raise RunError(f"cannot write the model to {out} ({first_line(error)}); make room there, and --resume does "
                       "it") from error


def load_exported(out: Path) -> Any:
    """Return the network that :func:`export_model` wrote, in evaluation mode.

    Raises:
        RunError: The files are missing or damaged.
    """
    try:
        return create_model(f"local-dir:{out}", pretrained=True).eval()
    except Exception as error:  # timm and safetensors have many names for a missing or damaged file
        raise RunError(f"cannot load the model in {out}: {first_line(error)}") from error


def load_pretrained(name: str, classes: int) -> Any:
    """Return the timm model ``name`` with its pretrained weights, in evaluation mode.

    Raises:
        RunError: There are none, they cannot be had, or they are for another number of classes.
    """
    check_models([name], "--model")
    try:
        model = create_model(name, pretrained=True).eval()
    except Exception as error:  # no weights, no network, a damaged file, ...
        raise RunError(f"--model {name}: cannot get pretrained weights ({first_line(error)})") from error
    if model.num_classes != classes:
        raise RunError(f"--model {name} has weights for {model.num_classes} classes, the data set has {classes}; see "
                       "timm.list_pretrained('ran_*') for names with weights")
    return model
