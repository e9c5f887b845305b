"""A data set whose items carry the id under which a cache knows them."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping, Sized
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.utils.data import Dataset

from compression_manager.configuration.checks import require_integer
from compression_manager.errors import ConfigError

SAMPLE_IDS = "sample_ids"


class IndexedDataset(Dataset[Any]):
    """Yields each item of a data set together with its index, the sample id.

    A tuple or list becomes `(*item, sample_id)`, a mapping gets the key "sample_ids", and any
    other item becomes `(item, sample_id)`; collated, the ids are an int64 tensor (batch,).

    Args:
        dataset: a map-style data set: `len(dataset)` items, `dataset[index]`.
        augmentation_seed: when given, the CPU generators of torch, Python and (where it is
            imported) NumPy are seeded from it and the index while an item is made, and put back
            afterwards. Random augmentation then is a function of seed and sample id, as a cache
            of the teacher's outputs needs it. The attribute of the same name may be changed
            between epochs; with persistent workers it may not, because they keep their copy.

    Raises:
        ConfigError: the data set has no length or items by index.
    """

    def __init__(self, dataset: Any, *, augmentation_seed: int | None = None) -> None:
        if not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__"):
            raise ConfigError(
                "IndexedDataset takes a data set with a length and items by index, got "
                f"{type(dataset).__name__}; of an iterable data set yield the ids yourself."
            )
        if augmentation_seed is not None:
            require_integer(self, "augmentation_seed", augmentation_seed)
        self.dataset: Any = dataset
        self.augmentation_seed = augmentation_seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        length = len(self)
        if not -length <= index < length:
            raise IndexError(f"index {index} is out of range for {length} samples")
        sample_id = int(index) % length
        seed = self.augmentation_seed
        with nullcontext() if seed is None else _seeded(f"{seed}/{sample_id}"):
            item = self.dataset[sample_id]
        if isinstance(item, Mapping):
            if SAMPLE_IDS in item:
                raise ConfigError(
                    f"item {sample_id} of the data set has a key {SAMPLE_IDS!r} already; use the "
                    "data set as it is, or leave the key out."
                )
            return {**item, SAMPLE_IDS: sample_id}
        return (*item, sample_id) if isinstance(item, (tuple, list)) else (item, sample_id)


@contextmanager
def _seeded(text: str) -> Iterator[None]:
    # Not `capture_random_state`: in a forked worker an accelerator must not be touched.
    numpy = sys.modules.get("numpy")
    before = random.getstate(), torch.random.get_rng_state()
    numpy_before = None if numpy is None else numpy.random.get_state()
    source = random.Random(text)
    random.seed(source.getrandbits(64))
    torch.default_generator.manual_seed(source.getrandbits(63))
    if numpy is not None:
        numpy.random.seed(source.getrandbits(32))
    try:
        yield
    finally:
        random.setstate(before[0])
        torch.random.set_rng_state(before[1])
        if numpy is not None:
            numpy.random.set_state(numpy_before)
