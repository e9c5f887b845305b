"""The embedded Fashion-MNIST subset and the loader of the original files."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import os
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest
import torch

from compression_manager.errors import ConfigError

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
# The original files are not in the repository; Debian's package puts them here.
ORIGINALS = Path(
    os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist")  # a folder with 4 files
)
# SHA-256 of images and then labels, row by row, and of the file itself.
CHECKSUMS = {
    "train": "",
    "validation": "",
    "test": "",
}
FILE_CHECKSUM = "ab5922735ed5dc3abd0c069a8d18cdf252f36973315fbb04498ade165938615d"


def import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def dataset(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("fashion_mnist")
