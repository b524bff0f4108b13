"""See what the Attention Modules of a network attend to: the masks of a forward pass, by module name."""
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn as nn

from ._eager import force_eager
from .layers import AttentionModule


@contextmanager
def record_masks(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Record the masks of the forward passes made inside the ``with`` block.

    Yields a dictionary that the forward fills: for each :class:`AttentionModule`, by its name in ``model`` and in the
    order of use, the mask ``(batch, channels, height, width)`` that weighted its trunk branch. The masks are the
    tensors of the forward itself, so a loss on them has gradients. A second forward, or a module used twice,
    overwrites the first, so do not run the model in two threads. Compiled models run eagerly inside the block. No hook
    is left behind, not even after an error; a copy of the model that is made inside the block has copies of them.

    Args:
        model: A network with Attention Modules in it, ours or another.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
        ValueError: ``model`` has no Attention Module, or is spread over several GPUs by ``nn.DataParallel``.

    Example:
        >>> model = timm.create_model("ran_att56_cifar")
        >>> with record_masks(model) as masks:
        ...     logits = model(torch.randn(2, 3, 32, 32))
        >>> masks["stages.0.blocks.1"].shape
        torch.Size([2, 64, 16, 16])
    """
    masks: dict[str, torch.Tensor] = {}

    def keep(name: str, _module: nn.Module, _args: Any, mask: torch.Tensor) -> None:
        masks[name] = mask

    modules = attention_modules(model)
    if any(isinstance(module, nn.DataParallel) and len(module.device_ids) > 1 for module in model.modules()):
        raise ValueError("model must not be in nn.DataParallel, whose replicas share the masks; pass its .module")
    with ExitStack() as stack:
        # A compiled graph takes no notice of hooks that were registered after it was made.
        stack.enter_context(force_eager())
        for name, module in modules.items():
            stack.enter_context(module.mask.register_forward_hook(partial(keep, name)))
        yield masks


def attention_maps(model: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the masks of one forward pass in evaluation mode and without gradients, by module name.

    The model is left as it was: no hook, the same training mode in every module, the same batch statistics. For the
    masks of an ordinary forward, in training too, see :func:`record_masks`.

    Args:
        model: A network with Attention Modules in it, ours or another.
        images: The network's input, ``(batch, in_chans, height, width)``, on its device.

    Returns:
        For each :class:`AttentionModule` that the forward used, its mask ``(batch, channels, height, width)``; the
        masks of the paper's networks ("mixed" activation) lie between 0 and 1.

    Raises:
        TypeError: ``model`` is no ``nn.Module`` or ``images`` no tensor.
        ValueError: ``model`` has no Attention Module or ``images`` not four dimensions.

    Example:
        >>> maps = attention_maps(timm.create_model("ran_att56_cifar"), torch.randn(2, 3, 32, 32))
        >>> {name: tuple(mask.shape) for name, mask in maps.items()}
        {'stages.0.blocks.1': (2, 64, 16, 16), 'stages.1.blocks.1': (2, 128, 8, 8), 'stages.2.blocks.1': (2, 256, 4, 4)}
    """
    if not isinstance(images, torch.Tensor):
        raise TypeError(f"images must be a tensor (batch, channels, height, width), got {type(images).__name__}")
    if images.ndim != 4:
        raise ValueError(f"images must have the shape (batch, channels, height, width), got {tuple(images.shape)}")
    with record_masks(model) as masks, evaluating(model):
        model(images)
    return masks


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients inside the ``with`` block; afterwards each module's own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        # Some merge weights or fill a cache in eval(), which only their own train() undoes; it reaches their children.
        for module, training in modes.items():
            if type(module).train is not nn.Module.train:
                module.train(training)
        for module, training in modes.items():
            module.training = training


def attention_modules(model: nn.Module) -> dict[str, AttentionModule]:
    """Return the Attention Modules of ``model`` by name; the names are those of the uncompiled model.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
        ValueError: The network has none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    modules = {
        # torch.compile wraps a module in one whose only child is called _orig_mod.
        ".".join(part for part in name.split(".") if part != "_orig_mod"): module
        for name, module in model.named_modules() if isinstance(module, AttentionModule)
    }
    if not modules:
        raise ValueError(
            f"model must contain an AttentionModule, got a {type(model).__name__} with none; a scripted, traced or "
            "exported network has none left: use the one that it was made from")
    return modules
