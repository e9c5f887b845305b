"""What a cache will take on the disk, before it is built."""

from __future__ import annotations

import math
from collections.abc import Sequence

from compression_manager.errors import ConfigError
from compression_manager.tracking.batches import number_of_batches
from compression_plugins.distillation.cache.encoding import DTYPES, OWNER, Encoding

# A row's id in its shard, and id and row in the index.
_ID_BYTES = 8 + 16
# Manifest and safetensors header of a shard, and those of the index with a line per shard.
_SHARD_BYTES = 2048
_INDEX_BYTES = 2048


def expected_samples(loader: object, first_batch: int) -> int:
    """Return how many samples a loader will yield at most, as far as can be told.

    A sampler may choose a part of the data set, and a list of batches has no data set.

    Args:
        loader: it may have a length, and a data set with a length.
        first_batch: samples of its first batch, taken for the largest.
    """
    batches = number_of_batches(loader, None)
    by_batches = None if batches is None else batches * first_batch
    by_data_set = number_of_batches(getattr(loader, "dataset", None), by_batches)
    return first_batch if by_data_set is None else by_data_set


def estimate(rows: int, shape: Sequence[int], encoding: Encoding, shard_size: int) -> int:
    """Return an upper estimate of the bytes of `rows` outputs of shape (*, classes)."""
    shards = math.ceil(rows / shard_size)
    per_row = encoding.bytes_per_sample(shape) + _ID_BYTES
    return rows * per_row + shards * _SHARD_BYTES + _INDEX_BYTES


def check_budget(
    budget: int, used: int, rows: int, shape: Sequence[int], encoding: Encoding, shard_size: int
) -> None:
    """Raise ConfigError, naming encodings that fit, if `rows` more outputs exceed the budget.

    Args:
        budget: bytes of the whole cache.
        used: bytes that it takes already.
    """
    needed = estimate(rows, shape, encoding, shard_size)
    if used + needed <= budget:
        return
    have = f" beside the {used:,} that it takes already" if used else ""
    options = _fitting(budget - used, rows, shape, shard_size)
    advice = f"These fit: {'; '.join(options)}." if options else "No encoding fits."
    raise ConfigError(
        f"{OWNER}.byte_budget is {budget:,}, but {rows:,} outputs of shape {tuple(shape)} with "
        f"{encoding} take about {needed:,} bytes{have}. {advice}"
    )


def _fitting(room: int, rows: int, shape: Sequence[int], shard_size: int) -> list[str]:
    """Return for each dtype the encoding that keeps most, if any fits."""
    found = []
    for dtype in DTYPES:
        # All classes first, then the most classes; sizes grow with top_k, so that one can halve.
        if estimate(rows, shape, Encoding(None, dtype), shard_size) <= room:
            found.append(str(Encoding(None, dtype)))
            continue
        low, high = 0, shape[-1] - 1
        while low < high:
            middle = (low + high + 1) // 2
            fits = estimate(rows, shape, Encoding(middle, dtype), shard_size) <= room
            low, high = (middle, high) if fits else (low, middle - 1)
        if low:
            found.append(str(Encoding(low, dtype)))
    return found
