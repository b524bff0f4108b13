"""Residual Attention Networks for CIFAR, in the manner of ``keras.applications``.

`Residual Attention Network for Image Classification` - https://arxiv.org/abs/1704.06904
"""
from importlib.resources import files
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from ..layers._args import check_choice, check_int
from ..models._cifar import CIFAR_CLASSES, CIFAR_STATS
from ._image_layer import BatchNormReLU, Shape, conv2d, resolve_data_format
from .attention_module import AttentionModule
from .convert import load_torch_weights, read_safetensors
from .residual_unit import ResidualUnit, ResidualUnitDown

CHANNELS = (64, 128, 256, 512)
MASK_DEPTHS = (3, 2, 1)
LEAST_SIDE = 9  # pixels of an image: the stem halves it, and the first mask pools 3 times


def RANAttention56Cifar(
        include_top: bool = True,
        weights: str | Path | None = "cifar10",
        input_shape: Shape | None = None,
        pooling: str | None = None,
        classes: int | None = None,
        classifier_activation: Any = None,
        data_format: str | None = None,
        name: str = "ran_att56_cifar",
) -> keras.Model:
    """Attention-56 for CIFAR, 1.88 M parameters: the PyTorch network ``ran_att56_cifar`` and its weights.

    Shapes:
        input ``(batch, height, width, 3)``, standardised by :func:`preprocess_input`, 9 pixels or more a side; output
        ``(batch, classes)``. Without the top, ``(batch, ceil(height / 16), ceil(width / 16), 512)`` or, pooled,
        ``(batch, 512)``.

    Args:
        include_top: Whether to end in the classifier.
        weights: ``'cifar10'`` or ``'cifar100'``, the weights that the package ships; the path of a ``.safetensors``
            file of the PyTorch network; or None for a random initialisation.
        input_shape: Shape of an image; (32, 32, 3) if None. Height and width may be None, for images of any size.
        pooling: Without the top: ``'avg'``, ``'max'`` or, for the feature map, None.
        classes: Number of classes; those of ``weights`` if None, 10 without any.
        classifier_activation: Activation of the classifier. **None, the default, returns logits**, like the PyTorch
            network and unlike ``keras.applications``: train with ``from_logits=True``, or give ``'softmax'``.
        data_format: ``'channels_last'`` or ``'channels_first'``; that of ``keras.config`` if None.
        name: Name of the model.

    Raises:
        TypeError, ValueError: An argument is of the wrong type or outside its range; the message names it.
        FileNotFoundError: ``weights`` is the path of no file, or of weights that this version does not ship.

    Example:
        >>> model = RANAttention56Cifar(weights=None, classes=100)
        >>> images = np.zeros((2, 32, 32, 3), "uint8")
        >>> tuple(model(preprocess_input(images)).shape)
        (2, 100)
    """
    return _build_network(
        "ran_att56_cifar", 1, include_top, weights, input_shape, pooling, classes, classifier_activation, data_format,
        name)


def RANAttention92Cifar(
        include_top: bool = True,
        weights: str | Path | None = "cifar10",
        input_shape: Shape | None = None,
        pooling: str | None = None,
        classes: int | None = None,
        classifier_activation: Any = None,
        data_format: str | None = None,
        name: str = "ran_att92_cifar",
) -> keras.Model:
    """Attention-92 for CIFAR, 2.69 M parameters: the PyTorch network ``ran_att92_cifar`` and its weights.

    Shapes, arguments (**logits by default**) and errors as in :func:`RANAttention56Cifar`; it has two Attention
    Modules in each stage where that has one.

    Example:
        >>> RANAttention92Cifar(include_top=False, weights=None, pooling="avg").output.shape
        (None, 512)
    """
    return _build_network(
        "ran_att92_cifar", 2, include_top, weights, input_shape, pooling, classes, classifier_activation, data_format,
        name)


def preprocess_input(x: Any, dataset: str = "cifar10", data_format: str | None = None) -> Any:
    """Standardise images by the channel means and deviations of the training images, as the weights expect it.

    Args:
        x: RGB images of 0 to 255, an array or a tensor, ``(batch, height, width, 3)`` or one image.
        dataset: ``'cifar10'`` or ``'cifar100'``, the data set of the weights.
        data_format: ``'channels_last'`` or ``'channels_first'``; that of ``keras.config`` if None.

    Returns:
        A NumPy array for a NumPy array, otherwise a tensor.

    Raises:
        ValueError: ``dataset`` or ``data_format`` is not such a name, or the images have not three channels.

    Example:
        >>> round(float(preprocess_input(np.full((1, 1, 3), 255, "uint8")).max()), 2)
        2.13
    """
    mean, std = 255 * np.array(CIFAR_STATS[check_choice("dataset", dataset, tuple(CIFAR_STATS))], "float32")
    if resolve_data_format(data_format) == "channels_first":
        mean, std = mean[:, None, None], std[:, None, None]
    if len(x.shape) < 3 or x.shape[-mean.ndim] != 3:
        raise ValueError(f"x must be images of three channels, got the shape {tuple(x.shape)}")
    if isinstance(x, np.ndarray):
        return (x.astype("float32") - mean) / std
    return (ops.cast(x, "float32") - ops.convert_to_tensor(mean)) / ops.convert_to_tensor(std)


def _build_network(
        variant: str,
        modules: int,
        include_top: bool,
        weights: str | Path | None,
        input_shape: Shape | None,
        pooling: str | None,
        classes: int | None,
        classifier_activation: Any,
        data_format: str | None,
        name: str,
) -> keras.Model:
    """Build a network of ``modules`` Attention Modules a stage; its layers have the names of the PyTorch modules."""
    data_format = resolve_data_format(data_format)
    channels_last = data_format == "channels_last"
    if input_shape is None:
        input_shape = (32, 32, 3) if channels_last else (3, 32, 32)
    if pooling is not None:
        check_choice("pooling", pooling, ("avg", "max"))
    state = _read_weights(variant, weights)
    if state is not None and not include_top:
        state = {key: value for key, value in state.items() if not key.startswith("head.")}
    _check_input_shape(input_shape, channels_last, state)
    classes = _resolve_classes(classes, weights, state) if include_top else None

    inputs = keras.Input(input_shape)
    x = keras.layers.ZeroPadding2D(1, data_format=data_format, name="stem_pad")(inputs)
    x = conv2d(64, 3, 2, data_format=data_format, name="stem_conv")(x)
    for i, channels in enumerate(CHANNELS):
        blocks: list[Any] = [(ResidualUnitDown if i else ResidualUnit, {"out_channels": channels})]
        if i < len(MASK_DEPTHS):
            blocks += [(AttentionModule, {"mask_depth": MASK_DEPTHS[i]})] * modules
        else:
            blocks += [(ResidualUnit, {})] * 2
        for j, (layer, kwargs) in enumerate(blocks):
            x = layer(**kwargs, data_format=data_format, name=f"stages_{i}_blocks_{j}")(x)
    x = BatchNormReLU(-1 if channels_last else 1, name="norm")(x)
    if include_top or pooling == "avg":
        x = keras.layers.GlobalAveragePooling2D(data_format=data_format, name="avg_pool")(x)
    elif pooling == "max":
        x = keras.layers.GlobalMaxPooling2D(data_format=data_format, name="max_pool")(x)
    if include_top:
        x = keras.layers.Dense(
            classes, activation=classifier_activation, kernel_initializer=keras.initializers.RandomNormal(stddev=0.01),
            name="head_fc")(x)
    model = keras.Model(inputs, x, name=name)
    if state is not None:
        load_torch_weights(model, state)
    return model


def _read_weights(variant: str, weights: str | Path | None) -> dict[str, np.ndarray] | None:
    """Return the state dict that ``weights`` stands for.

    Raises:
        TypeError, ValueError: ``weights`` is neither None, nor a data set, nor the path of a ``.safetensors`` file.
        FileNotFoundError: The file is not there.
    """
    if weights is None:
        return None
    if not isinstance(weights, (str, Path)) or not (weights in CIFAR_CLASSES or Path(weights).suffix == ".safetensors"):
        error = ValueError if isinstance(weights, (str, Path)) else TypeError
        raise error(
            f"weights must be {', '.join(map(repr, CIFAR_CLASSES))}, the path of a .safetensors file or None, "
            f"got {weights!r}")
    if weights not in CIFAR_CLASSES:
        return read_safetensors(weights)
    shipped = Path(str(files("ran_layers") / "weights" / f"{variant}.{weights}.safetensors"))
    if not shipped.is_file():
        raise FileNotFoundError(
            f"weights={weights!r}: this version ships no {shipped.name}; give the path of a .safetensors file, or None")
    return read_safetensors(shipped)


def _check_input_shape(input_shape: Shape, channels_last: bool, state: dict[str, np.ndarray] | None) -> None:
    """Raise an error unless the network can be built for images of ``input_shape``, with the weights ``state``."""
    order = "(height, width, channels)" if channels_last else "(channels, height, width)"
    if not isinstance(input_shape, (tuple, list)) or len(input_shape) != 3:
        raise ValueError(f"input_shape must be {order}, got {input_shape!r}")
    height, width, channels = input_shape if channels_last else (*input_shape[1:], input_shape[0])
    for size in input_shape:
        if size is not None:
            check_int("each size of input_shape", size, 1)
    if channels is None:
        raise ValueError(f"input_shape must be {order}, the channels a number, got {tuple(input_shape)}")
    if any(side is not None and side < LEAST_SIDE for side in (height, width)):
        raise ValueError(
            f"input_shape must be {order} with {LEAST_SIDE} pixels or more a side, got {tuple(input_shape)}")
    kernel = (state or {}).get("stem.conv.weight")
    if kernel is not None and kernel.shape[1] != channels:
        raise ValueError(
            f"input_shape must have {kernel.shape[1]} channels, those of the weights, got {tuple(input_shape)}; "
            f"for others give weights=None")


def _resolve_classes(classes: int | None, weights: str | Path | None, state: dict[str, np.ndarray] | None) -> int:
    """Return the number of classes, which weights, if there are any, decide."""
    if state is None or "head.fc.bias" not in state:
        return 10 if classes is None else check_int("classes", classes, 1)
    stored = len(state["head.fc.bias"])
    if classes not in (None, stored):
        raise ValueError(
            f"classes must be {stored}, those of weights={str(weights)!r}, got {classes!r}; for other classes build on "
            f"include_top=False")
    return stored
