"""What all layers here are made of: convolution and batch normalisation as PyTorch has them, in either data format."""
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from ..layers._args import check_choice

Shape = tuple[int | None, ...]


class ImageLayer(keras.layers.Layer):
    """A layer on maps, ``(batch, height, width, channels)`` or, with ``'channels_first'``, ``(batch, channels, ...)``.

    Args:
        data_format: ``'channels_last'`` or ``'channels_first'``; that of ``keras.config`` if None.
        **kwargs: ``name``, ``dtype`` and ``trainable``, as in any Keras layer.
    """

    def __init__(self, *, data_format: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.data_format = resolve_data_format(data_format)
        self.input_spec = keras.layers.InputSpec(ndim=4)

    @property
    def channel_axis(self) -> int:
        return -1 if self.data_format == "channels_last" else 1

    @property
    def spatial_axes(self) -> tuple[int, int]:
        return (1, 2) if self.data_format == "channels_last" else (2, 3)

    @property
    def shared_args(self) -> dict[str, Any]:
        """What a sublayer takes over from this layer."""
        # Keras freezes the sublayers that are there when `trainable` is set, not those that are built later.
        return {"data_format": self.data_format, "dtype": self.dtype_policy, "trainable": self.trainable}

    def norm(self, name: str) -> "BatchNormReLU":
        return BatchNormReLU(self.channel_axis, name=name, dtype=self.dtype_policy, trainable=self.trainable)

    def conv(self, channels: int, kernel_size: int, stride: int = 1, *, name: str) -> keras.layers.Layer:
        return conv2d(channels, kernel_size, stride, name=name, **self.shared_args)

    def channels_of(self, shape: Shape) -> int:
        """Return the channels of a map.

        Raises:
            ValueError: They are None.
        """
        channels = shape[self.channel_axis]
        if channels is None:
            raise ValueError(f"{self.name!r} needs a map whose channels are known, got the shape {tuple(shape)}")
        return channels

    def strided_shape(self, shape: Shape, stride: int) -> Shape:
        """Return ``shape`` with the height and the width divided by ``stride``, rounded up."""
        return tuple(
            -(-size // stride) if axis in self.spatial_axes and size is not None else size
            for axis, size in enumerate(shape))

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """Return ``input_shape``: unless a layer says otherwise, it keeps the shape."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "data_format": self.data_format}


@keras.saving.register_keras_serializable("ran_layers")
class BatchNormReLU(keras.layers.BatchNormalization):
    """PyTorch's batch normalisation, then ReLU.

    Keras's own has another momentum and epsilon, and lets the moving variance follow the batch's biased variance;
    PyTorch's follows the unbiased one, and both normalise with the biased one.
    """

    def __init__(self, axis: int = -1, momentum: float = 0.9, epsilon: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(axis=axis, momentum=momentum, epsilon=epsilon, **kwargs)

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        decayed = self.momentum * ops.convert_to_tensor(self.moving_variance)
        outputs = super().call(inputs, training=training, mask=mask)
        if training and self.trainable:
            dtype = keras.backend.result_type(decayed.dtype, "float32")  # float16 ends at 65504
            count = ops.cast(ops.size(inputs), dtype) / inputs.shape[self.axis]
            correction = ops.cast(count / ops.maximum(count - 1, 1), decayed.dtype)
            self.moving_variance.assign(decayed + (self.moving_variance - decayed) * correction)
        return ops.relu(outputs)


def conv2d(channels: int, kernel_size: int, stride: int = 1, **kwargs: Any) -> keras.layers.Layer:
    """Return a convolution without bias or padding, in the networks' initialisation (He, over the outputs)."""
    he_normal = keras.initializers.VarianceScaling(2.0, mode="fan_out", distribution="untruncated_normal")
    return keras.layers.Conv2D(
        channels, kernel_size, stride, use_bias=False, kernel_initializer=he_normal, **kwargs)


def build_chain(layers: Sequence[keras.layers.Layer], shape: Shape) -> Shape:
    """Build each layer for the output of the one before it; return the last output's shape."""
    for layer in layers:
        layer.build(shape)
        shape = layer.compute_output_shape(shape)
    return shape


def run_chain(layers: Sequence[keras.layers.Layer], x: Any, training: bool | None) -> Any:
    """Call each layer on the output of the one before it."""
    for layer in layers:
        x = layer(x, training=training)
    return x


def resolve_data_format(data_format: str | None) -> str:
    """Return ``data_format``, that of ``keras.config`` if None.

    Raises:
        TypeError, ValueError: It is neither ``'channels_last'`` nor ``'channels_first'``.
    """
    if data_format is None:
        return keras.config.image_data_format()
    return check_choice("data_format", data_format, ("channels_last", "channels_first"))
