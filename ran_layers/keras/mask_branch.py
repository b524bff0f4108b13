"""Mask branches: from a feature map, a mask of the same shape that weights the trunk's output.

`Residual Attention Network for Image Classification` - https://arxiv.org/abs/1704.06904
"""
from typing import Any

import keras
from keras import ops

from ..layers._args import check_choice, check_fraction, check_int
from ..layers.mask_branch import MASK_ACTIVATIONS
from ._image_layer import ImageLayer, Shape, build_chain, run_chain
from .residual_unit import ResidualUnit, residual_units


class MaskHead(ImageLayer):
    """BN, ReLU, 1x1 convolution, twice, then the mask's activation (section 3.3, equations 4 to 6)."""

    def __init__(self, mask_act: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.mask_act = check_choice("mask_act", mask_act, MASK_ACTIVATIONS)

    def build(self, input_shape: Shape) -> None:
        channels = self.channels_of(input_shape)
        self.norm1 = self.norm("norm1")
        self.conv1 = self.conv(channels, 1, name="conv1")
        self.norm2 = self.norm("norm2")
        self.conv2 = self.conv(channels, 1, name="conv2")
        build_chain([self.norm1, self.conv1, self.norm2, self.conv2], input_shape)

    def call(self, x: Any, training: bool | None = None) -> Any:
        x = self.conv1(self.norm1(x, training=training))
        x = self.conv2(self.norm2(x, training=training))
        if self.mask_act == "mixed":
            return ops.sigmoid(x)
        x = ops.cast(x, "float32")  # sums of squares overflow in float16
        if self.mask_act == "channel":
            x = x * ops.rsqrt(ops.maximum(ops.sum(ops.square(x), self.channel_axis, keepdims=True), 1e-24))
        else:
            mean, var = ops.moments(x, self.spatial_axes, keepdims=True)
            x = ops.sigmoid((x - mean) * ops.rsqrt(var + 1e-5))
        return ops.cast(x, self.compute_dtype)


class DownStep(ImageLayer):
    """One step of the way down: max-pooling 3x3 of stride 2, then ``r`` units."""

    def __init__(self, r: int, bottle_ratio: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.pool = keras.layers.MaxPooling2D(3, 2, **self.shared_args)
        # The units count from 1: in PyTorch's Sequential the pooling is 0.
        self.units = residual_units(r, "", first=1, bottle_ratio=bottle_ratio, **self.shared_args)

    def build(self, input_shape: Shape) -> None:
        build_chain(self.units, self.compute_output_shape(input_shape))

    def call(self, x: Any, training: bool | None = None) -> Any:
        # Padded by -inf on both sides, as PyTorch does; padding='same' pads an even size on one side only.
        padding = [(1, 1) if axis in self.spatial_axes else (0, 0) for axis in range(4)]
        x = self.pool(ops.pad(x, padding, constant_values=float("-inf")))
        return run_chain(self.units, x, training)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return self.strided_shape(input_shape, 2)


class UpStep(ImageLayer):
    """One step of the way up: upsample to the size of the step's feature map, add the skip connection, refine."""

    def __init__(self, r: int, bottle_ratio: float, *, skip: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        unit_args = dict(self.shared_args, bottle_ratio=bottle_ratio)
        self.skip = ResidualUnit(name="skip", **unit_args) if skip else None
        self.units = residual_units(r, "units_", **unit_args)

    def build(self, input_shape: Shape, feature_shape: Shape) -> None:
        if self.skip is not None:
            self.skip.build(feature_shape)
        build_chain(self.units, feature_shape)

    def call(self, x: Any, feature: Any, training: bool | None = None) -> Any:
        x = upsample_to(x, feature, self.data_format)
        if self.skip is not None:
            x = x + self.skip(feature, training=training)
        return run_chain(self.units, x, training)


# An axis and the product of its interpolation matrix (output pixels, input pixels) with the map.
INTERPOLATION = {
    "channels_last": ((1, "oh,bhwc->bowc"), (2, "ow,bhwc->bhoc")),
    "channels_first": ((2, "oh,bchw->bcow"), (3, "ow,bchw->bcho")),
}


def upsample_to(x: Any, target: Any, data_format: str) -> Any:
    """Bilinear interpolation to the recorded height and width of ``target``: any size fits, odd ones too."""
    # Not ops.image.resize: it refuses a size that is a tensor, as TensorFlow's is in a graph for images of any size.
    for axis, product in INTERPOLATION[data_format]:
        x = ops.einsum(product, bilinear_weights(ops.shape(x)[axis], ops.shape(target)[axis], x.dtype), x)
    return x


def bilinear_weights(n_in: Any, n_out: Any, dtype: Any) -> Any:
    """Return the matrix that interpolates ``n_in`` pixels at the centres of ``n_out`` pixels of the same interval."""
    pixels = ops.arange(n_in, dtype="float32")
    scale = ops.cast(n_in, "float32") / ops.cast(n_out, "float32")
    centres = ops.clip((ops.arange(n_out, dtype="float32") + 0.5) * scale - 0.5, 0, pixels[-1])
    return ops.cast(ops.relu(1 - ops.abs(centres[:, None] - pixels)), dtype)


@keras.saving.register_keras_serializable("ran_layers")
class SoftMaskBranch(ImageLayer):
    """Bottom-up top-down mask branch (Wang et al. 2017, section 3.2, Figure 2), as :class:`ran_layers.SoftMaskBranch`.

    Down: ``mask_depth`` times a 3x3 max-pooling of stride 2 and ``r`` units. Bottom: ``r`` more units. Up: bilinear
    upsampling to the size of each map passed on the way down, plus a skip connection of one unit, and ``r`` units;
    at last bilinear upsampling to the size of the input. Head: BN, ReLU, 1x1 convolution, twice, and the activation.

    Shapes:
        input and output ``(batch, height, width, channels)``, height and width above ``2 ** (mask_depth - 1)``.

    Args:
        mask_depth: Number of poolings ``d`` (the paper's networks: 3, 2, 1 in stages 1, 2, 3).
        r: Units at each step between poolings.
        skips: Skip connections, from the highest resolution down; 0 to ``mask_depth - 1``, all of them if None.
        mask_act: ``'mixed'``, ``'channel'`` or ``'spatial'`` (section 3.3, Table 1).
        bottle_ratio: Inner channels over channels in each unit, in (0, 1].
        data_format: ``'channels_last'`` or ``'channels_first'``; that of ``keras.config`` if None.
        **kwargs: ``name``, ``dtype`` and ``trainable``, as in any Keras layer.

    Raises:
        TypeError, ValueError: An argument is of the wrong type or outside its range; the message names it.
        ValueError: When called, the map is too small for ``mask_depth``.

    Example:
        >>> mask = SoftMaskBranch(mask_depth=3)(keras.random.normal((2, 17, 30, 64)))
        >>> tuple(mask.shape), bool(keras.ops.all((mask >= 0) & (mask <= 1)))
        ((2, 17, 30, 64), True)
    """

    def __init__(
            self,
            *,
            mask_depth: int = 1,
            r: int = 1,
            skips: int | None = None,
            mask_act: str = "mixed",
            bottle_ratio: float = 0.25,
            data_format: str | None = None,
            **kwargs: Any,
    ) -> None:
        super().__init__(data_format=data_format, **kwargs)
        self.mask_depth = check_int("mask_depth", mask_depth, 1)
        self.r = check_int("r", r, 1)
        self.skips = check_int("skips", mask_depth - 1 if skips is None else skips, 0)
        if self.skips > mask_depth - 1:
            raise ValueError(f"skips must be at most mask_depth - 1 = {mask_depth - 1}, got {skips}")
        self.bottle_ratio = check_fraction("bottle_ratio", bottle_ratio, zero=False, one=True)

        self.down = [DownStep(r, bottle_ratio, name=f"down_{i}", **self.shared_args) for i in range(mask_depth)]
        self.bottom = residual_units(r, "bottom_", bottle_ratio=bottle_ratio, **self.shared_args)
        self.up = [
            UpStep(r, bottle_ratio, skip=level <= self.skips, name=f"up_{i}", **self.shared_args)
            for i, level in enumerate(range(mask_depth - 1, 0, -1))
        ]
        self.head = MaskHead(mask_act, name="head", **self.shared_args)

    def build(self, input_shape: Shape) -> None:
        shapes = [input_shape]
        for down in self.down:
            shapes.append(build_chain([down], shapes[-1]))
        shape = build_chain(self.bottom, shapes.pop())
        for up in self.up:
            up.build(shape, shapes[-1])
            shape = shapes.pop()
        self.head.build(input_shape)

    def call(self, x: Any, training: bool | None = None) -> Any:
        self.compute_output_shape(x.shape)
        features = [x]
        for down in self.down:
            x = down(x, training=training)
            features.append(x)
        x = run_chain(self.bottom, features.pop(), training)
        for up in self.up:
            x = up(x, features.pop(), training=training)
        return self.head(upsample_to(x, features.pop(), self.data_format), training=training)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """Return ``input_shape`` if every pooling halves something.

        Raises:
            ValueError: The map is so small that it would reach one pixel before the last pooling.
        """
        height, width = (input_shape[axis] for axis in self.spatial_axes)
        minimum = 2 ** (self.mask_depth - 1) + 1
        if any(size is not None and size < minimum for size in (height, width)):
            raise ValueError(
                f"a soft mask branch with mask_depth={self.mask_depth} pools {self.mask_depth} times and needs a map "
                f"of at least {minimum}x{minimum}, got {height}x{width}; use a smaller mask_depth")
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "mask_depth": self.mask_depth,
            "r": self.r,
            "skips": self.skips,
            "mask_act": self.head.mask_act,
            "bottle_ratio": self.bottle_ratio,
        }


@keras.saving.register_keras_serializable("ran_layers")
class LocalMaskBranch(ImageLayer):
    """Mask branch without down and up steps: units at the trunk's resolution, then the head of the soft mask branch.

    The report's Local Mask Branch, the paper's "local convolutions" (section 4.1, Table 4), as
    :class:`ran_layers.LocalMaskBranch`.

    Shapes:
        input and output ``(batch, height, width, channels)``.

    Args:
        units: Number of units; 2 in the report.
        mask_act, bottle_ratio, data_format, **kwargs: As in :class:`SoftMaskBranch`.

    Raises:
        TypeError, ValueError: An argument is of the wrong type or outside its range; the message names it.

    Example:
        >>> tuple(LocalMaskBranch()(keras.ops.zeros((2, 7, 9, 16))).shape)
        (2, 7, 9, 16)
    """

    def __init__(
            self,
            *,
            units: int = 2,
            mask_act: str = "mixed",
            bottle_ratio: float = 0.25,
            data_format: str | None = None,
            **kwargs: Any,
    ) -> None:
        super().__init__(data_format=data_format, **kwargs)
        check_int("units", units, 0)
        self.bottle_ratio = check_fraction("bottle_ratio", bottle_ratio, zero=False, one=True)
        self.units = residual_units(units, "units_", bottle_ratio=bottle_ratio, **self.shared_args)
        self.head = MaskHead(mask_act, name="head", **self.shared_args)

    def build(self, input_shape: Shape) -> None:
        build_chain([*self.units, self.head], input_shape)

    def call(self, x: Any, training: bool | None = None) -> Any:
        return run_chain([*self.units, self.head], x, training)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "units": len(self.units),
            "mask_act": self.head.mask_act,
            "bottle_ratio": self.bottle_ratio,
        }
