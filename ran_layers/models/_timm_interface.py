"""timm's model interface for networks of a stem, stages, a norm and a head: what the networks here have in common."""
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from timm.layers import ClassifierHead
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices

from ..layers._args import check_choice, check_fraction, check_int

POOLINGS = ("avg", "max", "avgmax", "catavgmax", "fast", "fastavg", "fastmax", "fastavgmax", "fastcatavgmax", "")


class Stage(nn.Module):
    """Blocks that run one after the other; their activations are recomputed if ``grad_checkpointing`` is set."""

    def __init__(self, blocks: nn.Sequential) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.blocks = blocks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


def check_stages(**counts: tuple[Sequence[int], int]) -> list[list[int]]:
    """Return arguments that have an entry for each stage: by name the entries, and the least that each may be.

    Raises:
        TypeError, ValueError: One is not a sequence, they are not equally many or empty, or an entry is not an integer
            or too small.
    """
    for name, (entries, _) in counts.items():
        if not isinstance(entries, Sequence) or isinstance(entries, str):
            raise TypeError(f"{name} must be a sequence with an int for each stage, got {entries!r} "
                            f"({type(entries).__name__})")
    *names, last = counts
    if len({len(entries) for entries, _ in counts.values()}) > 1:
        raise ValueError(f"{', '.join(names)} and {last} must have one entry per stage, got "
                         f"{', '.join(str(entries) for entries, _ in counts.values())}")
    if not counts[last][0]:
        raise ValueError(f"{names[0]} must have at least one entry, the stages of the network, got none")
    return [[check_int(f"{name}[{i}]", entry, least) for i, entry in enumerate(entries)]
            for name, (entries, least) in counts.items()]


def feature_cfg(channels: Any, stem_levels: int = 0) -> dict[str, Any]:
    """Return timm's ``feature_cfg`` of a network: all its levels, as many as it has ``channels`` and those of the stem.

    What is wrong with ``channels`` the network says.
    """
    levels = stem_levels + len(channels) if isinstance(channels, Sequence) else 0
    return dict(out_indices=tuple(range(levels)), flatten_sequential=True)


class StagedNet(nn.Module):
    """Base class of the networks: ``head(norm(stages(stem(x))))``.

    A network checks its arguments by this constructor, then sets ``stem`` and ``norm`` if it has them, fills
    ``stages`` with one :class:`Stage` a resolution, and ends with :meth:`set_head`. It adds its ``group_matcher``.

    Shapes:
        input ``(batch, in_chans, height, width)``; logits ``(batch, num_classes)``.

    Raises:
        TypeError, ValueError: An argument is of the wrong type or outside its range; the message names it.
    """

    def __init__(self, num_classes: int, in_chans: int, drop_rate: float, drop_path_rate: float) -> None:
        super().__init__()
        self.num_classes = check_int("num_classes", num_classes, 0)
        self.in_chans = check_int("in_chans", in_chans, 1)
        self.drop_rate = check_fraction("drop_rate", drop_rate, zero=True, one=False)
        check_fraction("drop_path_rate", drop_path_rate, zero=True, one=False)
        self.stem = nn.Sequential()
        self.stem_levels = 0  # feature levels of the stem: 1 if its layer `stem_feat_idx` gives one
        self.stem_feat_idx = 0
        self.stages = nn.Sequential()
        self.norm: nn.Module = nn.Identity()

    def set_head(self, feature_info: list[dict[str, Any]], global_pool: str, dd: dict[str, Any]) -> None:
        """Put the classifier behind the last of the feature levels, which ``feature_info`` describes in timm's form."""
        self.feature_info = feature_info
        self.num_features: int = feature_info[-1]["num_chs"]
        _check_pooling(global_pool, self.num_classes)
        self.head = ClassifierHead(
            self.num_features, self.num_classes, pool_type=global_pool, drop_rate=self.drop_rate, **dd)
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Draw the weights anew, each layer's as PyTorch does; after the meta device, for the first time."""
        for module in self.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade computation for memory: recompute each stage's blocks in the backward pass."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the classifier layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one of ``num_classes`` (0 for none), and the pooling if given.

        As in timm, a pooling that is not given stays, also where there is none.

        Raises:
            TypeError, ValueError: An argument is outside its range, or asks for a classifier without pooling.
        """
        num_classes = check_int("num_classes", num_classes, 0)
        if global_pool is not None:
            _check_pooling(global_pool, num_classes)
        self.num_classes = num_classes
        self.head.in_features = self.num_features  # fewer than at first if stages were pruned
        self.head.reset(num_classes, global_pool)
        self.head.to(next(self.parameters()))  # its device and dtype
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: int | list[int] | None = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = "NCHW",
            intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the last features and the feature maps of the stem, if it gives one, and the stages.

        Args:
            x: Images.
            indices: Take the last n maps if an int, all if None, those named if a list or tuple (0 is the first level,
                -1 the last). They come in the order of the network, each once.
            norm: Apply the final norm to the last stage's map.
            stop_early: Stop at the last map that was asked for.
            output_fmt: 'NCHW', the only form there is; any other raises a ``ValueError``.
            intermediates_only: Return the maps alone.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got '{output_fmt}'")
        levels = self.stem_levels + len(self.stages)
        take_indices, max_index = feature_take_indices(levels, indices)
        intermediates = []
        for i, layer in enumerate(self.stem):
            x = layer(x)
            if self.stem_levels and i == self.stem_feat_idx and 0 in take_indices:
                intermediates.append(x)

        if torch.jit.is_scripting() or not stop_early:  # a slice cannot be scripted
            stages = self.stages
        else:
            stages = self.stages[:max_index + 1 - self.stem_levels]
        level = self.stem_levels
        for stage in stages:
            x = stage(x)
            if level in take_indices:
                intermediates.append(self.norm(x) if norm and level == levels - 1 else x)
            level += 1
        if intermediates_only:
            return intermediates
        if level == levels:
            x = self.norm(x)
        return x, intermediates

    def prune_intermediate_layers(
            self,
            indices: int | list[int] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> list[int]:
        """Drop what is not needed for the intermediate feature maps ``indices``; return their indices.

        Args:
            indices: As in :meth:`forward_intermediates`.
            prune_norm: Drop the final norm, even if the last stage stays.
            prune_head: Drop pooling and classifier, even if the last stage stays.
        """
        levels = self.stem_levels + len(self.stages)
        take_indices, max_index = feature_take_indices(levels, indices)
        cut = max_index < levels - 1
        self.stages = self.stages[:max_index + 1 - self.stem_levels]
        if not len(self.stages):
            self.stem = self.stem[:self.stem_feat_idx + 1]
        if prune_norm or cut:
            self.norm = nn.Identity()
        if cut:
            self.num_features = self.feature_info[max_index]["num_chs"]
        if prune_head or cut:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Return the normalised map of the last stage, ``(batch, num_features, height, width)``."""
        return self.norm(self.stages(self.stem(x)))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Pool and classify; stop before the classifier if ``pre_logits``."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def _check_pooling(global_pool: str, num_classes: int) -> None:
    """Raise if ``global_pool`` is not a pooling, or is none where there are classes: a linear layer takes no map."""
    check_choice("global_pool", global_pool, POOLINGS)
    if not global_pool and num_classes:
        raise ValueError(f"global_pool must not be '' for a classifier; give num_classes=0 with it, got {num_classes}")
