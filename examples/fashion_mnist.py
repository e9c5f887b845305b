"""Fashion-MNIST (MIT licence): the embedded subset, or the full set from its four idx files."""

from __future__ import annotations

import gzip
import lzma
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from compression_manager.errors import ConfigError

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
SIZE = 28
MEAN, STANDARD_DEVIATION = 0.2860, 0.3530  # of all pixels of the training set, scaled to 0..1

SUBSET = Path(__file__).parent / "data" / "fashion_mnist_subset.xz"
# Images per class, in the order in which the file holds the splits.
SUBSET_PER_CLASS = {"train": 500, "validation": 100, "test": 240}
FULL_VALIDATION_PER_CLASS = 500

IDX_FILES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Split:
    """One split: `images` (N, 1, 28, 28) float32, normalised; `labels` (N,) int64, 0 to 9."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Splits:
    """Train and validation come from the original training set, test from its test set."""

    train: Split
    validation: Split
    test: Split


def load(data: Path | None = None) -> Splits:
    """Return the three splits.

    Args:
        data: None for the embedded subset (5,000 / 1,000 / 2,400 images), or a folder with the
            four original idx files, gzipped or not, for the full set (55,000 / 5,000 / 10,000;
            validation is the last 500 training images of each class).

    Raises ConfigError when a file is missing or is not what its name says.
    """
    if data is None:
        return Splits(**{name: _split(*raw) for name, raw in decode(SUBSET).items()})
    raw = read_folder(data)
    images, labels = raw["train_images"], raw["train_labels"]
    held_out = per_class(labels, -FULL_VALIDATION_PER_CLASS, None)
    kept = np.setdiff1d(np.arange(len(labels)), held_out)
    return Splits(
        train=_split(images[kept], labels[kept]),
        validation=_split(images[held_out], labels[held_out]),
        test=_split(raw["test_images"], raw["test_labels"]),
    )


def normalise(images: Bytes) -> Tensor:
    """Return `(images / 255 - mean) / standard deviation`: (N, 28, 28) uint8 -> (N, 1, 28, 28)."""
    scaled = torch.from_numpy(images.astype(np.float32, order="C")) / 255
    return ((scaled - MEAN) / STANDARD_DEVIATION).unsqueeze(1)


def augment(images: Tensor, shift: int) -> Tensor:
    """Return each image mirrored or not, and moved by its own offset of up to `shift` pixels.

    images: (N, 1, 28, 28) float, normalised -> the same shape; black pixels move in. Random
    numbers come from torch's global generator, whose state checkpoints hold.
    """
    padded = F.pad(images, (shift,) * 4, value=-MEAN / STANDARD_DEVIATION)
    top, left = torch.randint(2 * shift + 1, (2, len(images), 1))
    rows, columns = top + torch.arange(SIZE), left + torch.arange(SIZE)
    mirrored = torch.rand(len(images), 1) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    each = torch.arange(len(images))[:, None, None]
    return padded[each, 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)


def variants(images: Tensor, shift: int) -> Tensor:
    """Return all that `augment` can make of the images, each as likely as the others.

    images: (N, 1, 28, 28) float, normalised -> (V * N, 1, 28, 28) with V = 2 * (2 * shift + 1)^2;
    variant v of image i has the index v * N + i, and variant 0 without a shift is the image.
    """
    padded = F.pad(images, (shift,) * 4, value=-MEAN / STANDARD_DEVIATION)
    offsets = range(2 * shift + 1)
    moved = [
        padded[..., top : top + SIZE, left : left + SIZE] for top in offsets for left in offsets
    ]
    return torch.cat([image for each in moved for image in (each, each.flip(-1))])


def per_class(labels: Bytes, start: int | None, stop: int | None) -> npt.NDArray[np.intp]:
    """Return the indices of images `start:stop` of every class, class after class."""
    return np.concatenate(
        [np.flatnonzero(labels == label)[start:stop] for label in range(len(CLASSES))]
    )


def encode(splits: dict[str, tuple[Bytes, Bytes]]) -> bytes:
    """Return the subset file's bytes: the images of all splits, then their labels, as .xz.

    Images are stored column by column, class after class: LZMA needs 355 bytes an image that
    way, 375 in the usual order, and 370 to 400 behind PNG's or JPEG-LS's prediction filters.
    """
    images = np.concatenate([split[0] for split in splits.values()]).transpose(0, 2, 1)
    labels = np.concatenate([split[1] for split in splits.values()])
    lzma2 = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "lp": 0, "pb": 0}
    return lzma.compress(
        images.tobytes() + labels.tobytes(), check=lzma.CHECK_CRC64, filters=[lzma2]
    )


def decode(path: Path) -> dict[str, tuple[Bytes, Bytes]]:
    """Return `{split: (images (N, 28, 28) uint8, labels (N,) uint8)}` of the subset file."""
    counts = {name: count * len(CLASSES) for name, count in SUBSET_PER_CLASS.items()}
    total = sum(counts.values())
    try:
        content = np.frombuffer(lzma.decompress(path.read_bytes()), np.uint8)
    except (OSError, lzma.LZMAError) as error:
        raise ConfigError(
            f"{path} cannot be read as the embedded Fashion-MNIST subset ({error}). Restore it "
            "from the repository, or rebuild it with examples/data/build_subset.py."
        ) from error
    if len(content) != total * (SIZE * SIZE + 1):
        raise ConfigError(
            f"{path} holds {len(content)} bytes; {total} images and labels take "
            f"{total * (SIZE * SIZE + 1)}. Rebuild it with examples/data/build_subset.py."
        )
    images = content[: total * SIZE * SIZE].reshape(total, SIZE, SIZE).transpose(0, 2, 1)
    labels = content[total * SIZE * SIZE :]
    ends = np.cumsum(list(counts.values()))
    return {
        name: (images[end - count : end], labels[end - count : end])
        for (name, count), end in zip(counts.items(), ends, strict=True)
    }


def read_folder(folder: Path) -> dict[str, Bytes]:
    """Return the arrays of the four idx files in `folder`, by the keys of `IDX_FILES`."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; it should hold {_expected()}.")
    paths = {key: _find(folder, name) for key, name in IDX_FILES.items()}
    missing = [IDX_FILES[key] for key, path in paths.items() if path is None]
    if missing:
        raise ConfigError(f"{folder} lacks {', '.join(missing)}; it should hold {_expected()}.")
    raw = {key: read_idx(path) for key, path in paths.items() if path is not None}
    for part in ("train", "test"):
        _check_pair(folder, part, raw[f"{part}_images"], raw[f"{part}_labels"])
    return raw


def read_idx(path: Path) -> Bytes:
    """Return the uint8 array of one idx file (http://yann.lecun.com/exdb/mnist), gzipped or not.

    Raises ConfigError when the file is unreadable, no uint8 idx file, or cut short.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ConfigError(
            f"{path} is no idx file of unsigned bytes: it begins with {content[:4].hex()}, "
            "not with 000008."
        )
    header = 4 + 4 * content[3]
    if len(content) < header:
        raise ConfigError(f"{path} ends within its header of {header} bytes.")
    shape = struct.unpack(f">{content[3]}I", content[4:header])
    if len(content) != header + math.prod(shape):
        raise ConfigError(
            f"{path} has {len(content) - header} bytes of data, but its header announces the "
            f"shape {shape}."
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _split(images: Bytes, labels: Bytes) -> Split:
    return Split(normalise(images), torch.from_numpy(labels.astype(np.int64)))


def _find(folder: Path, name: str) -> Path | None:
    candidates = (folder / name, folder / f"{name}.gz")
    return next((path for path in candidates if path.is_file()), None)


def _expected() -> str:
    return f"{', '.join(IDX_FILES.values())}, each plain or with .gz"


def _check_pair(folder: Path, part: str, images: Bytes, labels: Bytes) -> None:
    where = f"{folder}: {IDX_FILES[f'{part}_images']} and {IDX_FILES[f'{part}_labels']}"
    if images.shape[1:] != (SIZE, SIZE) or labels.shape != images.shape[:1]:
        raise ConfigError(
            f"{where} have the shapes {images.shape} and {labels.shape}; valid are "
            f"(N, {SIZE}, {SIZE}) and (N,)."
        )
    counts = np.bincount(labels, minlength=len(CLASSES))
    if len(counts) > len(CLASSES):
        raise ConfigError(f"{where}: labels reach {len(counts) - 1}; valid are 0 to 9.")
    needed = FULL_VALIDATION_PER_CLASS + 1 if part == "train" else 1
    if counts.min() < needed:
        raise ConfigError(
            f"{where}: class {int(counts.argmin())} has {counts.min()} images; at least {needed} "
            "of each class are needed."
        )
