"""Weights to and from the PyTorch layers.

The layers here have the submodules of the PyTorch ones under the same names, so a variable's path is its name in the
state dict with other separators, ``mask/up_0/skip/conv1/kernel`` for ``mask.up.0.skip.conv1.weight``, and only the
kernels change their axes.
"""
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
from safetensors.numpy import load_file

TORCH_NAMES = {
    "kernel": "weight",
    "bias": "bias",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


def load_torch_weights(layer: keras.layers.Layer, state: Mapping[str, Any] | str | Path) -> None:
    """Load the weights of a PyTorch layer or network of ran_layers into its Keras counterpart.

    Args:
        layer: A built layer of ``ran_layers.keras`` or one of its networks.
        state: A state dict (of PyTorch tensors of any device and type, or of NumPy arrays), or the path of a
            ``.safetensors`` file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: ``layer`` has no weights yet, or names or shapes of ``state`` are not those of ``layer``; no weight
            is changed then.

    Example:
        >>> import torch, ran_layers
        >>> layer = AttentionModule(mask_depth=2)
        >>> layer.build((None, 16, 16, 64))
        >>> load_torch_weights(layer, ran_layers.AttentionModule(64, mask_depth=2).state_dict())
    """
    state = dict(state) if isinstance(state, Mapping) else read_safetensors(state)
    # PyTorch counts the batches, for a running average without momentum that nothing here uses.
    state = {name: _to_array(value) for name, value in state.items() if not name.endswith("num_batches_tracked")}
    variables = _named_variables(layer)
    if not variables:
        raise ValueError(f"layer must have been built, got {layer.name!r} without weights; call it or its build()")
    missing, unexpected = sorted(variables.keys() - state), sorted(state.keys() - variables)
    if missing or unexpected:
        raise ValueError(
            f"state must have the names of {layer.name!r}: {len(missing)} are missing {missing[:3]}, "
            f"{len(unexpected)} are unexpected {unexpected[:3]}")
    values = {name: _to_keras(value) for name, value in state.items()}
    for name, variable in variables.items():
        if values[name].shape != tuple(variable.shape):
            raise ValueError(
                f"state[{name!r}] must have the shape {_to_torch(np.empty(variable.shape)).shape}, "
                f"got {state[name].shape}")
    for name, variable in variables.items():
        variable.assign(values[name])


def torch_state_dict(layer: keras.layers.Layer) -> dict[str, np.ndarray]:
    """Return the weights of a layer or network under PyTorch's names and in its axes: the way back.

    ``safetensors.numpy.save_file`` writes them to a file that the PyTorch network loads.

    Example:
        >>> layer = ResidualUnit()
        >>> layer.build((None, 16, 16, 64))
        >>> torch_state_dict(layer)["conv2.weight"].shape
        (16, 16, 3, 3)
    """
    return {
        # A copy in any case; bfloat16 is a type that PyTorch does not take from NumPy.
        name: np.array(_to_torch(keras.ops.convert_to_numpy(variable)), order="C",
                       dtype="float32" if variable.dtype == "bfloat16" else None)
        for name, variable in _named_variables(layer).items()
    }


def read_safetensors(path: str | Path) -> dict[str, np.ndarray]:
    """Return the tensors of a ``.safetensors`` file.

    Raises:
        FileNotFoundError: There is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no weights file {str(path)!r}")
    return load_file(path)


def _named_variables(layer: keras.layers.Layer) -> dict[str, Any]:
    """Return the layer's variables by their names in PyTorch."""
    named = {}
    # Within its own layer a path is the same wherever that was built; a model's path depends on the scope it was in.
    parts = [(f"{part.name}/", part) for part in layer.layers] if isinstance(layer, keras.Model) else [("", layer)]
    for prefix, part in parts:
        for variable in part.weights:
            *modules, leaf = (prefix + variable.path.removeprefix(f"{part.path}/")).split("/")
            if leaf not in TORCH_NAMES:
                raise ValueError(f"layer must be one of ran_layers.keras or a network of them, got {layer.name!r} with "
                                 f"the variable {variable.path!r}, which no PyTorch layer here has")
            named[".".join([*modules, ""]).replace("_", ".") + TORCH_NAMES[leaf]] = variable
    return named


def _to_array(value: Any) -> np.ndarray:
    """Return a PyTorch tensor, or what NumPy takes, as an array."""
    if hasattr(value, "detach"):  # NumPy takes no tensor of a GPU, none with a gradient, and no bfloat16
        value = value.detach().cpu().double()
    return np.asarray(value)


def _to_keras(value: np.ndarray) -> np.ndarray:
    """Kernels from (out, in, height, width) to (height, width, in, out), matrices from (out, in) to (in, out)."""
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T


def _to_torch(value: np.ndarray) -> np.ndarray:
    return value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
