"""Argument checks shared by the layers: one clear error that names the argument, what came and what is allowed."""
import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real
from types import FunctionType
from typing import Any

import torch
import torch.nn as nn
from timm.layers import create_act_layer, get_norm_act_layer

LayerType = str | type[nn.Module] | Callable[..., nn.Module]


def check_int(name: str, value: Any, minimum: int) -> int:
    """Return ``value`` if it is an integer of at least ``minimum``.

    Raises:
        TypeError: ``value`` is not an integer (nor is a bool).
        ValueError: ``value`` is below ``minimum``.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int of at least {minimum}, got {value!r} ({type(value).__name__})")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return int(value)


def check_fraction(name: str, value: Any, *, zero: bool, one: bool) -> float:
    """Return ``value`` if it is a number between 0 and 1; ``zero`` and ``one`` say whether the ends are allowed.

    Raises:
        TypeError: ``value`` is not a number.
        ValueError: ``value`` is outside the interval.
    """
    interval = f"in {'[' if zero else '('}0, 1{']' if one else ')'}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number {interval}, got {value!r} ({type(value).__name__})")
    if not (0 < float(value) < 1 or (zero and value == 0) or (one and value == 1)):
        raise ValueError(f"{name} must be {interval}, got {value}")
    return float(value)


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> str:
    """Return ``value`` if it is one of ``allowed``.

    Raises:
        TypeError: ``value`` is not a string.
        ValueError: ``value`` is another string.
    """
    names = ", ".join(repr(choice) for choice in allowed)
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {names}, got {value!r} ({type(value).__name__})")
    if value not in allowed:
        raise ValueError(f"{name} must be one of {names}, got {value!r}")
    return value


def check_unit_layer(value: Any, arguments: Iterable[str], positional: Sequence[str] = ("channels",)) -> Any:
    """Return ``value`` if it can be called as the class of a unit, with those ``positional`` and keyword arguments.

    Raises:
        TypeError: It is not a layer class, or one that lacks an argument, which the message names.
        ValueError: It is a partial of one with an argument of its own that it would be called with all the same.
    """
    if not _makes_modules(value):
        raise TypeError(f"unit_layer must be a layer class, got {value!r} ({type(value).__name__})")
    arguments = list(arguments)
    bound = [name for name in arguments if isinstance(value, functools.partial) and name in value.keywords]
    if bound:
        raise ValueError(f"unit_layer must not bind {', '.join(bound)}, which the units are given anew; "
                         f"pass {bound[0]}= beside it")
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):  # not written in Python: what it takes shows when it is called
        return value
    try:
        signature.bind(*positional, **dict.fromkeys(arguments))
    except TypeError as error:
        raise TypeError(
            f"unit_layer must be called with {', '.join(positional)} and {', '.join(arguments)}; "
            f"{getattr(value, '__name__', value)} cannot be: {error}") from None
    return value


def _makes_modules(value: Any) -> bool:
    """Whether ``value`` is a class of modules or, as far as can be told, a function that returns one."""
    return issubclass(value, nn.Module) if isinstance(value, type) else callable(value)


def check_device_dtype(device: Any, dtype: Any) -> dict[str, Any]:
    """Return both as keyword arguments of torch's layers.

    Raises:
        TypeError: ``dtype`` is no ``torch.dtype`` of floating point, or ``device`` of no type that names one.
        ValueError: ``device`` is none that torch knows.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point torch.dtype or None, got {dtype!r} ({type(dtype).__name__})")
    if device is not None:
        try:
            torch.device(device)
        except (RuntimeError, TypeError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(
                f"device must be a torch.device, its name ('cpu', 'cuda:1', ...) or None, got {device!r}") from error
    return {"device": device, "dtype": dtype}


def resolve_norm_act(norm_layer: LayerType, act_layer: LayerType) -> Callable[..., nn.Module]:
    """Return timm's fused norm + activation layer for the pair, as a constructor that takes ``channels`` first.

    Raises:
        TypeError: an argument is neither a name nor a layer class.
        ValueError: timm has no normalisation with an activation of that name or class, or the class is neither
            torch's nor timm's; from the constructor, it does not take so many channels, or a device and a dtype, or
            has no activation, or takes channels last.
    """
    for name, value in (("norm_layer", norm_layer), ("act_layer", act_layer)):
        if not (isinstance(value, str) or _makes_modules(value)):
            raise TypeError(f"{name} must be a layer's timm name or class, got {value!r} ({type(value).__name__})")
    if isinstance(norm_layer, functools.partial) and norm_layer.args:
        raise ValueError(f"norm_layer must be a partial with arguments by name, which timm keeps, got {norm_layer!r}")
    made_by = getattr(norm_layer, "func", norm_layer)
    if isinstance(made_by, type) and made_by.__module__.partition(".")[0] not in ("torch", "timm"):
        # timm goes by the name of the class, and would take one of its own for it.
        raise ValueError(f"norm_layer must be a timm name, a class of torch or timm, or a function that returns a "
                         f"normalisation with its activation as .act, got {norm_layer!r}")
    try:
        # timm looks a name up only when the fused layer is built, and takes "" for none at all.
        if create_act_layer(act_layer) is None:
            raise KeyError(act_layer)
        layer = get_norm_act_layer(norm_layer, act_layer=act_layer)
    except (AssertionError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(
            f"norm_layer and act_layer must be names or classes that timm.layers.get_norm_act_layer knows "
            f"(e.g. 'batchnorm2d', 'groupnorm1', nn.BatchNorm2d; 'relu', 'silu', nn.ReLU), "
            f"got norm_layer={norm_layer!r}, act_layer={act_layer!r}"
        ) from error
    if layer is None:
        raise ValueError(f"norm_layer must name a normalisation layer, got {norm_layer!r}")

    def construct(channels: int, **kwargs: Any) -> nn.Module:
        try:
            made = layer(channels, **kwargs)
        except (AssertionError, TypeError, ValueError) as error:
            raise ValueError(
                f"norm_layer must take {channels} channels and the arguments {', '.join(kwargs)}, "
                f"{norm_layer!r} does not ({str(error) or type(error).__name__})") from error
        _check_norm_act(made, norm_layer, channels)
        dd = {name: kwargs[name] for name in ("device", "dtype") if kwargs.get(name) is not None}
        # timm makes the activation without them, and some have parameters.
        return made.to(**dd) if dd else made

    return construct


def _check_norm_act(made: nn.Module, norm_layer: LayerType, channels: int) -> None:
    """Raise if what ``norm_layer`` made does not normalise and activate maps of ``channels``, channels first."""
    if isinstance(norm_layer, FunctionType) and not hasattr(made, "act"):
        raise ValueError(f"norm_layer must, as a function, return a normalisation with its activation as .act, "
                         f"as timm has it; {norm_layer.__name__} returns {type(made).__name__}")
    if type(made).__name__.removesuffix("Fp32") in ("LayerNormAct", "RmsNormAct"):
        raise ValueError(f"norm_layer must take maps (batch, channels, height, width), as 'layernorm2d' does; "
                         f"{norm_layer!r} takes channels last")
    groups = getattr(made, "groups", None)
    if isinstance(groups, int) and groups and channels % groups:  # which EvoNorm sees when it is too late
        raise ValueError(f"norm_layer must take {channels} channels, {norm_layer!r} has {groups} groups of them")
