"""The command ``python -m ran_layers.maps``: what it draws, says and refuses."""
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from ran_layers.maps import load_model, main

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("ran_att56_cifar.cifar10").eval()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, model):
    """A folder as a training run leaves it."""
    folder = tmp_path_factory.mktemp("run")
    save_file(model.state_dict(), folder / "model.safetensors")
    keys = "input_size", "mean", "std", "crop_pct", "first_conv", "classifier"
    (folder / "config.json").write_text(json.dumps({
        "architecture": "ran_att56_cifar", "num_classes": 10, "num_features": 512, "label_names": NAMES,
        "pretrained_cfg": {key: model.pretrained_cfg[key] for key in keys}}))
    return folder


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, name in enumerate(("one.png", "two.jpg")):
        noise = np.random.default_rng(i).integers(0, 255, (48, 64, 3), np.uint8)
        Image.fromarray(noise).save(folder / name)
    return folder


def test_the_command_draws_a_folder(photos, run_dir, capsys, monkeypatch):
    out = photos / "new" / "masks.png"
    monkeypatch.setattr(sys, "argv", ["maps", str(photos), "--model", str(run_dir), "--out", str(out), "--size", "64"])
    monkeypatch.delitem(sys.modules, "ran_layers.maps")
    with pytest.raises(SystemExit) as exit_code:
        runpy.run_module("ran_layers.maps", run_name="__main__")
    assert exit_code.value.code == 0
    with Image.open(out) as picture:
        assert f"2 images, {picture.width} x {picture.height} pixels" in capsys.readouterr().out


def test_bad_files_are_named_and_skipped(photos, run_dir, capsys):
    whole = (photos / "one.png").read_bytes()
    (photos / "cut.png").write_bytes(whole[:len(whole) // 2])
    (photos / "letter").write_text("hello")
    (photos / "notes.txt").write_text("hello")
    (photos / "three").write_bytes(whole)
    out = photos / "masks.webp"
    code = main([str(photos), str(photos / "none.png"), "--model", f"local-dir:{run_dir}", "--out", str(out)])
    stdout, stderr = capsys.readouterr()
    assert code == 1
    assert "3 images" in stdout
    assert out.is_file()
    assert [line.split(": ")[0] for line in stderr.splitlines()] == [
        f"skipped {photos / 'cut.png'}", f"skipped {photos / 'letter'}", f"skipped {photos / 'none.png'}"]


def test_nothing_is_written_without_an_image(tmp_path, run_dir, capsys):
    out = tmp_path / "masks.png"
    assert main([str(tmp_path), "--model", str(run_dir), "--out", str(out)]) == 1
    assert not out.exists()
    assert "no image" in capsys.readouterr().err


def test_the_limit_is_said(photos, run_dir, capsys):
    assert main([str(photos), "--model", str(run_dir), "--out", str(photos / "m.png"), "--limit", "1"]) == 0
    stdout, stderr = capsys.readouterr()
    assert "1 image," in stdout
    assert "--limit" in stderr


def test_random_weights_are_named_and_single_channels_left_out(photos, capsys):
    widths = []
    for channels in ("0", "2"):
        out = photos / "masks.png"
        assert main([str(photos / "one.png"), "--model", "ran_att56_cifar_orig", "--channels", channels,
                     "--out", str(out)]) == 0
        assert "ran_att56_cifar_orig has no trained weights" in capsys.readouterr().err
        with Image.open(out) as picture:
            widths.append(picture.width)
    assert widths[0] < widths[1]


def test_models_by_name_and_by_folder(run_dir):
    net, trained = load_model(str(run_dir))
    assert trained
    assert net.pretrained_cfg["label_names"][0] == "airplane"
    net, trained = load_model("ran_att128_cifar_orig")
    assert (trained, net.training) == (False, False)  # no weights exist for it


def test_models_of_the_hub(hub, photos, run_dir, capsys):
    repo = hub.add("alice/net", {file.name: file.read_bytes() for file in run_dir.iterdir()})
    out, again = photos / "hub.png", photos / "folder.png"
    assert main([str(photos / "one.png"), "--model", "hf-hub:alice/net", "--out", str(out)]) == 0
    assert main([str(photos / "one.png"), "--model", str(run_dir), "--out", str(again)]) == 0
    with Image.open(out) as first, Image.open(again) as second:
        below = (0, 60, *first.size)  # the title, above, says which model
        assert first.crop(below).tobytes() == second.crop(below).tobytes()
        assert first.tobytes() != second.tobytes()

    capsys.readouterr()
    repo.commit("main", {"config.json": repo.files["config.json"], "pytorch_model.bin": b""}, "only a pickle")
    for model, message in (("alice/net", "only pytorch_model.bin: a pickle can"), ("alice/none", "alice/none")):
        assert main(["x.png", "--model", f"hf-hub:{model}", "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert "hf_" not in error


@pytest.mark.parametrize(("name", "message"), [
    ("resnet10t", "must contain an AttentionModule, got a ResNet"),  # said before its weights are downloaded
    ("ran_att57", "must be a timm name, hf-hub:USER/NAME or a folder, got 'ran_att57'"),
    ("ran_att56_cifar.mnist", "cannot use model ran_att56_cifar.mnist"),
    ("local-dir:nowhere", "model folder nowhere has no config.json"),
])
def test_models_that_cannot_be_used_get_one_line(tmp_path, capsys, name, message):
    assert main(["x.png", "--model", name, "--out", str(tmp_path / "m.png")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_folder_with_a_pickle_only_is_refused(tmp_path, run_dir, capsys):
    (tmp_path / "config.json").write_text((run_dir / "config.json").read_text())
    torch.save({}, tmp_path / "pytorch_model.bin")
    assert main(["x.png", "--model", str(tmp_path), "--out", str(tmp_path / "m.png")]) == 2
    assert "no model.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [["--out", "masks.txt"], ["--out", "masks.png", "--size", "3"], ["--out", "masks"]])
def test_wrong_options_are_refused(wrong, capsys):
    with pytest.raises(SystemExit) as exit_code:
        main(["x.png", "--model", "ran_att56_cifar", *wrong])
    assert exit_code.value.code == 2
    assert wrong[-2] in capsys.readouterr().err


def test_a_device_that_is_not_there_gets_one_line(photos, run_dir, capsys):
    assert main([str(photos), "--model", str(run_dir), "--out", str(photos / "m.png"), "--device", "abacus"]) == 2
    error = capsys.readouterr().err
    assert "cannot use device abacus: " in error
    assert error.count("\n") == 1
    assert main([str(photos), "--model", str(run_dir), "--out", str(photos / "m.png"), "--device", "meta"]) == 2
    assert "cannot use device meta: it has shapes but no numbers" in capsys.readouterr().err


def test_a_picture_that_cannot_be_written_gets_one_line(photos, run_dir, capsys):
    out = Path(photos / "one.png" / "masks.png")  # its folder is a file
    assert main([str(photos), "--model", str(run_dir), "--out", str(out)]) == 2
    assert str(out) in capsys.readouterr().err
