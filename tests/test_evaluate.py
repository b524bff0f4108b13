"""Accuracy as the scripts state it, against a computation by hand."""
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from harness.evaluate import evaluate
from harness.result import seconds_to_top1


class FirstPixels(nn.Module):
    """Says for each class the brightness of a pixel of the first row."""

    def __init__(self) -> None:
        super().__init__()
        self.pretrained_cfg = {"mean": (0.1, 0.5, 0.5), "std": (0.2, 0.5, 0.5)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, 0, 0, :10]


@pytest.mark.parametrize("flip", [False, True])
def test_accuracy_is_the_share_of_right_answers(flip):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(256, size=(700, 32, 32, 3), dtype=np.uint8), rng.integers(10, size=700)
    images[:, 0, :, 0] = rng.permuted(np.tile(np.arange(256, dtype=np.uint8), (700, 1)), axis=1)[:, :32]
    row = images[:, 0, :, 0].astype(float)
    logits = row[:, :10] + (row[:, ::-1][:, :10] if flip else 0)
    rank = (logits > logits[np.arange(700), labels][:, None]).sum(1)
    model = FirstPixels().train()
    scores = evaluate(model, torch.from_numpy(images), torch.from_numpy(labels), torch.device("cpu"),
                      torch.autocast("cpu", enabled=False), flip=flip)
    # Sums of two pixels may be equal, and then fall one way or the other.
    assert scores == pytest.approx(
        {"top1": 100 * (rank == 0).mean(), "top5": 100 * (rank < 5).mean()}, abs=0.5 if flip else 1e-9)
    assert 5 < scores["top1"] < 20 < 40 < scores["top5"] < 60
    assert model.training


def test_seconds_to_an_accuracy_are_those_of_the_first_time_it_was_seen():
    rows = [dict(seconds=2.0, eval_split="test", eval_top1=91.0), dict(seconds=3.0),
            dict(seconds=1.5, eval_split="held-out", eval_top1=96.5), dict(seconds=4.0)]
    assert seconds_to_top1(rows, 94.5) == {"90": 2.0, "94": 10.5, "95": None, "96": None}
