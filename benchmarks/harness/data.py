"""The data sets: CIFAR-10 and CIFAR-100 from the Hub's Parquet files or a folder of them, and embedded digits.

A data set is four tensors in memory; nothing is decoded twice.
"""
import hashlib
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness.errors import RunError, first_line


@dataclass(frozen=True)
class Spec:
    """Where a CIFAR data set lies on the Hub and what its rows look like."""

    repo: str
    folder: str
    label: str
    classes: int


SPECS = {
    "cifar10": Spec("uoft-cs/cifar10", "plain_text", "label", 10),
    "cifar100": Spec("uoft-cs/cifar100", "cifar100", "fine_label", 100),
}
DATASETS = (*SPECS, "digits")


@dataclass
class Dataset:
    """Images ``(rows, height, width, channels)`` uint8, labels ``(rows,)`` int64, both splits, and class names."""

    name: str
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    class_names: list[str]
    mean: tuple[float, ...]  # of the training images, per channel, in [0, 1]
    std: tuple[float, ...]

    def digest(self) -> str:
        """Return the SHA-256 of the training images and their labels."""
        digest = hashlib.sha256()
        for part in (self.train_images, self.train_labels):
            digest.update(f"{part.dtype} {tuple(part.shape)}\n".encode())
            digest.update(np.ascontiguousarray(part.numpy()).data)
        return digest.hexdigest()


def load_dataset(name: str, data_dir: str | None = None) -> Dataset:
    """Return the data set ``name``, from ``data_dir`` if given, otherwise from the Hub's cache or the Hub.

    Args:
        name: ``'cifar10'``, ``'cifar100'`` or ``'digits'``.
        data_dir: Folder with the Parquet files in the Hub's layout: ``uoft-cs/cifar10/plain_text/*.parquet``, or
            any folder further in.

    Raises:
        RunError: The files are missing, some or all, damaged, or of another form.
    """
    if name == "digits":
        splits, names = _digits()
    else:
        splits = {}
        for split in ("train", "test"):
            *splits[split], names = read_split(name, split, data_dir)
    images, labels = splits["train"]
    mean, std = _channel_statistics(images)
    return Dataset(name, images, labels, *splits["test"], class_names=names, mean=mean, std=std)


def _channel_statistics(images: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel of uint8 ``images``, of pixels in [0, 1]."""
    values = np.arange(256) / 255
    means, deviations = [], []
    for channel in images.unbind(-1):
        # Counted: as floating-point numbers the pixels would take a gigabyte.
        share = np.bincount(channel.flatten().numpy(), minlength=256) / channel.numel()
        mean = (share * values).sum()
        means.append(round(float(mean), 6))
        deviations.append(round(float((share * (values - mean) ** 2).sum() ** 0.5), 6))
    return tuple(means), tuple(deviations)


def corrupt_labels(labels: torch.Tensor, classes: int, share: float, seed: int) -> torch.Tensor:
    """Return ``labels`` of which each is wrong with probability ``share``, all wrong classes equally likely.

    The paper's uniform label noise (section 4.1, "Noisy label robustness").
    """
    # Not the stream that `seed` itself begins: the trainer's first draw from it says which images are mirrored in which
    # epochs. torch keeps 32 bits of a seed, so a large number added to it would change nothing.
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, len(labels)]).generate_state(1)[0]))
    wrong = torch.rand(len(labels), generator=generator) < share
    offset = torch.randint(1, classes, (len(labels),), generator=generator)
    return torch.where(wrong, (labels + offset) % classes, labels)


def read_split(
        name: str, split: str, data_dir: str | None = None, rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Return images, labels and class names of the first ``rows`` rows (all if None) of one split of a CIFAR data set.

    Raises:
        RunError: The files are missing, some or all, damaged, or of another form.
    """
    spec = SPECS[name]
    files = _local_files(spec, Path(data_dir)) if data_dir else _hub_files(spec)
    _check_complete(files[split], split)
    return _read_parquet(files[split], spec, rows)


def _digits() -> tuple[dict[str, list[torch.Tensor]], list[str]]:
    """scikit-learn's 8x8 handwritten digits as 32x32 RGB; every fifth image is for testing."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    images = torch.nn.functional.interpolate(images, size=(32, 32), mode="bilinear", align_corners=False)
    images = images.round().to(torch.uint8).permute(0, 2, 3, 1).expand(-1, -1, -1, 3).contiguous()
    labels = torch.from_numpy(digits.target).long()
    test = torch.arange(len(labels)) % 5 == 0
    return {"train": [images[~test], labels[~test]], "test": [images[test], labels[test]]}, [str(i) for i in range(10)]


def _local_files(spec: Spec, data_dir: Path) -> dict[str, list[Path]]:
    for folder in (data_dir / spec.repo / spec.folder, data_dir / spec.repo.split("/")[1] / spec.folder,
                   data_dir / spec.folder, data_dir):
        files = {split: sorted(folder.glob(f"{split}-*.parquet")) for split in ("train", "test")}
        if files["train"] and files["test"]:
            return files
    raise RunError(
        f"no Parquet files of {spec.repo} under {data_dir}: expected "
        f"{data_dir / spec.repo / spec.folder}/train-*.parquet and test-*.parquet")


def _check_complete(files: list[Path], split: str) -> None:
    """Raise if ``files`` lack some of a ``split`` in parts, ``train-00000-of-00003.parquet`` and so on."""
    parts = [match for file in files if (match := re.search(r"-(\d+)-of-(\d+)$", file.stem))]
    for total in {match[2] for match in parts}:
        there = {int(match[1]) for match in parts if match[2] == total}
        missing = sorted(set(range(int(total))) - there)
        if missing:
            names = ", ".join(f"{split}-{number:05}-of-{total}.parquet" for number in missing[:3])
            raise RunError(f"{files[0].parent}: {len(missing)} of the {int(total)} {split} files are missing ({names}"
                           f"{', ...' if len(missing) > 3 else ''}); fetch them")


def _hub_files(spec: Spec) -> dict[str, list[Path]]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    patterns = [f"{spec.folder}/{split}-*.parquet" for split in ("train", "test")]
    try:
        root = Path(snapshot_download(spec.repo, repo_type="dataset", allow_patterns=patterns))
        return _local_files(spec, root)
    except RunError:
        raise
    except Exception as error:  # offline, no such host, no cache, ...: the client has many names for it
        raise RunError(
            f"cannot get {spec.repo} from the Hub ({type(error).__name__}: {first_line(error)}); "
            f"use --data-dir for Parquet files on disk, or --dataset digits, which needs no download"
        ) from error


def _read_parquet(
        files: list[Path], spec: Spec, rows: int | None) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    from PIL import Image

    images: list[np.ndarray] = []
    labels: list[int] = []
    names = [str(i) for i in range(spec.classes)]
    for file in files:
        table = _read_table(file, spec)
        names = _class_names(table.schema.metadata, spec) or names
        if rows is not None:
            table = table[:rows - len(labels)]
        blobs = table["img"].combine_chunks().field("bytes").to_pylist()
        for row, (blob, label) in enumerate(zip(blobs, table[spec.label].to_pylist(), strict=True)):
            if type(label) is not int or not 0 <= label < spec.classes:
                raise RunError(f"{file}, row {row}: labels must be in 0..{spec.classes - 1}, found {label}; fetch "
                               "the files again")
            try:
                images.append(_decode(blob))  # threads would wait for each other
            except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError) as error:
                raise RunError(f"{file}, row {row}: an image cannot be decoded ({error}); fetch the files again"
                               ) from error
            labels.append(label)
    if not labels:
        raise RunError(f"{files[0].parent}: the files have no rows; fetch them again")
    return torch.from_numpy(np.stack(images)), torch.tensor(labels), names


def _read_table(file: Path, spec: Spec) -> Any:
    """Return the ``pyarrow.Table`` in ``file``, which has images and labels."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise RunError(f"{file} cannot be read as Parquet ({first_line(error)}); fetch it again") from error
    if not {"img", spec.label} <= set(table.column_names):
        raise RunError(f"{file} must have the columns 'img' and '{spec.label}', it has {table.column_names}")
    kind = table["img"].type
    if not pyarrow.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        raise RunError(f"{file}: column 'img' must be a struct with the field 'bytes', it is {kind}")
    return table


def _decode(blob: bytes) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    try:
        # The Hub has PNG; to have Pillow try all that it knows takes longer than to decode.
        image = Image.open(io.BytesIO(blob), formats=("PNG", "WEBP"))
    except UnidentifiedImageError:
        try:
            image = Image.open(io.BytesIO(blob))
        except UnidentifiedImageError:
            raise ValueError(f"{len(blob)} bytes that are not an image") from None
    if image.size != (32, 32):
        raise ValueError(f"expected 32x32 images, found {image.width}x{image.height}")
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _class_names(metadata: dict[bytes, bytes] | None, spec: Spec) -> list[str] | None:
    """Class names as the ``datasets`` library stores them in a Parquet file's metadata."""
    try:
        info: Any = json.loads((metadata or {})[b"huggingface"])
        names = info["info"]["features"][spec.label]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return names if isinstance(names, list) and len(names) == spec.classes else None
