"""The data sets: what is read, and what cannot be."""
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from test_cifar import fails

from harness import data

NOISE = Image.fromarray(np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8))


def encoded(image: Image.Image, form: str, **kwargs: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **kwargs)
    return buffer.getvalue()


def test_digits():
    digits = data.load_dataset("digits")
    assert digits.train_images.shape == (1437, 32, 32, 3)
    assert digits.test_images.shape == (360, 32, 32, 3)
    assert digits.train_images.dtype == torch.uint8
    assert digits.train_images.max() == 255


def write_parquet(folder: Path, rows: int = 4, labels: list[int] | None = None, image: bytes | None = None,
                  column: str = "img") -> None:
    if image is None:
        image = encoded(Image.new("RGB", (32, 32), (10, 20, 30)), "PNG")
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table({
        column: [{"bytes": image, "path": None}] * rows, "label": [0] * rows if labels is None else labels})
    for split in ("train", "test"):
        pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")


def test_parquet_in_any_depth_of_the_layout(tmp_path):
    write_parquet(tmp_path / "uoft-cs" / "cifar10" / "plain_text", labels=[0, 1, 2, 9])
    for folder in (tmp_path, tmp_path / "uoft-cs", tmp_path / "uoft-cs" / "cifar10" / "plain_text"):
        cifar10 = data.load_dataset("cifar10", str(folder))
        assert cifar10.train_labels.tolist() == [0, 1, 2, 9]
        assert cifar10.train_images[0, 0, 0].tolist() == [10, 20, 30]


@pytest.mark.parametrize(("kwargs", "message"), [
    (dict(labels=[0, 1, 2, 10]), "train-00000-of-00001.parquet, row 3: labels must be in 0..9, found 10"),
    (dict(labels=[0, 1, 2, None]), "labels must be in 0..9, found None"),
    (dict(labels=[True] * 4), "labels must be in 0..9, found True; fetch the files again"),
    (dict(rows=0), "must be a struct with the field 'bytes', it is null"),
    (dict(column="image"), "must have the columns 'img' and 'label', it has ['image', 'label']"),
    (dict(image=b"no image"), "an image cannot be decoded (8 bytes that are not an image); fetch the files again"),
    (dict(image=b""), "train-00000-of-00001.parquet, row 0: an image cannot be decoded"),
    (dict(image=encoded(Image.new("RGB", (31, 32)), "PNG")), "expected 32x32 images, found 31x32"),
    (dict(image=encoded(NOISE, "PNG")[:-300]), "an image cannot be decoded"),
    (dict(image=encoded(NOISE, "WEBP", lossless=True)[:-300]), "an image cannot be decoded"),
])
def test_unusable_parquet(tmp_path, capsys, kwargs, message):
    write_parquet(tmp_path / "data", **kwargs)
    line = fails(capsys, "--dataset", "cifar10", "--data-dir", tmp_path / "data", "--out", tmp_path / "run")
    assert message in line


def test_rows_of_several_files(tmp_path, capsys):
    write_parquet(tmp_path, labels=[0, 1, 2, 3])
    first, second = tmp_path / "train-00000-of-00002.parquet", tmp_path / "train-00001-of-00002.parquet"
    (tmp_path / "train-00000-of-00001.parquet").rename(first)
    pq.write_table(pq.read_table(first).set_column(1, "label", [[4, 5, 10, 7]]), second)
    images, labels, _ = data.read_split("cifar10", "train", str(tmp_path), rows=6)
    assert labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert images.shape == (6, 32, 32, 3)
    line = fails(capsys, "--dataset", "cifar10", "--data-dir", tmp_path, "--out", tmp_path / "run")
    assert f"{second}, row 2: labels must be in 0..9, found 10; fetch the files again" in line


def test_an_image_too_large_to_open(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    write_parquet(tmp_path / "data")
    line = fails(capsys, "--dataset", "cifar10", "--data-dir", tmp_path / "data", "--out", tmp_path / "run")
    assert "an image cannot be decoded (Image size (1024 pixels) exceeds limit" in line


@pytest.mark.parametrize("names", [None, 10, ["one"]])
def test_unusable_names_of_classes_are_left_aside(names):
    info = {"info": {"features": {"label": {"names": names}}}}
    assert data._class_names({b"huggingface": json.dumps(info).encode()}, data.SPECS["cifar10"]) is None


def test_damaged_or_missing_parquet(tmp_path, capsys):
    write_parquet(tmp_path / "data")
    file = tmp_path / "data" / "train-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:-50])
    args = ["--dataset", "cifar10", "--out", tmp_path / "run"]
    assert "cannot be read as Parquet" in fails(capsys, *args, "--data-dir", tmp_path / "data")
    assert "no Parquet files of uoft-cs/cifar10" in fails(capsys, *args, "--data-dir", tmp_path / "empty")


def test_missing_parts(tmp_path, capsys):
    write_parquet(tmp_path)
    (tmp_path / "train-00000-of-00001.parquet").rename(tmp_path / "train-00002-of-00003.parquet")
    line = fails(capsys, "--dataset", "cifar10", "--data-dir", tmp_path, "--out", tmp_path / "run")
    assert "2 of the 3 train files are missing (train-00000-of-00003.parquet, train-00001-of-00003.parquet)" in line
    assert len(data.read_split("cifar10", "test", str(tmp_path))[0]) == 4


@pytest.mark.parametrize(("image", "form", "kwargs"), [
    (NOISE, "PNG", {}), (NOISE, "WEBP", {"lossless": True}), (NOISE, "BMP", {}), (NOISE.convert("P"), "PNG", {}),
    (NOISE.convert("L"), "PNG", {}), (NOISE.convert("1"), "PNG", {}),
], ids=lambda value: getattr(value, "mode", value))
def test_images_are_decoded_as_pillow_does(image, form, kwargs):
    blob = encoded(image, form, **kwargs)
    assert (data._decode(blob) == np.asarray(Image.open(io.BytesIO(blob)).convert("RGB"))).all()


def test_channel_statistics_are_those_of_all_pixels():
    images = torch.randint(256, (7, 32, 32, 3), dtype=torch.uint8)
    pixels = images.reshape(-1, 3).double() / 255
    mean, std = data._channel_statistics(images)
    assert mean == pytest.approx(pixels.mean(0).tolist(), abs=1e-6)
    assert std == pytest.approx(pixels.std(0, correction=0).tolist(), abs=1e-6)


def test_real_cifar_files(data_dir):
    images, labels, names = data.read_split("cifar10", "test", str(data_dir), rows=100)
    assert images.shape == (100, 32, 32, 3)
    assert names[3] == "cat"
    assert 0 <= labels.min()
    assert labels.max() <= 9
