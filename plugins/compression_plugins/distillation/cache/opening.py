"""Opening a finished cache: every byte verified, or a message that says what to do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from compression_manager.errors import CheckpointCorruptError, CheckpointError
from compression_plugins.distillation.cache.encoding import Encoding
from compression_plugins.distillation.cache.lookup import CachedRows
from compression_plugins.distillation.cache.ownership import key_of
from compression_plugins.distillation.cache.store import Index, SeedStore, Shard, stores_in


def finished_seeds(directory: Path) -> list[int]:
    """Return the augmentation seeds whose build has finished, sorted."""
    return [store.seed for store in stores_in(directory) if store.has_index()]


def open_rows(directory: Path, seed: int, preprocessing: str, encoding: Encoding) -> CachedRows:
    """Verify and map the outputs of one augmentation seed.

    Raises:
        CheckpointCorruptError: a file is missing or damaged.
        CheckpointMismatchError: it was built with another preprocessing or encoding.
        CheckpointError: it was not built, or its build has not finished.
    """
    store = SeedStore(directory, seed)
    advice = f"Call cache.build(teacher, loader, augmentation_seed={seed})"
    if not store.has_index():
        built = finished_seeds(directory)
        others = f" (complete are the seeds {', '.join(map(str, built))})" if built else ""
        state = "its build has not finished" if store.shard_names() else "nothing was built there"
        raise CheckpointError(
            f"{_name(directory, seed)} cannot be read: {state}{others}. {advice}; it goes on "
            "where it stopped."
        )
    try:
        key = key_of(directory, preprocessing, encoding)
        index = store.read_index(key)
        return rows_of(directory, seed, index, store.read_shards(key, index), encoding)
    except CheckpointCorruptError as error:
        raise CheckpointCorruptError(
            f"{error} {advice}: it builds again what is damaged."
        ) from error


def rows_of(
    directory: Path, seed: int, index: Index, shards: Sequence[Shard], encoding: Encoding
) -> CachedRows:
    """Return what index and shards hold together; errors as of `CachedRows`."""
    return CachedRows(index, shards, encoding, _name(directory, seed))


def _name(directory: Path, seed: int) -> str:
    return f"the teacher cache {directory} for augmentation seed {seed}"
