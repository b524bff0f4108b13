"""Residual units, the basic unit of which the trunk and the mask branches are made.

`Identity Mappings in Deep Residual Networks` (pre-activation units) - https://arxiv.org/abs/1603.05027
"""
from typing import Any

import keras

from ..layers._args import check_fraction, check_int
from ._image_layer import ImageLayer, Shape, build_chain


@keras.saving.register_keras_serializable("ran_layers")
class ResidualUnit(ImageLayer):
    """Pre-activation bottleneck unit (Wang et al. 2017, section 3 and Table 2), as :class:`ran_layers.ResidualUnit`.

    BN, ReLU, 1x1 convolution to ``out_channels * bottle_ratio``; BN, ReLU, 3x3 convolution that carries the stride;
    BN, ReLU, 1x1 convolution to ``out_channels``; plus the shortcut. The shortcut is the identity unless channels or
    resolution change; then it is a strided 1x1 convolution of the pre-activated input. No convolution has a bias.

    Shapes:
        input ``(batch, height, width, in_channels)``,
        output ``(batch, ceil(height / stride), ceil(width / stride), out_channels)``.

    Args:
        out_channels: Channels of the output; those of the input if None.
        stride: Stride of the 3x3 convolution.
        bottle_ratio: Inner channels over output channels, in (0, 1].
        data_format: ``'channels_last'`` or ``'channels_first'``; that of ``keras.config`` if None.
        **kwargs: ``name``, ``dtype`` and ``trainable``, as in any Keras layer.

    Raises:
        TypeError, ValueError: An argument is of the wrong type or outside its range; the message names it.

    Example:
        >>> tuple(ResidualUnit(128, stride=2)(keras.ops.zeros((1, 15, 20, 64))).shape)
        (1, 8, 10, 128)
    """

    def __init__(
            self,
            out_channels: int | None = None,
            stride: int = 1,
            *,
            bottle_ratio: float = 0.25,
            data_format: str | None = None,
            **kwargs: Any,
    ) -> None:
        super().__init__(data_format=data_format, **kwargs)
        self.out_channels = out_channels if out_channels is None else check_int("out_channels", out_channels, 1)
        self.stride = check_int("stride", stride, 1)
        self.bottle_ratio = check_fraction("bottle_ratio", bottle_ratio, zero=False, one=True)

    def build(self, input_shape: Shape) -> None:
        in_channels = self.channels_of(input_shape)
        out_channels = in_channels if self.out_channels is None else self.out_channels
        mid_channels = max(1, int(out_channels * self.bottle_ratio + 1e-6))  # 100 * 0.29 is 28.999...

        self.norm1 = self.norm("norm1")
        self.conv1 = self.conv(mid_channels, 1, name="conv1")
        self.norm2 = self.norm("norm2")
        # Not the convolution's padding='same': with stride 2 and an even size that pads on one side only.
        self.pad = keras.layers.ZeroPadding2D(1, **self.shared_args)
        self.conv2 = self.conv(mid_channels, 3, self.stride, name="conv2")
        self.norm3 = self.norm("norm3")
        self.conv3 = self.conv(out_channels, 1, name="conv3")
        self.downsample = (
            self.conv(out_channels, 1, self.stride, name="downsample")
            if self.stride != 1 or in_channels != out_channels else None
        )
        build_chain(
            [self.norm1, self.conv1, self.norm2, self.pad, self.conv2, self.norm3, self.conv3], input_shape)
        if self.downsample is not None:
            self.downsample.build(input_shape)

    def call(self, x: Any, training: bool | None = None) -> Any:
        preact = self.norm1(x, training=training)
        shortcut = x if self.downsample is None else self.downsample(preact)
        x = self.conv1(preact)
        x = self.conv2(self.pad(self.norm2(x, training=training)))
        x = self.conv3(self.norm3(x, training=training))
        return x + shortcut

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        shape = list(self.strided_shape(input_shape, self.stride))
        if self.out_channels is not None:
            shape[self.channel_axis] = self.out_channels
        return tuple(shape)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "out_channels": self.out_channels,
            "stride": self.stride,
            "bottle_ratio": self.bottle_ratio,
        }


@keras.saving.register_keras_serializable("ran_layers")
class ResidualUnitDown(ResidualUnit):
    """:class:`ResidualUnit` with stride 2: halves the height and width (the report's "Residual Unit Down Sampling").

    Takes the arguments of :class:`ResidualUnit`, ``stride`` apart.

    Example:
        >>> tuple(ResidualUnitDown(128)(keras.ops.zeros((1, 16, 16, 64))).shape)
        (1, 8, 8, 128)
    """

    def __init__(self, out_channels: int | None = None, **kwargs: Any) -> None:
        if "stride" in kwargs:
            raise TypeError(f"ResidualUnitDown has stride 2, got stride={kwargs['stride']!r}; use ResidualUnit")
        super().__init__(out_channels, stride=2, **kwargs)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        del config["stride"]
        return config


def residual_units(count: int, prefix: str, first: int = 0, **unit_args: Any) -> list[ResidualUnit]:
    """Return ``count`` units that keep the channels, named ``PREFIX_FIRST`` and so on."""
    return [ResidualUnit(name=f"{prefix}{i}", **unit_args) for i in range(first, first + count)]
