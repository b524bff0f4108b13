"""Images of any kind, and what of them a network sees."""
import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

from ran_layers.images import find_images, image_transforms, open_image
from ran_layers.mask_figure import predict


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("ran_att56_cifar.cifar10").eval()


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


COMPANIONS_IN_A_FOLDER = "labels.csv", "Thumbs.db", "config.json", "README.md", "model.safetensors", "NOTES.TXT"


def test_folders_are_walked(tmp_path):
    for name in ("b.png", "a.JPG", "deep/er/c.webp", ".hidden.png", ".cache/d.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "none").mkdir()
    files, failures = find_images([tmp_path, tmp_path / "none", tmp_path / "notes.txt"])
    assert [str(file.relative_to(tmp_path)) for file in files] == ["a.JPG", "b.png", "deep/er/c.webp", "notes.txt"]
    assert failures == [f"{tmp_path / 'none'}: no image in this folder"]


def test_links_to_folders_are_followed_and_lead_nowhere_twice(tmp_path):
    for folder in ("photos", "elsewhere"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").touch()
    (tmp_path / "photos" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "first").symlink_to(tmp_path / "photos" / "latest")  # before what it leads to
    (tmp_path / "photos" / "latest").mkdir()
    (tmp_path / "photos" / "latest" / "b.png").touch()
    (tmp_path / "photos" / "twice").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "again").symlink_to(tmp_path / "photos")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "photos")
    files, failures = find_images([tmp_path / "photos"])
    assert [str(file.relative_to(tmp_path)) for file in files] == [
        "photos/a.png", "photos/latest/b.png", "photos/linked/a.png"]
    assert failures == []


def test_a_path_that_may_not_be_searched_is_named(monkeypatch):
    def denied(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "stat", denied)  # as os.path and most versions of pathlib ask
    monkeypatch.setattr(Image, "open", denied)
    assert find_images(["secret/a.png"]) == ([Path("secret/a.png")], [])
    with pytest.raises(OSError, match=r"secret/a\.png: Permission denied"):
        open_image("secret/a.png")


def test_files_in_folders_count_whatever_their_name(tmp_path):
    for name in ("photo", "photo.jpg_large", "scan.pdf", "archive.zip", *COMPANIONS_IN_A_FOLDER):
        (tmp_path / name).touch()
    files, failures = find_images([tmp_path])
    assert [file.name for file in files] == ["archive.zip", "photo", "photo.jpg_large", "scan.pdf"]
    assert failures == []


def test_a_pipe_is_named_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="pipe: not a file"):
        open_image(tmp_path / "pipe")


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
