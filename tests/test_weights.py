"""The weights inside the package."""
import json
import sys
from pathlib import Path

import pytest
import timm
import torch

import ran_layers  # noqa: F401

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY / "benchmarks"))

from harness.data import read_split  # noqa: E402
from harness.evaluate import evaluate  # noqa: E402

SHIPPED = timm.list_pretrained("ran_*")


def test_the_flagship_is_shipped():
    assert "ran_att56_cifar.cifar10" in SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_weights_come_with_their_result(name):
    model, _, dataset = name.partition(".")
    result = json.loads((REPOSITORY / "ran_layers" / "weights" / f"{name}.json").read_text())
    assert result["model"] == model
    assert result["dataset"] == dataset
    assert result["params"] == sum(p.numel() for p in timm.create_model(name).parameters())
    assert result["final"]["error"] == pytest.approx(100 - result["final"]["top1"])
    assert len(result["epochs"]) == result["settings"]["epochs"]


def test_robustness_was_measured_with_the_shipped_weights():
    rows = json.loads((REPOSITORY / "benchmarks" / "results" / "robustness.json").read_text())["results"]
    assert {row["model"] for row in rows} == set(SHIPPED)
    for row in rows:
        result = json.loads((REPOSITORY / "ran_layers" / "weights" / f"{row['model']}.json").read_text())
        # Another precision, of the other device, turns some of 10,000 answers.
        assert row["clean"] == pytest.approx(result["final"]["error"], abs=0.25)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_weights_have_the_accuracy_they_claim(name, data_dir):
    result = json.loads((REPOSITORY / "ran_layers" / "weights" / f"{name}.json").read_text())
    images, labels, names = read_split(result["dataset"], "test", str(data_dir), rows=1000)
    model = timm.create_model(name, pretrained=True).to(memory_format=torch.channels_last)
    assert list(model.pretrained_cfg["label_names"]) == names
    device = torch.device("cpu")
    scores = evaluate(model, images, labels, device, torch.autocast("cpu", enabled=False))
    # The first rows are a fair sample of 1,000: three standard errors of a share.
    claimed = result["final"]["top1"]
    assert scores["top1"] == pytest.approx(claimed, abs=3 * (claimed * (100 - claimed) / 1000) ** 0.5)
