"""Read a training run's folder and check that it can be published."""
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import timm
import torch

from .._download import WEIGHTS, refuse_pickle

PICTURES = ("curves.png", "masks.png")
# Everything that a push writes, and so everything that a later push may replace or remove.
FILES = ("README.md", WEIGHTS, "config.json", "result.json", *PICTURES)

# Where the weights came from on the machine that trained them: of no use to others, and it may tell about the machine.
_SOURCE_KEYS = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source")


@dataclass(frozen=True)
class Run:
    """A checked training run: what its files say, and the pictures it has."""

    folder: Path
    config: dict[str, Any]
    result: dict[str, Any]
    model: str
    dataset: str
    top1: float
    error: float
    pictures: tuple[str, ...]


def read_run(folder: str | Path) -> Run:
    """Return the training run in ``folder``, as ``benchmarks/cifar.py`` left it.

    Raises:
        TypeError: ``folder`` is not a path.
        FileNotFoundError: The folder or a file of it is not there, or the weights are a pickle.
        ValueError: A file is damaged, lacks a field, contradicts another, or the model does not load from them.
    """
    if not isinstance(folder, (str, os.PathLike)):
        raise TypeError(f"run_dir must be the folder of a training run, got {type(folder).__name__}")
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: give the --out folder of a finished training run")
    weights = refuse_pickle(folder)
    config, result = _read_json(folder / "config.json"), _read_json(folder / "result.json")
    model = _field(result, "model", str, folder / "result.json")
    dataset = _field(result, "dataset", str, folder / "result.json")
    top1 = float(_field(result, "final.top1", (int, float), folder / "result.json"))
    if not 0 <= top1 <= 100:
        raise ValueError(f"{folder / 'result.json'}: final.top1 must be a percentage from 0 to 100, got {top1}")
    architecture = _field(config, "architecture", str, folder / "config.json")
    pretrained_cfg = _field(config, "pretrained_cfg", dict, folder / "config.json")
    if model.partition(".")[0] != architecture:
        raise ValueError(f"{folder}: result.json is of model {model!r}, config.json of {architecture!r}")
    error = round(100 - top1, 4)
    stated = optional(result, "final.error", (int, float))
    if stated is not None and abs(stated - error) > 0.011:
        raise ValueError(f"{folder / 'result.json'}: final.error {stated} is not 100 - final.top1 = {error}")
    _check_weights(folder, weights)
    config["pretrained_cfg"] = {key: value for key, value in pretrained_cfg.items() if key not in _SOURCE_KEYS}
    pictures = tuple(name for name in PICTURES if (folder / name).is_file())
    return Run(folder, config, result, model, dataset, top1, error, pictures)


def refuse_tokens(files: dict[str, bytes | Path], token: str | None = None) -> None:
    """Refuse to publish a file in which an access token stands (a command line or a setting may hold one).

    Raises:
        ValueError: A file has one; the message names the file, not the token.
    """
    for name, content in files.items():
        data = content.read_bytes() if isinstance(content, Path) else content
        if re.search(rb"hf_[A-Za-z0-9]{20,}", data) or (token and token.encode() in data):
            raise ValueError(f"{name} holds an access token of the Hub and must not be published: remove it there")


def optional(record: dict[str, Any], path: str, kind: Any) -> Any:
    """Return the field at a dotted path, or None if it is missing or not of the kind asked for."""
    value: Any = record
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    if isinstance(value, bool) and kind is not bool:
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, kind) else None


def _field(record: dict[str, Any], path: str, kind: Any, file: Path) -> Any:
    value = optional(record, path, kind)
    if value is None or value == "":
        kinds = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise ValueError(f"{file}: the required field {path} ({kinds}) is missing or of another type")
    return value


def _read_json(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{file.parent} has no {file.name}: the training run is not finished") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(record).__name__}")
    return record


def _check_weights(folder: Path, weights: Path) -> None:
    """Build the model as whoever loads the repository will, and refuse weights that training left broken."""
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{weights} is not a whole safetensors file: {error}") from None
    except Exception as error:  # whatever timm or the model says about a config it cannot build
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{folder} does not load with timm: {type(error).__name__}: {reason}") from None
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{weights}: {name} holds values that are not finite")
