"""The examples in the docstrings run and print what they say; tests/keras3 has those of the Keras layers."""
import doctest
import importlib

import pytest
import timm
import torch
from PIL import Image

MODULES = ("fuse", "insert", "masks", "mask_figure", "layers.attention_module", "layers.mask_branch",
           "layers.residual_unit")


@pytest.mark.parametrize("name", ["ran_layers", *(f"ran_layers.{module}" for module in MODULES)])
def test_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # one saves a picture
    module = importlib.import_module(name)
    result = doctest.testmod(module, extraglobs={"timm": timm, "torch": torch, "Image": Image})
    assert result.failed == 0
    assert result.attempted > 0
