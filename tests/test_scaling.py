"""The measurement of one process against several, in small."""
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import scaling


def test_forms_on_a_gpu_and_on_a_cpu(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(4))
    cpu = [tuple(form.values()) for form in scaling.forms([1, 2], torch.device("cpu"))]
    assert cpu == [(1, 1, False), (1, 4, False), (2, 2, True), (2, 2, False)]
    cuda = [tuple(form.values()) for form in scaling.forms([1, 8], torch.device("cuda"))]
    assert cuda == [(1, 1, False), (8, 1, True), (8, 1, False)]


def test_script(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(1))
    scaling.main(["--processes", "1", "--model", "plain_cnn8_cifar", "--recipe", "quick", "--epochs", "2",
                  "--rounds", "1", "--device", "cpu", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "scaling.json").read_text())
    (row,) = report["rows"]
    assert row["images_per_s"] > 0
    assert "--model plain_cnn8_cifar" in report["command"]
    assert str(tmp_path) not in report["command"]
    with pytest.raises(SystemExit) as exit_info:
        scaling.main(["--model", "nothing", "--device", "cpu"])
    assert exit_info.value.code == 2
    assert "error: the training with 1 processes failed: error: --model nothing" in capsys.readouterr().err
