"""The embedded Fashion-MNIST subset and the loader of the original files."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import importlib.util
import os
import struct
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest
import torch

from compression_manager.errors import ConfigError

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
# The original files are not in the repository; this is where Debian's package puts them.
ORIGINALS = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))
# SHA-256 of a split's images, row by row, then its labels; computed from the original files by
# code that shares nothing with the example.
CHECKSUMS = {
    "train": "d3fd13f231f4922feba89022566507120268713d24d9a24506cc5385f3695f9c",
    "validation": "743b0369f52dd9bcf5286a0abd31a070cde51c85ad508c9a9eb4b44cfc61de1f",
    "test": "21a4e626d22c8ac46269e2ae73140b62750738320bd977102e41b3d30faba405",
}
TRAIN_PER_CLASS, TEST_PER_CLASS = 503, 3

Bytes = npt.NDArray[np.uint8]


@pytest.fixture
def fashion_mnist(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("fashion_mnist")


def idx(array: Bytes) -> bytes:
    """The idx format: two zero bytes, type 8 (uint8), rank, big-endian sizes, data."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def raw_files() -> dict[str, bytes]:
    """Four idx files, images numbered in their first four pixels, labels 9, 8, ... 0, 9, ..."""
    files = {}
    for part, per_class in (("train", TRAIN_PER_CLASS), ("t10k", TEST_PER_CLASS)):
        count = 10 * per_class
        images = np.zeros((count, 28, 28), np.uint8)
        images[:, 0, :4] = np.arange(count, dtype="<u4").view(np.uint8).reshape(count, 4)
        files[f"{part}-images-idx3-ubyte"] = idx(images)
        files[f"{part}-labels-idx1-ubyte"] = idx((9 - np.arange(count) % 10).astype(np.uint8))
    return files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in raw_files().items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def numbers(fashion_mnist: ModuleType, images: torch.Tensor) -> npt.NDArray[np.uint32]:
    """The numbers that `raw_files` wrote into the images, read back from normalised tensors."""
    scaled = images.double() * fashion_mnist.STANDARD_DEVIATION + fashion_mnist.MEAN
    pixels = (scaled[:, 0, 0, :4] * 255).round().to(torch.uint8).numpy()
    return np.ascontiguousarray(pixels).view("<u4").ravel()


def test_the_subset_holds_the_original_images(fashion_mnist: ModuleType) -> None:
    splits = fashion_mnist.decode(fashion_mnist.SUBSET)
    sums = {
        name: hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
        for name, (images, labels) in splits.items()
    }
    assert sums == CHECKSUMS


def build_subset() -> ModuleType:
    path = EXAMPLES / "data" / "build_subset.py"
    spec = importlib.util.spec_from_file_location("build_subset", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@pytest.mark.skipif(not ORIGINALS.is_dir(), reason="the original idx files are not installed")
def test_rebuilding_gives_the_same_bytes(fashion_mnist: ModuleType) -> None:
    assert build_subset().build(ORIGINALS) == fashion_mnist.SUBSET.read_bytes()


def test_the_script_chooses_by_class_and_keeps_the_splits_apart(
    fashion_mnist: ModuleType, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {"train": 2, "validation": 3, "test": 1}
    script = build_subset()
    for module in (script, fashion_mnist):
        monkeypatch.setattr(module, "SUBSET_PER_CLASS", counts)
    output = tmp_path / "subset.xz"
    monkeypatch.setattr("sys.argv", ["build_subset.py", str(folder), "--output", str(output)])
    assert script.main() == 0
    splits = fashion_mnist.decode(output)
    # Image number n has the label 9 - n % 10; the last training images are for validation, and
    # of the test images the first ones were looked at.
    starts = {"train": 0, "validation": TRAIN_PER_CLASS - 3, "test": 1}
    for name, count in counts.items():
        images, labels = splits[name]
        assert labels.tolist() == [label for label in range(10) for _ in range(count)]
        numbers = np.ascontiguousarray(images[:, 0, :4]).view("<u4").ravel().tolist()
        assert numbers == [
            10 * (starts[name] + k) + 9 - label for label in range(10) for k in range(count)
        ]


def test_encode_and_decode_round_trip(fashion_mnist: ModuleType, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    splits = {
        name: (
            random.integers(0, 256, (10 * count, 28, 28), dtype=np.uint8),
            random.integers(0, 10, 10 * count, dtype=np.uint8),
        )
        for name, count in fashion_mnist.SUBSET_PER_CLASS.items()
    }
    (tmp_path / "subset.xz").write_bytes(fashion_mnist.encode(splits))
    decoded = fashion_mnist.decode(tmp_path / "subset.xz")
    assert list(decoded) == ["train", "validation", "test"]
    for name, (images, labels) in splits.items():
        np.testing.assert_array_equal(decoded[name][0], images)
        np.testing.assert_array_equal(decoded[name][1], labels)


def test_data_folder_is_small_and_has_its_licence() -> None:
    files = [path for path in (EXAMPLES / "data").iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 3_000_000
    licence = (EXAMPLES / "data" / "fashion_mnist_subset.LICENSE").read_text()
    assert "Copyright: 2017, Zalando SE" in licence
    assert "Permission is hereby granted, free of charge" in licence


def test_load_gives_balanced_normalised_tensors(fashion_mnist: ModuleType) -> None:
    splits = fashion_mnist.load()
    raw = fashion_mnist.decode(fashion_mnist.SUBSET)
    for name, size in {"train": 5000, "validation": 1000, "test": 2400}.items():
        split = getattr(splits, name)
        assert len(split) == size
        assert split.images.shape == (size, 1, 28, 28)
        assert split.images.dtype == torch.float32
        assert split.images.is_contiguous()
        assert split.labels.dtype == torch.int64
        assert torch.bincount(split.labels).tolist() == [size // 10] * 10
        expected = (raw[name][0].astype(np.float64) / 255 - 0.2860) / 0.3530
        np.testing.assert_allclose(split.images[:, 0].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_subset_splits_share_no_image(fashion_mnist: ModuleType) -> None:
    splits = fashion_mnist.decode(fashion_mnist.SUBSET)
    distinct = {name: {image.tobytes() for image in images} for name, (images, _) in splits.items()}
    assert not distinct["train"] & distinct["validation"]
    assert not distinct["train"] & distinct["test"]
    assert not distinct["validation"] & distinct["test"]


@pytest.mark.parametrize("zipped", [False, True])
def test_load_reads_a_folder(fashion_mnist: ModuleType, tmp_path: Path, zipped: bool) -> None:
    for name, content in raw_files().items():
        path = tmp_path / (f"{name}.gz" if zipped else name)
        path.write_bytes(gzip.compress(content, 1) if zipped else content)
    splits = fashion_mnist.load(tmp_path)

    train = numbers(fashion_mnist, splits.train.images)
    validation = numbers(fashion_mnist, splits.validation.images)
    # Image i has label 9 - i % 10; the last 500 of the 503 images of each class are held out.
    assert sorted(train) == list(range(30))
    assert sorted(validation) == list(range(30, 5030))
    np.testing.assert_array_equal(splits.train.labels.numpy(), 9 - train.astype(int) % 10)
    np.testing.assert_array_equal(splits.validation.labels.numpy(), 9 - validation.astype(int) % 10)
    assert numbers(fashion_mnist, splits.test.images).tolist() == list(range(30))
    assert splits.test.labels.tolist() == [9 - i % 10 for i in range(30)]


def test_missing_files_are_named(fashion_mnist: ModuleType, folder: Path) -> None:
    (folder / "train-labels-idx1-ubyte").unlink()
    (folder / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(ConfigError) as caught:
        fashion_mnist.load(folder)
    problem = str(caught.value).split(";")[0]
    assert str(folder) in problem
    assert "lacks train-labels-idx1-ubyte, t10k-images-idx3-ubyte" in problem
    assert "train-images" not in problem


def test_missing_folder_is_named(fashion_mnist: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent is not a folder; .*t10k-labels-idx1-ubyte"):
        fashion_mnist.load(tmp_path / "absent")


def relabel(content: bytes) -> bytes:
    return content[:-1] + b"\x0a"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("train-labels-idx1-ubyte", lambda content: b"PK\x03\x04", "begins with 504b0304"),
        ("train-labels-idx1-ubyte", lambda content: b"", "no idx file"),
        ("train-images-idx3-ubyte", lambda content: content[:-1], r"header announces the\s+shape"),
        ("train-images-idx3-ubyte", lambda content: content[:7], "within its header"),
        ("t10k-labels-idx1-ubyte", lambda _: idx(np.zeros(29, np.uint8)), r"\(29,\)"),
        ("t10k-labels-idx1-ubyte", lambda _: idx(np.zeros(30, np.uint8)), "class 1 has 0 images"),
        ("t10k-labels-idx1-ubyte", relabel, "labels reach 10"),
    ],
)
def test_damaged_files_are_refused(
    fashion_mnist: ModuleType,
    folder: Path,
    name: str,
    change: Callable[[bytes], bytes],
    message: str,
) -> None:
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    with pytest.raises(ConfigError, match=message) as caught:
        fashion_mnist.load(folder)
    assert name in str(caught.value)


def test_a_damaged_gzip_file_is_refused(fashion_mnist: ModuleType, folder: Path) -> None:
    plain = folder / "train-labels-idx1-ubyte"
    zipped = gzip.compress(plain.read_bytes())
    plain.unlink()
    for content in (zipped[:-20], b"no gzip", zipped[:10] + b"\xff" * 20):
        (folder / f"{plain.name}.gz").write_bytes(content)
        with pytest.raises(ConfigError, match=r"train-labels-idx1-ubyte\.gz cannot be read"):
            fashion_mnist.load(folder)


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_a_damaged_subset_is_refused(fashion_mnist: ModuleType, tmp_path: Path, keep: int) -> None:
    damaged = tmp_path / "subset.xz"
    damaged.write_bytes(fashion_mnist.SUBSET.read_bytes()[:keep])
    with pytest.raises(ConfigError, match=r"subset\.xz cannot be read .*build_subset\.py"):
        fashion_mnist.decode(damaged)


def test_augment_mirrors_and_moves_every_image_by_its_own_offset(
    fashion_mnist: ModuleType,
) -> None:
    images = fashion_mnist.load().test.images[:400]
    torch.manual_seed(0)
    moved = fashion_mnist.augment(images, 1)
    black = -0.2860 / 0.3530
    found = set()
    for image, result in zip(images[:, 0].numpy(), moved[:, 0].numpy(), strict=True):
        padded = np.pad(image, 1, constant_values=black)
        fits = [
            (top, left, mirrored)
            for top in range(3)
            for left in range(3)
            for mirrored in (False, True)
            if np.allclose(_cut(padded, top, left, mirrored), result)
        ]
        assert fits
        found.add(fits[0])
    assert moved.shape == images.shape
    assert len(found) == 18
    torch.manual_seed(0)
    assert torch.equal(moved, fashion_mnist.augment(images, 1))


def test_augment_without_shift_only_mirrors(fashion_mnist: ModuleType) -> None:
    images = fashion_mnist.load().test.images[:50]
    torch.manual_seed(0)
    changed = fashion_mnist.augment(images, 0)
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(changed, images, strict=True)]
    same = [torch.equal(a, b) for a, b in zip(changed, images, strict=True)]
    assert all(a or b for a, b in zip(mirrored, same, strict=True))
    assert 10 < sum(same) < 40


def _cut(padded: np.ndarray, top: int, left: int, mirrored: bool) -> np.ndarray:
    part = padded[top : top + 28, left : left + 28]
    return part[:, ::-1] if mirrored else part
