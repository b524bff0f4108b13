"""The corruptions of `benchmarks/robustness.py`, and the script in small."""
import json
import sys
from pathlib import Path

import pytest
import timm
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import robustness
from test_data import write_parquet

from harness.export import export_model


@pytest.fixture(scope="module")
def images():
    smooth = torch.nn.functional.interpolate(
        torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(0)), size=32, mode="bilinear")
    return (60 + 130 * smooth).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


@pytest.mark.parametrize(("name", "corrupt", "strengths"), robustness.CORRUPTIONS, ids=lambda value: str(value)[:8])
def test_stronger_is_further_from_the_image(images, name, corrupt, strengths):
    before = images.clone()
    distances = [(corrupt(images, strength).float() - images.float()).square().mean().item() for strength in strengths]
    assert 0 < distances[0] < distances[1] < distances[2]
    assert torch.equal(images, before)
    assert torch.equal(corrupt(images, strengths[1]), corrupt(images, strengths[1]))  # the same for every network


def test_corruptions_do_what_they_say(images):
    difference = robustness.add_noise(images, 0.04).float() - images
    assert difference.std() == pytest.approx(255 * 0.04, rel=0.1)
    assert difference.mean().abs() < 1
    contrast = robustness.reduce_contrast(images, 0.4).float()
    assert (contrast.mean((1, 2)) - images.float().mean((1, 2))).abs().max() < 0.5
    assert (contrast.std((1, 2)) / images.float().std((1, 2))).mean() == pytest.approx(0.4, abs=0.02)
    flat = torch.full((1, 32, 32, 3), 77, dtype=torch.uint8)
    for _, corrupt, strengths in robustness.CORRUPTIONS[1:]:
        assert (corrupt(flat, strengths[2]).int() - 77).abs().max() <= 1


def test_corrupted_images_are_harder(tmp_path, data_dir):
    robustness.main(["--data-dir", str(data_dir), "--rows", "100", "--device", "cpu", "--out", str(tmp_path),
                     "--models", "ran_att56_cifar.cifar10"])
    (result,) = json.loads((tmp_path / "robustness.json").read_text())["results"]
    assert result["mean"] > result["clean"]


def test_script(tmp_path, capsys):
    write_parquet(tmp_path / "data", rows=4)
    robustness.main(["--data-dir", str(tmp_path / "data"), "--rows", "3", "--device", "cpu", "--out", str(tmp_path),
                     "--models", "ran_att56_cifar.cifar10"])
    report = json.loads((tmp_path / "robustness.json").read_text())
    (result,) = report["results"]
    assert result["rows"] == 3
    assert [row["name"] for row in result["corruptions"]] == [row[0] for row in robustness.CORRUPTIONS]
    assert str(tmp_path) not in json.dumps(report)
    with pytest.raises(SystemExit) as exit_info:
        robustness.main(["--models", "ran_att56_cifar.mnist", "--data-dir", str(tmp_path / "data")])
    assert exit_info.value.code == 2
    assert "error: --models ran_att56_cifar.mnist" in capsys.readouterr().err


def test_weights_of_another_data_set_are_refused(tmp_path, capsys):
    network = timm.create_model("plain_cnn8_cifar", pretrained_cfg_overlay={"tag": "digits"})
    export_model(network, tmp_path, {})
    with pytest.raises(SystemExit) as exit_info:
        robustness.main(["--models", f"local-dir:{tmp_path}"])
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.endswith(" was trained on digits, not on cifar10\n")
