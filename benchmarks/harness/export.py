"""Writing a trained network in timm's form, and loading it and timm's pretrained ones."""
import copy
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from timm import create_model
from timm.models import save_for_hf

from harness.arguments import check_models
from harness.checkpoint import write_atomic
from harness.errors import RunError, first_line


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
        RunError: There are none, they are not available, or they are for another number of classes.
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
