"""What the recipes mean: which weights decay, which Muon leaves out, which images flip, and that networks learn."""
import json
import sys
from pathlib import Path

import pytest
import timm
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from test_cifar import run

from harness.data import corrupt_labels
from harness.errors import RunError
from harness.recipes import RECIPES, Recipe, make_optimizer, make_recipe
from harness.trainer import Trainer


def make_trainer(recipe: Recipe, rows: int = 64, seed: int = 0) -> Trainer:
    model, images = timm.create_model("plain_cnn8_cifar"), torch.zeros(rows, 32, 32, 3, dtype=torch.uint8)
    return Trainer(model, recipe, images, torch.zeros(rows, dtype=torch.long),
                   autocast=torch.autocast("cpu", enabled=False), seed=seed)


@pytest.mark.parametrize("recipe", ["quick", "best"])
def test_training_learns(tmp_path, recipe):
    run("--recipe", recipe, "--model-kwargs", "channels=[16,32,64,128]", "--limit", "640", "--epochs", "3",
        "--ema-decay", "0", "--out", tmp_path / "run")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["final"]["top1"] > 90


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_only_weights_of_convolutions_and_the_classifier_decay(optimizer):
    model = timm.create_model("ran_att56_cifar")
    groups = make_optimizer(make_recipe("report", "cifar10", {"optimizer": optimizer}), model).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert {(p.ndim > 1, decay[id(p)]) for p in model.parameters()} == {(True, 1e-4), (False, 0.0)}
    assert len(decay) == len(list(model.parameters()))


def test_muon_leaves_the_first_convolution_and_the_classifier_to_sgd():
    model = timm.create_model("ran_att56_cifar")
    muon, rest = make_optimizer(make_recipe("best", "cifar10", {}), model).param_groups
    assert {p.ndim for p in muon["params"]} == {4}
    left = {id(p) for p in rest["params"]}
    assert {id(model.stem.conv.weight), id(model.head.fc.weight), id(model.head.fc.bias)} <= left
    assert {id(p) for p in muon["params"]} | left == {id(p) for p in model.parameters()}
    assert not {id(p) for p in muon["params"]} & left


def test_muon_refuses_a_network_that_has_nothing_for_it():
    vit = timm.create_model("vit_tiny_patch16_224", depth=1)
    with pytest.raises(RunError, match="this network has none; give --optimizer sgd or adam"):
        make_optimizer(make_recipe("best", "cifar10", {}), vit)
    assert make_optimizer(make_recipe("best", "cifar10", {"optimizer": "adam"}), vit)


def test_flips():
    trainer = make_trainer(make_recipe("best", "cifar10", {}))
    even, odd = (trainer._flips(torch.arange(64), epoch) for epoch in (0, 1))
    assert torch.equal(even, ~odd)
    assert 16 < even.sum() < 48
    trainer = make_trainer(make_recipe("report", "cifar10", {}))
    first, again = (trainer._flips(torch.arange(64), 0) for _ in range(2))
    assert not torch.equal(first, again)
    assert {make_recipe(name, "digits", {}).flip for name in RECIPES} == {"none"}  # a flipped digit is another one
    assert not make_trainer(make_recipe("best", "digits", {}))._flips(torch.arange(64), 0).any()


@pytest.mark.parametrize("seed", [0, 1])
def test_wrong_labels_have_nothing_to_do_with_flips(seed):
    labels = torch.zeros(4000, dtype=torch.long)
    wrong = corrupt_labels(labels, 10, 0.5, seed) != labels
    trainer = make_trainer(make_recipe("best", "cifar10", {}), 4000, seed)
    mirrored = trainer._flips(torch.arange(4000), 0)
    assert 0.4 < mirrored[wrong].float().mean() < 0.6


def test_the_report_scales_pixels_and_the_others_standardise_them(tmp_path):
    for recipe, std in (("report", (1.0, 1.0, 1.0)), ("quick", None)):
        run("--recipe", recipe, "--limit", "32", "--epochs", "1", "--out", tmp_path / recipe)
        cfg = json.loads((tmp_path / recipe / "config.json").read_text())["pretrained_cfg"]
        assert (tuple(cfg["std"]) == (1.0, 1.0, 1.0)) is (std is not None)
        assert any(cfg["mean"]) is (std is None)
