"""Rebuild the embedded Fashion-MNIST subset from the four original idx files.

    python examples/data/build_subset.py SOURCE_FOLDER [--output FILE]

The choice is fixed: of every class the first training images for train, the last ones for
validation. The first test images were looked at while the demo's settings were chosen; the test
split is the images after them, first used with the settings as they are. The same files give the
same bytes (with the liblzma 5.x that CPython ships).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from compression_manager.errors import ConfigError
from fashion_mnist import SUBSET, SUBSET_PER_CLASS, encode, per_class, read_folder


def build(source: Path) -> bytes:
    """Return the bytes of the subset file. Raises ConfigError when a source file is unusable."""
    raw = read_folder(source)
    counts = SUBSET_PER_CLASS
    chosen = {
        "train": ("train", per_class(raw["train_labels"], None, counts["train"])),
        "validation": ("train", per_class(raw["train_labels"], -counts["validation"], None)),
        "test": ("test", per_class(raw["test_labels"], counts["test"], 2 * counts["test"])),
    }
    return encode(
        {
            name: (raw[f"{part}_images"][index], raw[f"{part}_labels"][index])
            for name, (part, index) in chosen.items()
        }
    )


def main() -> int:
    """Write the subset and return the exit status."""
    parser = argparse.ArgumentParser(description="Rebuild the embedded Fashion-MNIST subset.")
    parser.add_argument("source", type=Path, help="folder with the four original idx files")
    parser.add_argument("--output", type=Path, default=SUBSET)
    options = parser.parse_args()
    try:
        content = build(options.source)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    options.output.write_bytes(content)
    print(f"{options.output}: {len(content)} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
