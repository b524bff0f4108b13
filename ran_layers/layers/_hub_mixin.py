"""Save a single layer to a folder or the Hugging Face Hub and load it again, layer classes among its arguments too."""
import functools
import importlib
import inspect
import json
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch
import torch.nn as nn
from huggingface_hub import PyTorchModelHubMixin

from .._download import HubError, download_weights, refuse_pickle

# Where a class named by a downloaded config may come from. Importing any module that a config names would let its
# author choose the code that runs.
CLASS_SOURCES = {"torch.nn": "torch.nn", "timm.layers": "timm.layers", "ran_layers": "ran_layers.layers"}

Layer = TypeVar("Layer", bound="HubMixin")

CARD = """---
{{ card_data }}
---

# %(name)s

A `%(name)s` of a Residual Attention Network ([paper](https://arxiv.org/abs/1704.06904)), a layer for PyTorch.

```python
from ran_layers import %(name)s

layer = %(name)s.from_pretrained("user/name")  # this repository
```
"""


class HubMixin(PyTorchModelHubMixin):
    """huggingface_hub's mixin for layers: ``save_pretrained``, ``from_pretrained`` and ``push_to_hub``.

    The constructor's arguments go to ``config.json``. Classes are recorded by name and found again if they are those
    of ``torch.nn``, ``timm.layers`` or ``ran_layers``; any other, and a ``trunk`` of one's own, is given anew to
    ``from_pretrained``. Weights are written and read as safetensors only. The device is not recorded.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        kwargs = {
            "library_name": "ran-layers",
            "license": "apache-2.0",
            "paper_url": "https://arxiv.org/abs/1704.06904",
            "tags": ["pytorch", "residual-attention-network"],
            "model_card_template": CARD % {"name": cls.__name__},
            **kwargs,
        }
        # One encoder for every argument: the mixin silently drops those it cannot write as JSON. What it
        # hands to `_from_pretrained` is decoded there, where the argument's name is known.
        super().__init_subclass__(coders={object: (encode, lambda value: value)}, **kwargs)

    # The class itself, by its type variable: type checkers take what this returns for what a layer's name makes.
    def __new__(cls: type[Layer], *args: Any, **kwargs: Any) -> Layer:
        instance: Any = super().__new__(cls, *args, **kwargs)
        if isinstance(instance._hub_mixin_config, dict):
            instance._hub_mixin_config.pop("device", None)
        return instance

    @classmethod
    def _from_pretrained(
            cls,
            *,
            model_id: str,
            revision: str | None,
            cache_dir: str | Path | None,
            force_download: bool,
            local_files_only: bool,
            token: str | bool | None,
            map_location: str = "cpu",
            strict: bool = True,
            **model_kwargs: Any,
    ) -> Any:
        if torch.device(map_location).type == "meta":
            raise ValueError("map_location must be a device that holds numbers, got 'meta'")
        if Path(model_id).is_dir():
            weights = refuse_pickle(Path(model_id))
        else:
            weights = download_weights(
                model_id, revision=revision, cache_dir=cache_dir, token=token,
                force_download=force_download, local_files_only=local_files_only)
        for gone in ("proxies", "resume_download"):  # huggingface_hub below 1.0 hands these over too
            model_kwargs.pop(gone, None)
        arguments = {name: decode(name, value) for name, value in model_kwargs.items()}
        of_others = f"{model_id} comes with arguments, in config.json or beside it, that are none of {cls.__name__}"
        try:
            inspect.signature(cls.__init__).bind(None, **arguments)
        except TypeError as error:
            missing = f"{model_id} has no config.json with the arguments of {cls.__name__}"
            raise HubError(f"{of_others if 'unexpected' in str(error) else missing} ({error})") from None
        try:
            model: Any = cls(**arguments)
        except TypeError as error:
            if "unit_layer must be called with" not in str(error):
                raise
            # What **unit_args take in is refused by the units: the arguments of another layer.
            raise HubError(f"{of_others} ({error})") from None
        try:
            safetensors.torch.load_model(model, str(weights), strict=strict, device=map_location)
        except safetensors.SafetensorError as error:
            raise HubError(f"{weights} is not a whole safetensors file ({error})") from None
        return model.eval()


def encode(value: Any) -> Any:
    """Return an argument in a form that JSON can hold; :func:`decode` reads it."""
    if isinstance(value, Real) and not isinstance(value, bool):  # numpy's numbers too, which JSON does not know
        return int(value) if isinstance(value, Integral) else float(value)
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, functools.partial):
        return {"partial": encode(value.func), "args": encode(list(value.args)), "kwargs": encode(value.keywords)}
    if isinstance(value, dict):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    if isinstance(value, nn.Module):
        return {"instance": _path(type(value))}
    if isinstance(value, type) or callable(value):
        return {"class": _path(value)}
    try:
        json.dumps(value)
    except TypeError:
        return {"instance": _path(type(value))}
    return value


def decode(name: str, value: Any) -> Any:
    """Return the argument ``name`` that :func:`encode` wrote; what it did not write comes back as it is.

    Raises:
        ValueError: It is of a class that is not looked up, see ``CLASS_SOURCES``.
    """
    if isinstance(value, list):
        return [decode(name, item) for item in value]
    if not isinstance(value, dict):
        return value
    if "partial" in value:
        args, kwargs = decode(name, value.get("args", [])), decode(name, value.get("kwargs", {}))
        try:
            return functools.partial(decode(name, value["partial"]), *args, **kwargs)
        except TypeError as error:
            raise ValueError(f"{name} is not a partial of a class in this layer's config.json ({error})") from None
    if value.keys() == {"dtype"} and isinstance(getattr(torch, str(value["dtype"]), None), torch.dtype):
        return getattr(torch, value["dtype"])
    if value.keys() == {"class"}:
        package, _, attribute = str(value["class"]).rpartition(".")
        found = getattr(importlib.import_module(CLASS_SOURCES[package]), attribute, None) \
            if package in CLASS_SOURCES else None
        if isinstance(found, type) and issubclass(found, nn.Module):
            return found
    if value.keys() in ({"class"}, {"instance"}, {"dtype"}):
        what = next(iter(value.values()))
        why = "which is not stored, only its name" if "instance" in value else \
            f"which is not looked up (only classes of {', '.join(CLASS_SOURCES)} are)"
        raise ValueError(f"{name} was {what!r} when this layer was saved, {why}; pass {name}= to from_pretrained")
    return {key: decode(name, item) for key, item in value.items()}


def _path(value: Any) -> str:
    """Return the name of a class or function, by its public package where it has one."""
    name = getattr(value, "__qualname__", type(value).__qualname__)
    module = getattr(value, "__module__", type(value).__module__)
    if module.startswith("ran_layers.layers."):  # its package is still being imported when the defaults are encoded
        return f"ran_layers.{name}"
    for public in ("torch.nn", "timm.layers"):
        if getattr(importlib.import_module(public), name, None) is value:
            return f"{public}.{name}"
    return f"{module}.{name}"
