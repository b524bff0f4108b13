"""The network of a run: made for its data set, and begun with the weights of another run."""
import argparse
import json
from pathlib import Path
from typing import Any

import torch
from timm import create_model

import ran_layers  # noqa: F401  (registers the networks with timm)
from harness.data import Dataset
from harness.errors import RunError, first_line
from harness.evaluate import count_macs
from harness.recipes import Recipe, resolutions

# Arguments of a model that are none of --model-kwargs, and why.
_REFUSED = {
    **dict.fromkeys(("num_classes", "in_chans", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"),
                    "follows from the data set and what the run begins with; leave it out"),
    "features_only": "makes a network without classifier; leave it out",
    "checkpoint_path": "is --initial-checkpoint here, which is recorded",
}


def build_model(args: argparse.Namespace, recipe: Recipe, data: Dataset) -> tuple[Any, int]:
    """Create the network for the data set, with the configuration that is saved beside its weights.

    Returns:
        The network, and its multiply-accumulate operations for one image.

    Raises:
        RunError: There is no such network, or it does not take the images.
    """
    kwargs = {}
    for item in args.model_kwargs:
        key, _, value = item.partition("=")
        try:
            kwargs[key] = json.loads(value)
        except ValueError:
            raise RunError(f"--model-kwargs must be KEY=VALUE with VALUE as JSON, got {item}") from None
        if key in _REFUSED:
            raise RunError(f"--model-kwargs {key} {_REFUSED[key]}")
    if recipe.drop_path:
        kwargs["drop_path_rate"] = recipe.drop_path
    mean, std = (data.mean, data.std) if recipe.standardize else ((0.0,) * 3, (1.0,) * 3)
    overlay = dict(
        tag=data.name, num_classes=len(data.class_names), input_size=(3, *data.train_images.shape[1:3]), mean=mean,
        std=std, crop_pct=1.0, label_names=data.class_names)
    try:
        model = create_model(
            args.model, num_classes=len(data.class_names), pretrained_cfg_overlay=overlay, **kwargs)
    except Exception as error:  # whatever a network makes of arguments that it does not know
        raise RunError(f"--model {args.model} with {kwargs}: {first_line(error)}") from error
    shared = [names for names in names_of_parameters(model) if len(names) > 1]
    if shared:
        raise RunError(f"--model {args.model} has a parameter under several names ({', '.join(shared[0])}), which "
                       "model.safetensors cannot hold")
    model.model_kwargs = kwargs
    full = data.train_images.shape[1]
    macs: dict[int, int] = {}
    for side in dict.fromkeys([full, *resolutions(recipe, full)]):
        try:
            macs[side] = count_macs(model, side)
        except (RuntimeError, AssertionError, ValueError) as error:
            cause = hint = ""
            if side != full:
                cause = f", to which --resolutions {recipe.resolutions} shrinks them"
                hint = "; --resolutions without values leaves them as they are"
            raise RunError(f"--model {args.model} does not take images of 3 x {side} x {side}{cause} "
                           f"({first_line(error)}){hint}") from error
    return model, macs[full]


def names_of_parameters(model: torch.nn.Module) -> list[list[str]]:
    """Return the names that each parameter of ``model`` has."""
    found: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).append(name)
    return list(found.values())


def load_initial_weights(model: Any, weights: dict[str, torch.Tensor], origin: Path) -> None:
    """Load ``weights`` into ``model``, but for a classifier of another number of classes.

    Raises:
        RunError: They are another network's; the message names ``origin`` and the first tensor that does not fit.
    """
    own = model.state_dict()
    heads = model.pretrained_cfg["classifier"]
    classifier = {f"{head}.{name}" for head in ([heads] if isinstance(heads, str) else heads)
                  for name in ("weight", "bias")} & own.keys()
    if any(name in weights and weights[name].shape != own[name].shape for name in classifier):
        weights = {**weights, **{name: own[name] for name in classifier}}
    for name in sorted({*own, *weights}):
        if name not in own or name not in weights or own[name].shape != weights[name].shape:
            shapes = (f"of shape {tuple(held[name].shape)}" if name in held else "not there" for held in (weights, own))
            raise RunError("--initial-checkpoint {}: {} is {}, in the model it is {}; it must be of the same --model "
                           "and --model-kwargs".format(origin, name, *shapes))
    bad = next((name for name, values in weights.items() if not values.isfinite().all()), None)
    if bad:
        raise RunError(f"--initial-checkpoint {origin}: {bad} has values that are NaN or infinite")
    model.load_state_dict(weights)
