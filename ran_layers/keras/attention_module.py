"""The Attention Module: a trunk branch, a mask branch, and the residual product of the two.

`Residual Attention Network for Image Classification` - https://arxiv.org/abs/1704.06904
"""
from typing import Any

import keras

from ..layers._args import check_choice, check_fraction, check_int
from ._image_layer import ImageLayer, Shape, build_chain, run_chain
from .mask_branch import LocalMaskBranch, SoftMaskBranch
from .residual_unit import residual_units


@keras.saving.register_keras_serializable("ran_layers")
class AttentionModule(ImageLayer):
    """Attention Module (Wang et al. 2017, section 3 and Figure 2), as :class:`ran_layers.AttentionModule`.

    With ``x`` the input after ``p`` units, ``T`` the trunk branch (``t`` units on ``x``) and ``M`` the mask branch on
    ``x``, the output is ``p`` units on ``(1 + M) * T`` (attention residual learning, equation 3) or on ``M * T``
    (naive attention learning). It keeps the shape, so it fits between any two layers of a convolutional network.

    Shapes:
        input and output ``(batch, height, width, channels)``; with a soft mask, height and width above
        ``2 ** (mask_depth - 1)``.

    Args:
        p: Units before and after the two branches.
        t: Units of the trunk branch.
        r: Units at each step of the soft mask branch.
        mask_depth: Poolings of the soft mask branch. The paper's networks have 3, 2, 1 in stages 1, 2, 3; the default
            of 1 suits any map of at least 2x2.
        skips: Skip connections of the soft mask branch; ``mask_depth - 1`` if None.
        mask: ``'soft'`` (bottom-up top-down) or ``'local'`` (units at one resolution, Table 4).
        learning: ``'residual'`` for ``(1 + M) * T`` or ``'naive'`` for ``M * T`` (Table 3).
        mask_act: ``'mixed'``, ``'channel'`` or ``'spatial'`` (section 3.3, Table 1).
        bottle_ratio: Inner channels over channels in each unit, in (0, 1].
        data_format: ``'channels_last'`` or ``'channels_first'``; that of ``keras.config`` if None.
        **kwargs: ``name``, ``dtype`` and ``trainable``, as in any Keras layer.

    Raises:
        TypeError, ValueError: An argument is of the wrong type or outside its range; the message names it.
        ValueError: When called, the map is too small for ``mask_depth``.

    Example:
        >>> tuple(AttentionModule(mask_depth=2)(keras.random.normal((2, 15, 20, 64))).shape)
        (2, 15, 20, 64)
    """

    def __init__(
            self,
            *,
            p: int = 1,
            t: int = 2,
            r: int = 1,
            mask_depth: int = 1,
            skips: int | None = None,
            mask: str = "soft",
            learning: str = "residual",
            mask_act: str = "mixed",
            bottle_ratio: float = 0.25,
            data_format: str | None = None,
            **kwargs: Any,
    ) -> None:
        super().__init__(data_format=data_format, **kwargs)
        check_int("p", p, 0)
        check_int("t", t, 0)
        check_int("r", r, 1)
        check_int("mask_depth", mask_depth, 1)
        check_choice("mask", mask, ("soft", "local"))
        if skips is not None:
            check_int("skips", skips, 0)
            if mask == "local":
                raise ValueError(f"skips must be None for mask='local', which has no skip connections, got {skips}")
        check_choice("learning", learning, ("residual", "naive"))
        check_fraction("bottle_ratio", bottle_ratio, zero=False, one=True)
        self.init_args = dict(
            p=p, t=t, r=r, mask_depth=mask_depth, skips=skips, mask=mask, learning=learning, mask_act=mask_act,
            bottle_ratio=bottle_ratio)

        self.residual = learning == "residual"
        unit_args = dict(self.shared_args, bottle_ratio=bottle_ratio)
        self.pre = residual_units(p, "pre_", **unit_args)
        self.trunk = residual_units(t, "trunk_", **unit_args)
        self.mask: ImageLayer
        if mask == "soft":
            self.mask = SoftMaskBranch(
                mask_depth=mask_depth, r=r, skips=skips, mask_act=mask_act, name="mask", **unit_args)
        else:
            self.mask = LocalMaskBranch(mask_act=mask_act, name="mask", **unit_args)
        self.post = residual_units(p, "post_", **unit_args)

    def build(self, input_shape: Shape) -> None:
        build_chain([*self.pre, *self.trunk, self.mask, *self.post], input_shape)

    def call(self, x: Any, training: bool | None = None) -> Any:
        x = run_chain(self.pre, x, training)
        trunk, mask = run_chain(self.trunk, x, training), self.mask(x, training=training)
        x = trunk + mask * trunk if self.residual else mask * trunk
        return run_chain(self.post, x, training)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return self.mask.compute_output_shape(input_shape)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self.init_args}
