"""Masks recorded from a forward, images of any kind, and the picture that shows both."""
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config

import ran_layers
from ran_layers import AttentionModule, attention_maps, record_masks
from ran_layers.images import find_images, image_transforms, open_image
from ran_layers.maps import load_model, main
from ran_layers.mask_figure import COLOURS, draw_masks, mask_columns, overlay, predict, top_classes

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def count_hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("ran_att56_cifar.cifar10").eval()


@pytest.fixture(scope="module")
def small():
    """A network of the user's own, small, with two modules."""
    torch.manual_seed(0)
    modules = AttentionModule(8), AttentionModule(8, mask="local")
    return nn.Sequential(nn.Conv2d(3, 8, 3), modules[0], nn.MaxPool2d(2), modules[1]).eval()


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


# Masks


@pytest.mark.parametrize("learning", ["residual", "naive"])
def test_the_mask_is_the_one_of_the_formula(learning):
    torch.manual_seed(0)
    module = AttentionModule(4, learning=learning, mask_depth=2).double().eval()
    net, x = nn.Sequential(nn.Identity(), module), torch.randn(2, 4, 9, 7, dtype=torch.float64)
    mask = attention_maps(net, x)["1"]
    assert mask.shape == (2, 4, 9, 7)
    assert 0 < mask.min() < mask.max() < 1
    with torch.no_grad():
        trunk = module.trunk(module.pre(x))
        torch.testing.assert_close(module.post((1 + mask if learning == "residual" else mask) * trunk), net(x))


def test_every_module_of_our_networks_by_name(model):
    maps = attention_maps(model, torch.randn(2, 3, 32, 32))
    assert {name: tuple(mask.shape) for name, mask in maps.items()} == {
        "stages.0.blocks.1": (2, 64, 16, 16), "stages.1.blocks.1": (2, 128, 8, 8), "stages.2.blocks.1": (2, 256, 4, 4)}
    assert all(isinstance(model.get_submodule(name), AttentionModule) for name in maps)


def test_any_network_with_a_module_in_it():
    resnet = timm.create_model("resnet10t", block_args=dict(attn_layer=AttentionModule), num_classes=0)
    maps = attention_maps(resnet, torch.randn(1, 3, 64, 64))
    assert list(maps) == ["layer1.0.se", "layer2.0.se", "layer3.0.se", "layer4.0.se"]
    assert attention_maps(AttentionModule(4), torch.randn(1, 4, 5, 6))[""].shape == (1, 4, 5, 6)


def test_features_only():
    features = timm.create_model("ran_att56_cifar", features_only=True)
    maps = attention_maps(features, torch.randn(1, 3, 32, 32))
    assert [mask.shape[1] for mask in maps.values()] == [64, 128, 256]


def test_a_compiled_network_gives_the_masks_of_the_plain_one():
    net = nn.Sequential(nn.Conv2d(3, 8, 1), AttentionModule(8, p=0, t=1, mask="local")).eval()
    x = torch.randn(2, 3, 5, 5)
    compiled = torch.compile(net, backend="eager")
    with torch.no_grad():
        expected = compiled(x)  # the graph is made without hooks
    maps = attention_maps(compiled, x)
    assert list(maps) == ["1"]
    torch.testing.assert_close(maps, attention_maps(net, x))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected)
    parts = nn.Sequential(net[0], torch.compile(net[1], backend="eager"))
    torch.testing.assert_close(attention_maps(parts, x), maps)


def test_under_gradient_checkpointing_the_masks_and_gradients_are_the_same():
    torch.manual_seed(0)
    net = timm.create_model("ran_att56_cifar_orig").train()
    x, results = torch.randn(2, 3, 16, 16), []
    for checkpointing in (False, True):
        net.set_grad_checkpointing(checkpointing)
        net.zero_grad()
        with record_masks(net) as masks:
            net(x).sum().backward()
        results.append((dict(masks), net.stem.conv.weight.grad.clone()))
    assert len(results[1][0]) == 3
    torch.testing.assert_close(results[0], results[1])


def test_a_loss_on_the_recorded_masks_has_gradients(small):
    small.zero_grad()
    with record_masks(small) as masks:
        small(torch.randn(1, 3, 9, 9))
    sum(mask.mean() for mask in masks.values()).backward()
    assert small[0].weight.grad.abs().sum() > 0
    small.zero_grad()


def test_the_model_is_left_as_it_was(small):
    small[3].train()  # a mixture, as in fine-tuning with frozen parts
    before = {name: value.clone() for name, value in small.state_dict().items()}
    modes = [module.training for module in small.modules()]
    x = torch.randn(2, 3, 9, 9)
    masks = attention_maps(small, x)
    assert count_hooks(small) == 0
    assert [module.training for module in small.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())
    assert not any(mask.requires_grad for mask in masks.values())
    small.eval()


def test_no_hook_is_left_after_an_error(small):
    with pytest.raises(RuntimeError, match="channels"):
        attention_maps(small, torch.randn(1, 5, 9, 9))
    with record_masks(small):
        assert count_hooks(small) == 2
    with pytest.raises(KeyError), record_masks(small):
        raise KeyError
    assert count_hooks(small) == 0
    assert not small.training


def test_recording_changes_no_output(small):
    x = torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        plain = small(x)
        with record_masks(small):
            recorded = small(x)
    assert torch.equal(plain, recorded)


def test_wrong_arguments_are_named(small):
    x = torch.randn(1, 3, 9, 9)
    with pytest.raises(ValueError, match=r"must contain an AttentionModule, got a ReLU"):
        attention_maps(nn.ReLU(), x)
    with pytest.raises(ValueError, match="traced"):
        attention_maps(torch.fx.symbolic_trace(small), x)
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str"):
        attention_maps("ran_att56", x)
    with pytest.raises(TypeError, match=r"images must be a tensor .* got list"):
        attention_maps(small, [x])
    with pytest.raises(ValueError, match=r"images must have the shape .* got \(3, 9, 9\)"):
        attention_maps(small, x[0])


def test_exported_at_the_top():
    assert ran_layers.attention_maps is attention_maps
    assert {"attention_maps", "record_masks"} <= set(ran_layers.__all__)


# Images


def half_transparent(mode):
    return Image.new(mode, (6, 4), (200, 100, 50, 128) if mode == "RGBA" else (100, 128))


def transparent_palette():
    image = Image.new("P", (6, 4), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.info["transparency"] = 1
    return image


IMAGES = {  # the file's name, an image, what it must look like
    "rgb.png": (Image.new("RGB", (6, 4), (200, 100, 50)), (200, 100, 50)),
    "grey.png": (Image.new("L", (6, 4), 90), (90, 90, 90)),
    "bilevel.png": (Image.new("1", (6, 4), 1), (255, 255, 255)),
    "palette.gif": (Image.new("RGB", (6, 4), (200, 100, 50)).quantize(4), (200, 100, 50)),
    "palette_alpha.png": (transparent_palette(), (255, 255, 255)),
    "rgba.png": (half_transparent("RGBA"), (227, 177, 152)),
    "la.png": (half_transparent("LA"), (177, 177, 177)),
    "cmyk.tif": (Image.new("CMYK", (6, 4), (0, 128, 255, 0)), (255, 127, 0)),
    "lab.tif": (Image.new("LAB", (6, 4), (255, 128, 128)), (255, 255, 255)),
    "sixteen.png": (Image.fromarray(np.full((4, 6), 25700, np.uint16)), (100, 100, 100)),
    "int32.tif": (Image.fromarray(np.full((4, 6), 25700, np.int32)), (100, 100, 100)),
    "int32_small.tif": (Image.fromarray(np.full((4, 6), 100, np.int32)), (100, 100, 100)),
    "float.tif": (Image.fromarray(np.full((4, 6), 0.4, np.float32)), (102, 102, 102)),
    "float_nan.tif": (Image.fromarray(np.full((4, 6), np.nan, np.float32)), (0, 0, 0)),
    "photo.webp": (Image.new("RGB", (6, 4), (200, 100, 50)), (200, 100, 50)),
    "photo.bmp": (Image.new("RGB", (6, 4), (200, 100, 50)), (200, 100, 50)),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images_of_every_mode(tmp_path, name):
    image, colour = IMAGES[name]
    image.save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
    opened = open_image(tmp_path / name)
    assert (opened.mode, opened.size) == ("RGB", (6, 4))
    assert np.abs(np.asarray(opened, dtype=int) - colour).max() <= 2


def test_rotation_and_animation(tmp_path):
    image = Image.new("RGB", (6, 4), "black")
    image.paste("white", (0, 0, 3, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    turned = open_image(tmp_path / "turned.png")
    assert turned.size == (4, 6)
    assert (turned.getpixel((0, 0)), turned.getpixel((0, 5))) == ((255, 255, 255), (0, 0, 0))
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert open_image(tmp_path / "moving.gif").getpixel((0, 0)) == (255, 0, 0)


def test_a_file_that_is_no_image_is_named(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(OSError, match=r"text\.png: not an image"):
        open_image(tmp_path / "text.png")
    with pytest.raises(OSError, match=r"none\.png: No such file"):
        open_image(tmp_path / "none.png")


def test_folders_are_walked(tmp_path):
    for name in ("b.png", "a.JPG", "deep/er/c.webp", ".hidden.png", ".cache/d.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "none").mkdir()
    files, failures = find_images([tmp_path, tmp_path / "none", tmp_path / "notes.txt"])
    assert [str(file.relative_to(tmp_path)) for file in files] == ["a.JPG", "b.png", "deep/er/c.webp", "notes.txt"]
    assert failures == [f"{tmp_path / 'none'}: no image in this folder"]


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (640, 33), (33, 640), (500, 400), (32, 32)])
def test_images_of_every_size_and_what_is_shown_is_what_the_network_sees(model, size):
    ramp = np.linspace(0, 255, size[0] * size[1]).reshape(size[1], size[0])
    image = Image.fromarray(np.stack([ramp, ramp[::-1], ramp[:, ::-1]], axis=-1).astype(np.uint8))
    to_input, to_tile = image_transforms(model, 64)
    seen, shown = to_input(image), to_tile(image)
    assert (seen.shape, shown.shape) == ((3, 32, 32), (64, 64, 3))
    config = resolve_data_config(model=model)
    if max(size) < 16 * min(size):
        torch.testing.assert_close(seen, create_transform(**config)(image))
    seen = (seen * torch.tensor(config["std"])[:, None, None] + torch.tensor(config["mean"])[:, None, None]) * 255
    small = shown.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3)).transpose(2, 0, 1)
    assert np.abs(small - seen.numpy()).mean() < 4


def test_grey_networks_see_grey_images():
    net = timm.create_model("ran_att56_cifar_orig", in_chans=1, num_classes=10)
    masks, logits = predict(net, [Image.new("RGB", (40, 30), "teal")])
    assert logits.shape == (1, 10)
    assert len(masks) == 3


# The picture


def test_predictions_are_timms(model):
    images = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 50, 3), np.uint8)) for i in range(18)]
    transform = create_transform(**resolve_data_config(model=model))
    with torch.no_grad():
        expected = model(torch.stack([transform(image) for image in images]))
    masks, logits = predict(model, images)  # more images than one batch
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert all(len(mask) == 18 for mask in masks.values())


@pytest.mark.parametrize("names", [NAMES[:3], dict(enumerate(NAMES[:3])), {str(i): NAMES[i] for i in range(3)}])
def test_classes_have_their_names(names):
    net = nn.Identity()
    net.pretrained_cfg = {"label_names": names}
    logits = torch.log(torch.tensor([[0.05, 0.7, 0.25], [0.8, 0.1, 0.1]]))
    (first, second), (third, _) = top_classes(net, logits, 2)
    assert (first[0], second[0], third[0]) == ("automobile", "bird", "airplane")
    assert first[1] == pytest.approx(0.7)
    assert top_classes(net, logits[:, :2], 1)[0][0][0] == "class 1"  # names of another classifier
    net.pretrained_cfg = {}
    assert top_classes(net, logits, 1)[0][0][0] == "class 1"
    net.num_classes = 0
    assert top_classes(net, logits, 1) == [[], []]


def test_columns_are_the_mean_and_the_channels_that_vary_most():
    mask = torch.full((2, 5, 4, 4), 0.5)
    mask[:, 3, :2] = 1  # varies most, the same in both images
    mask[:, 1, 0] = 0.6
    mask[0, 4] = 1  # differs between images, not between positions
    group = mask_columns("stage", mask, 2)
    assert [label for label, _ in group.columns] == ["mean", "channel 3", "channel 1"]
    torch.testing.assert_close(group.columns[0][1], mask.mean(1))
    torch.testing.assert_close(group.columns[1][1], mask[:, 3])
    assert len(mask_columns("stage", mask, 9).columns) == 6


def test_overlays_lie_where_the_mask_is():
    white = np.full((64, 64, 3), 255, np.uint8)
    mask = torch.zeros(4, 4)
    mask[0, 3] = 1
    shown = overlay(white, mask)
    assert shown[0, 63].tolist() == pytest.approx((COLOURS[-1] + 0.35 * (255 - COLOURS[-1])).tolist(), abs=1)
    assert shown[63, 0].tolist() == pytest.approx((COLOURS[0] + 0.35 * (255 - COLOURS[0])).tolist(), abs=1)
    brightness = shown.sum(axis=2).astype(int)
    assert (np.diff(brightness[0, 40:56]) > 0).all()  # bilinear: no steps between two values of the mask
    assert np.unique(overlay(white, torch.full((4, 4), 0.3))).size <= 3  # a flat mask has one colour


def test_the_picture_is_a_grid_of_images_and_masks(model):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
    picture = np.asarray(draw_masks(model, [image] * 2, ["one", "two"], channels=1, tile=64))
    _, to_tile = image_transforms(model, 64)
    tile = to_tile(image)
    masks, _ = predict(model, [image] * 2)

    def places(block):
        windows = np.lib.stride_tricks.sliding_window_view(picture, block.shape)[:, :, 0]
        found = (windows[:, :, 0, 0] == block[0, 0]).all(-1) & (windows[:, :, -1, -1] == block[-1, -1]).all(-1)
        return [(y, x) for y, x in np.argwhere(found) if (windows[y, x] == block).all()]

    rows = places(tile)
    assert len(rows) == 2
    assert rows[0][1] == rows[1][1]  # one below the other
    groups = [mask_columns(name, mask, 1) for name, mask in masks.items()]
    found = [places(overlay(tile, maps[0])) for group in groups for _, maps in group.columns]
    assert [[y for y, _ in each] for each in found] == [[y for y, _ in rows]] * 6  # in the rows of the images
    assert [each[0][1] for each in found] == sorted(each[0][1] for each in found)  # from left to right


def test_many_modules_go_into_blocks():
    net = timm.create_model("ran_att128_cifar_orig", num_classes=0)
    picture = draw_masks(net, [Image.new("RGB", (32, 32))], tile=32, title="many")
    assert picture.width <= 13.5 * 32
    assert picture.height > 3 * 32  # three blocks


@pytest.mark.parametrize(("wrong", "message"), [
    (dict(images=[]), "images must hold at least one"), (dict(names=["a", "b"]), "names must have one entry per image"),
    (dict(channels=-1), "channels must be at least 0"), (dict(tile=8), "tile must be at least 32")])
def test_wrong_drawing_arguments_are_named(small, wrong, message):
    with pytest.raises(ValueError, match=message):
        draw_masks(small, **{"images": [Image.new("RGB", (32, 32))], **wrong})


def test_models_of_other_inputs_are_refused(model):
    with pytest.raises(ValueError, match="1 or 3 channels, it takes 5"):
        draw_masks(timm.create_model("ran_att56_cifar_orig", in_chans=5), [Image.new("RGB", (32, 32))])


# The command


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
    out = photos / "masks.webp"
    code = main([str(photos), str(photos / "none.png"), "--model", f"local-dir:{run_dir}", "--out", str(out)])
    stdout, stderr = capsys.readouterr()
    assert code == 1
    assert "2 images" in stdout
    assert out.is_file()
    assert [line.split(": ")[0] for line in stderr.splitlines()] == [
        f"skipped {photos / 'cut.png'}", f"skipped {photos / 'none.png'}"]


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


def test_models_by_name_and_by_folder(run_dir):
    net, trained = load_model(str(run_dir))
    assert trained
    assert net.pretrained_cfg["label_names"][0] == "airplane"
    net, trained = load_model("ran_att128_cifar_orig")
    assert (trained, net.training) == (False, False)  # no weights exist for it


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


def test_a_picture_that_cannot_be_written_gets_one_line(photos, run_dir, capsys):
    out = Path(photos / "one.png" / "masks.png")  # its folder is a file
    assert main([str(photos), "--model", str(run_dir), "--out", str(out)]) == 2
    assert str(out) in capsys.readouterr().err
