"""One forward pass of a network, to find the feature maps that its modules give and where their channels are."""
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn as nn

from ._eager import force_eager
from .masks import evaluating

# The name of an inserted submodule; long, because hosts have attributes called `attention` of their own.
CHILD = "inserted_attention"
PROBE_SIZE = 224  # pixels of the image that finds the channel counts, for networks that state no size of their own


class Found(NamedTuple):
    """What a forward pass tells of a module."""

    feature_map: torch.Tensor
    nhwc: bool  # whether the channels of the map are its last dimension
    runs_children: bool  # whether the module would run a new child as a Sequential does, whose output is its own


def find_maps(model: nn.Module, hosts: dict[str, nn.Module], example_input: torch.Tensor) -> dict[str, Found]:
    """Return what one forward pass of ``example_input`` tells of the modules ``hosts`` of ``model``.

    Raises:
        ValueError: The network does not run on it, or a module is not run once or gives no feature map.
    """
    outputs, running = _run(model, hosts, example_input)
    # Channels are last in few networks, and a stride or a border may make a map's width look like channels.
    doubtful = {name: output for name, output in outputs.items()
                if len(set(output.shape[1:])) == 1 or _is_nhwc(output, example_input)}
    wide = _run_wide(model, hosts, doubtful, example_input) if doubtful else {}
    return {name: Found(output, wide.get(name, _is_nhwc(output, example_input)), name in running)
            for name, output in outputs.items()}


def blank_image(model: nn.Module) -> torch.Tensor:
    """Return an input that the network can be expected to take.

    Raises:
        ValueError: The network has lazy layers, which the first image would shape.
    """
    if any(map(nn.parameter.is_lazy, model.parameters())):
        raise ValueError(f"{type(model).__name__} has lazy layers, which take their shape from the first image; run it "
                         "once, or pass example_input")
    parameter = next(model.parameters(), torch.empty(0))
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    channels, *size = cfg.get("input_size") or (3, PROBE_SIZE, PROBE_SIZE)
    first_conv = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    # They, not the configuration, know of timm's in_chans argument; some networks first take pixels into channels.
    if isinstance(in_chans := getattr(model, "in_chans", None), int):
        channels = in_chans
    elif first_conv is not None:
        channels = first_conv.in_channels
    return torch.zeros(1, channels, *size, device=parameter.device, dtype=parameter.dtype)


def _run(
        model: nn.Module, hosts: dict[str, nn.Module], example_input: torch.Tensor,
) -> tuple[dict[str, torch.Tensor], set[str]]:
    """Return the feature map that each host gives in one forward pass, and the hosts that would run a new child.

    Those do as a Sequential: their output is that of their last child.
    """
    outputs: dict[str, list[Any]] = {name: [] for name in hosts}
    guests = {name: _Guest() for name in hosts}

    def record(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, args, output: outputs[name].append(output)

    # Recomputed or compiled, a network calls the children of some hosts without the hosts, or no hooks.
    modules: list[Any] = list(model.modules())
    checkpointed = [module for module in modules if getattr(module, "grad_checkpointing", False) is True]
    # Before other hooks, as the Attention Modules will be.
    hooks = [host.register_forward_hook(record(name), prepend=True) for name, host in hosts.items()]
    try:
        for name, host in hosts.items():
            host.add_module(CHILD, guests[name])
        for module in checkpointed:
            module.grad_checkpointing = False
        with evaluating(model), _without_autocast(example_input.device.type), _uncompiled():
            model(example_input)
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} does not run on an input of shape {tuple(example_input.shape)} ({error}); "
            f"pass one that it takes as example_input") from error
    finally:
        for hook in hooks:
            hook.remove()
        for host in hosts.values():
            host._modules.pop(CHILD, None)
        for module in checkpointed:
            module.grad_checkpointing = True

    maps = {}
    for name, found in outputs.items():
        kind = type(hosts[name]).__name__
        if len(found) != 1:
            raise ValueError(
                f"{name!r} ({kind}) must be run once in a forward pass to have one place, it is run {len(found)} times")
        if not isinstance(found[0], torch.Tensor) or found[0].ndim != 4:
            got = tuple(found[0].shape) if isinstance(found[0], torch.Tensor) else type(found[0]).__name__
            raise ValueError(
                f"{name!r} ({kind}) must return a feature map (batch, channels, height, width) or "
                f"(batch, height, width, channels), it returns {got}")
        if guests[name].seen and not guests[name].saw_last(found[0]):
            raise ValueError(why_no_new_child(name, hosts[name]))
        maps[name] = found[0]
    return maps, {name for name in maps if guests[name].seen}


class _Guest(nn.Module):
    """A child that changes nothing, and remembers with what it was called, if it was."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, Any]] = []  # each input, and how often it had been changed in place by then

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        self.seen.append((x, getattr(x, "_version", None)))
        return x

    def saw_last(self, output: torch.Tensor) -> bool:
        """Whether it was called once, and ``output`` is what it let through, as it was then."""
        return len(self.seen) == 1 and self.seen[0][0] is output and self.seen[0][1] == output._version


def why_no_new_child(name: str, host: nn.Module) -> str:
    """Say why ``host`` cannot have one more child."""
    return (f"{name!r} is a container ({type(host).__name__}) that runs its children in its own way, where a new "
            f"child would be in the way; name a module before or after it")


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """In it, maps are of the type of the parameters, and so will be the parameters of what is inserted."""
    return torch.autocast(device_type, enabled=False) if torch.amp.is_autocast_available(device_type) else nullcontext()


def _uncompiled() -> AbstractContextManager[Any]:
    """In it, what is compiled runs as it was written. Where nothing can be, torch's compiler is not even imported."""
    return force_eager() if "torch._dynamo" in sys.modules else nullcontext()


def _run_wide(
        model: nn.Module, hosts: dict[str, nn.Module], outputs: dict[str, torch.Tensor], example_input: torch.Tensor,
) -> dict[str, bool]:
    """Tell from an image of twice the width where the channels of ``outputs`` are: in a dimension that stays."""
    image = torch.cat([example_input, example_input], -1)
    try:
        wide, _ = _run(model, {name: hosts[name] for name in outputs}, image)
    except ValueError:  # a network of one input size
        return {}
    return {name: wide[name].shape[3] == output.shape[3] for name, output in outputs.items()
            if wide[name].shape != output.shape}


def _is_nhwc(output: torch.Tensor, image: torch.Tensor) -> bool:
    """Whether the channels are the last dimension: the one that, left out, leaves the image's aspect ratio."""
    height, width = image.shape[-2:]
    nchw, nhwc = (abs(h * width - w * height) for h, w in (output.shape[2:], output.shape[1:3]))
    return nhwc < nchw
