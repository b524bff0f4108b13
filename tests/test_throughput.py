"""The measurement of speed in small: what it times, and what it writes."""
import json
import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import throughput

from harness import throughput_cases


def test_cases_are_timed_in_turn_and_compared_with_the_ceilings(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(throughput, "matmul_flops", lambda *_: 1e12)
    monkeypatch.setattr(throughput, "copy_bytes", lambda *_: 1e10)
    throughput.main(["--models", "plain_cnn8_cifar", "--batch-sizes", "2", "--rounds", "2", "--seconds", "0.01",
                     "--device", "cpu", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "throughput.json").read_text())
    assert result["cases"][1]["precision"] == "fp32"
    assert [(row["form"], row["model"]) for row in result["cases"]] == [
        ("harness", "plain_cnn8_cifar"), ("dataloader", "plain_cnn8_cifar"), ("harness", "resnet50"),
        ("harness", "resnetv2_50")]
    for row in result["cases"]:
        for kind, passes in (("forward", 1), ("train", 3)):
            speed = row[kind]
            assert 0 < speed["lowest"] <= speed["images_per_s"] <= speed["highest"]
            assert speed["fraction_of_matmul"] == pytest.approx(speed["images_per_s"] * 2 * row["macs"] * passes / 1e12)
    assert "--models plain_cnn8_cifar --batch-sizes 2" in result["command"]
    assert (tmp_path / "throughput.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr()
    assert re.search("matrix product in (bf16|fp32) 1000 GFLOP/s", shown.out)
    assert [line.split(" batch")[0] for line in shown.err.splitlines() if line.startswith("prepared")] == [
        f"prepared {row['model']}, {row['form']}, {row['precision']}," for row in result["cases"]]
    assert "round 2 of 2" in shown.err


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peak_memory_is_that_of_the_call():
    peak = throughput_cases.peak_rss(lambda: torch.ones(2 ** 26))  # 256 MiB
    assert 250 * 2 ** 20 < peak < 400 * 2 ** 20


def test_unknown_model(capsys):
    with pytest.raises(SystemExit) as exit_info:
        throughput.main(["--models", "resnet0", "--device", "cpu"])
    assert exit_info.value.code == 2
    assert "error: --models resnet0 is not a timm model" in capsys.readouterr().err
