"""The examples in the docstrings run and print what they say; tests/keras3 has those of the Keras layers."""
import doctest
import importlib

import pytest
import timm
import torch
from PIL import Image

MODULES = ("fusion", "insert", "masks", "mask_figure", "published", "layers.attention_module", "layers.mask_branch",
           "layers.residual_unit", "models.plain_cnn", "models.residual_attention", "models.resnet_cifar")


@pytest.mark.parametrize("name", ["ran_layers", *(f"ran_layers.{module}" for module in MODULES)])
def test_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # one saves a picture
    module = importlib.import_module(name)
    result = doctest.testmod(module, extraglobs={"timm": timm, "torch": torch, "Image": Image})
    assert result.failed == 0
    assert result.attempted > 0


@pytest.mark.parametrize("name", MODULES)
def test_every_public_class_has_an_example(name):
    module = importlib.import_module(f"ran_layers.{name}")
    classes = [cls for cls in vars(module).values() if isinstance(cls, type) and cls.__module__ == module.__name__
               and not cls.__name__.startswith("_") and issubclass(cls, torch.nn.Module)]
    assert not [cls.__name__ for cls in classes if ">>>" not in (cls.__doc__ or "")]
