"""Attention Modules inside somebody else's network: put them in, and take them out again.

`Residual Attention Network for Image Classification` - https://arxiv.org/abs/1704.06904
`Going deeper with Image Transformers` (LayerScale) - https://arxiv.org/abs/2103.17239
"""
import difflib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn

from ._probe import CHILD, blank_image, find_maps, why_no_new_child
from .layers import AttentionModule

Where = str | Sequence[str] | Callable[[str, nn.Module], bool]

# By name: to import the last two is slow, and not every build of torch has them.
WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")


class InsertedAttention(nn.Module):
    """An Attention Module with a layer scale: ``x + gamma * (attention(x) - x)``, with one ``gamma`` per channel.

    With ``gamma = 0``, where it starts, this is exactly the identity; with ``gamma = 1`` it is the Attention Module.
    The mask itself cannot give such a start: a sigmoid is never 0, and where it comes near its gradient vanishes. Here
    the first step moves ``gamma``, whose gradient does not vanish, and from the second on everything learns. Where the
    module overflows, as on maps of some thousands in float16, the outputs are not numbers.

    Shapes:
        input and output ``(batch, channels, height, width)``, or ``(batch, height, width, channels)`` with ``nhwc``.

    Args:
        attention: The module that is scaled; it keeps the shape.
        channels: Channels of the feature map.
        nhwc: Whether the maps have their channels last.
        device, dtype: Of ``gamma``, as in torch's layers.

    Example:
        >>> from ran_layers import AttentionModule
        >>> module, x = InsertedAttention(AttentionModule(64), 64).eval(), torch.randn(1, 64, 8, 8)
        >>> torch.equal(module(x), x)
        True
    """

    def __init__(
            self, attention: nn.Module, channels: int, *, nhwc: bool = False, device: Any = None, dtype: Any = None,
    ) -> None:
        super().__init__()
        self.attention = attention
        self.gamma = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.reset_parameters()
        self.nhwc = nhwc
        self.hook: Any = None  # removes the forward hook of the host, if that does not run its children by itself

    def reset_parameters(self) -> None:
        """Begin as the identity, also after the meta device; ``attention`` keeps its own weights."""
        nn.init.zeros_(self.gamma)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.nhwc:
            x = x.permute(0, 3, 1, 2)
        # Under autocast the module may answer in another type, and the maps are to keep theirs.
        x = x + (self.gamma.view(-1, 1, 1) * (self.attention(x) - x)).to(x.dtype)
        return x.permute(0, 2, 3, 1) if self.nhwc else x

    def extra_repr(self) -> str:
        return "nhwc=True" if self.nhwc else ""


def insert_attention(
        model: nn.Module,
        where: Where,
        *,
        example_input: torch.Tensor | None = None,
        **module_args: Any,
) -> list[str]:
    """Put an Attention Module behind modules of ``model``, in place, without changing what the network computes.

    Each module found by ``where`` becomes a host: it gets a child ``inserted_attention`` (:class:`InsertedAttention`)
    that its output passes through. The channels are found by one forward pass of a blank image. Names, classes and
    state dict keys of the network stay as they were; the new ones are added, so weights of the original network still
    load with ``strict=False``, and :func:`remove_attention` takes the modules out again.

    At insertion the outputs are those of the network as it was, exactly; see :class:`InsertedAttention` for the
    initialisation. Feature maps with the channels last (Swin) are handled; only in a network that takes images of one
    size, a map of as many channels as rows and columns is taken to have them first.

    Args:
        model: Any network with feature maps of four dimensions.
        where: The hosts: the name of a module; a list of names; ``'stages'`` for every feature level of a timm model
            (``model.feature_info``; a module that is itself called so is ``['stages']``); or a function of name and
            module that returns whether it is one.
        example_input: An input of the network, for the forward pass that finds the channels. If None, a blank image of
            the size in ``model.pretrained_cfg``, or of 224x224.
        **module_args: Arguments of every :class:`~ran_layers.AttentionModule` (``mask_depth``, ``t``, ``mask``, ...).

    Returns:
        The names of the hosts, in the network's order.

    Raises:
        TypeError, ValueError: ``where`` finds no module, or one that cannot be a host: it has an Attention Module
            already, is not run exactly once, runs its children in a way of its own, is compiled, or returns no feature
            map; ``module_args`` are not those of an Attention Module, or the module does not fit (``mask_depth`` too
            large for the map, a ``trunk`` of other channels); ``model`` is wrapped for several processes, or has lazy
            layers and no ``example_input``. The network is then as it was, but for lazy layers that have run.

    Example:
        >>> import timm
        >>> model = timm.create_model("resnet18")
        >>> insert_attention(model, ["layer2", "layer3"], mask_depth=2)
        ['layer2', 'layer3']
    """
    reserved = sorted({"channels", "device", "dtype"} & module_args.keys())
    if reserved:
        raise TypeError(f"module_args must not hold {', '.join(reserved)}: insert_attention finds them by itself")
    model = _unwrapped(model)
    if not isinstance(example_input, torch.Tensor | None):
        raise TypeError(f"example_input must be a tensor or None, got {type(example_input).__name__}")
    if example_input is not None and example_input.ndim != 4:
        raise ValueError("example_input must be images (batch, channels, height, width), got a tensor of shape "
                         f"{tuple(example_input.shape)}")
    hosts = _find_hosts(model, where)
    if len(hosts) > 1 and isinstance(module_args.get("trunk"), nn.Module):
        raise ValueError(f"trunk is one module and cannot be in {len(hosts)} places: insert one at a time")

    inserted = {}
    with torch.inference_mode(False):  # where it is on, parameters would be made that cannot be trained
        if example_input is None:
            example_input = blank_image(model)
        example_input = example_input.clone()  # one that was made where it is on has no count of changes in place
        places = find_maps(model, hosts, example_input)
        for name, found in places.items():
            channels = found.feature_map.shape[-1 if found.nhwc else 1]
            dd: dict[str, Any] = {"device": found.feature_map.device, "dtype": found.feature_map.dtype}
            attention = AttentionModule(channels, **module_args, **dd)
            inserted[name] = InsertedAttention(attention, channels, nhwc=found.nhwc, **dd).eval()
            _check_fit(name, inserted[name], found.feature_map)

    for name, module in inserted.items():  # only now that nothing can fail any more
        module.train(hosts[name].training)
        host = hosts[name]
        if not places[name].runs_children:
            # Before other hooks, so that timm's extractors and who else looks at the output see what the network goes
            # on with.
            module.hook = host.register_forward_hook(_attend, prepend=True)
        host.add_module(CHILD, module)
    _forget_compiled_graphs()
    return list(inserted)


def remove_attention(model: nn.Module) -> list[str]:
    """Undo every :func:`insert_attention` on ``model``, in place: the same modules and state dict keys as before.

    Returns:
        The names of the former hosts, in the network's order.

    Raises:
        TypeError, ValueError: ``model`` is not a module, or wrapped for several processes.

    Example:
        >>> import timm
        >>> model = timm.create_model("resnet18")
        >>> keys = model.state_dict().keys()
        >>> hosts = insert_attention(model, "stages")
        >>> remove_attention(model) == hosts and model.state_dict().keys() == keys
        True
    """
    model = _unwrapped(model)
    hosts = {name: host for name, host in model.named_modules() if CHILD in dict(host.named_children())}
    for host in hosts.values():
        hook = getattr(host, CHILD).hook
        if hook is not None:
            hook.remove()
        delattr(host, CHILD)
    _forget_compiled_graphs()
    return list(hosts)


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the network that torch.compile wrapped, or ``model`` itself.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: It is wrapped for several processes, which would train each its own copy of what is new.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {model!r} ({type(model).__name__})")
    for module in model.modules():
        wrapper = next((cls.__name__ for cls in type(module).__mro__ if cls.__name__ in WRAPPERS), None)
        if wrapper:
            raise ValueError(f"model must not be wrapped yet: insert and remove Attention Modules before {wrapper}, "
                             "which knows the parameters that it finds")
    return getattr(model, "_orig_mod", model)


def _forget_compiled_graphs() -> None:
    """Have torch.compile begin anew, if it was in use: its graphs take no notice of hooks that come or go."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _attend(host: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
    """Forward hook of a host. It looks its module up, so that a copy of the network runs the copy's."""
    return host.inserted_attention(output)


def _find_hosts(model: nn.Module, where: Where) -> dict[str, nn.Module]:
    """Return the modules that ``where`` means, by name and in the network's order."""
    modules = {name: module for name, module in model.named_modules() if name and CHILD not in name.split(".")}
    if callable(where) and not isinstance(where, nn.Module | type):
        names = [name for name, module in modules.items() if where(name, module)]
    elif where == "stages":
        names = _stage_names(model, modules)
    elif isinstance(where, str):
        names = [where]
    elif isinstance(where, Sequence) and all(isinstance(name, str) for name in where):
        names = list(where)
    else:
        raise TypeError(
            "where must be a module's name, a list of names, 'stages' or a function of name and module, got "
            + (f"a {type(where).__name__}" if isinstance(where, nn.Module) else repr(where)))
    if not names:
        raise ValueError(f"where must find at least one module of {type(model).__name__}, it found none")

    for name in names:
        if name not in modules:
            similar = difflib.get_close_matches(name, modules, n=3) or list(model._modules)[:6]
            raise ValueError(
                f"where must name modules of {type(model).__name__}, which has no {name!r}; it has e.g. "
                + ", ".join(map(repr, similar)))
        host = modules[name]
        if hasattr(host, "_orig_mod"):
            raise ValueError(f"{name!r} is the result of torch.compile; name '{name}._orig_mod', or compile later")
        if CHILD in dict(host.named_children()):
            raise ValueError(f"{name!r} has an Attention Module already; undo it with remove_attention first")
        runs_children_itself = isinstance(host, (nn.Sequential, nn.ModuleDict, nn.ModuleList))
        if runs_children_itself and type(host).forward is not nn.Sequential.forward:
            raise ValueError(why_no_new_child(name, host))
        levels = [level for level in _feature_levels(model) if level.startswith(f"{name}.")]
        if len(levels) > 1 and type(host).forward is nn.Sequential.forward:
            raise ValueError(
                f"{name!r} holds the feature levels {', '.join(levels)}, which {type(model).__name__} may count, or "
                f"run one by one past a new child; name its end, '{name}.{next(reversed(host._modules))}'")
    return {name: modules[name] for name in modules if name in names}


def _feature_levels(model: nn.Module) -> list[str]:
    """Return the names of the modules that give a timm model's feature maps, none for other networks."""
    info: Any = getattr(model, "feature_info", None) or ()
    return info.module_name() if hasattr(info, "module_name") else [level["module"] for level in info]


def _stage_names(model: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
    """Return the names of the modules behind a timm model's feature levels."""
    levels = _feature_levels(model)
    if not levels:
        raise ValueError(
            f"where='stages' needs a timm model with feature_info, which {type(model).__name__} has not; name modules")
    # timm's feature extractors write 'stages.0' as 'stages_0', or hold the whole network as 'model' or 'body'.
    def forms(level: str) -> tuple[str, ...]:
        return level, level.replace(".", "_"), level.replace(".", "_", 1), f"model.{level}", f"body.{level}"

    names = [next((form for form in forms(level) if form in modules), None) for level in levels]
    if None in names:
        raise ValueError(f"where='stages' needs feature levels that are outputs of modules; in {type(model).__name__} "
                         f"there is none for the level {levels[names.index(None)]!r}; name modules")
    return [name for name in names if name]


def _check_fit(name: str, module: InsertedAttention, feature_map: torch.Tensor) -> None:
    """Raise if the module, in eval mode, does not take the host's output."""
    version = feature_map._version
    try:
        with torch.no_grad():
            module(feature_map)
    except (RuntimeError, ValueError) as error:
        shape = tuple(feature_map.shape)
        raise ValueError(
            f"the Attention Module for {name!r} does not take its output of shape {shape}: {error}") from error
    if feature_map._version != version:
        raise ValueError(f"the Attention Module for {name!r} changes its input in place, which goes past it too; its "
                         "trunk must not begin with an operation in place")
