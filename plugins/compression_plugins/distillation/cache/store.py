"""The files of one augmentation seed: shards of rows, and the index that makes them complete.

    seed-0/shard-00000/  manifest.json, rows.safetensors   "ids" and what the encoding stores
    seed-0/index/        manifest.json, index.safetensors  "ids", sorted, and their "rows"

Each folder is written whole or not at all and carries the SHA-256 of its files. Shards that no
index lists belong to a build that has not finished: they are resumed, never read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from compression_manager.errors import (
    CheckpointCorruptError,
    CheckpointMismatchError,
    ForeignDirectoryError,
)
from compression_manager.state import (
    Manifest,
    atomic_directory,
    read_manifest,
    remove_directory,
    verify_directory,
)
from compression_plugins.distillation.cache.key import CacheKey

FORMAT = "compression_plugins.teacher_cache"
_ROWS, _INDEX = "rows.safetensors", "index.safetensors"
_SHARD, _SEED = "shard-", "seed-"


@dataclass(frozen=True)
class Shard:
    """One verified shard; its tensors are mapped into memory, not read.

    Attributes:
        name: of its folder.
        sha256: of its rows.
        ids: (rows,) int64 sample ids.
        parts: what the encoding stored, each (rows, *).
        shape: (*, classes), of one decoded output.
    """

    name: str
    sha256: str
    ids: Tensor
    parts: Mapping[str, Tensor]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Index:
    """Where each sample's output lies.

    Attributes:
        ids: (n,) int64, sorted.
        rows: (n,) int64, counted through the shards in the order of `shards`.
        shards: name and SHA-256 of the rows of each.
    """

    ids: Tensor
    rows: Tensor
    shards: tuple[tuple[str, str], ...]


class SeedStore:
    """Reads and writes the folder of one augmentation seed.

    Args:
        directory: of the cache.
        seed: the augmentation seed.
    """

    def __init__(self, directory: Path, seed: int) -> None:
        self.seed = seed
        self.folder = directory / f"{_SEED}{seed}"

    def shard_names(self) -> list[str]:
        """Return the names of the shards that are there, oldest first."""
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        return sorted(name for name in names if name.startswith(_SHARD))

    def has_index(self) -> bool:
        """Return whether a build has finished."""
        return (self.folder / "index").is_dir()

    def stored_key(self) -> Mapping[str, Any] | None:
        """Return the key of what is there, finished or not; None if nothing is readable."""
        for name in [*(["index"] if self.has_index() else []), *self.shard_names()]:
            try:
                manifest = self._manifest(name, read_manifest)
            except CheckpointCorruptError:
                continue
            return _mapping(manifest, "key")
        return None

    def write_shard(
        self, name: str, key: CacheKey, ids: Tensor, parts: Mapping[str, Tensor], shape: list[int]
    ) -> Shard:
        """Write one shard and return it as read back."""
        metadata = {"key": key.to_json(), "augmentation_seed": self.seed, "shape": shape}
        tensors = {"ids": ids, **parts}
        with atomic_directory(self.folder / name, format_name=FORMAT, metadata=metadata) as draft:
            safetensors.torch.save_file(tensors, draft / _ROWS)
        return self.read_shard(name, key)

    def read_shard(self, name: str, key: CacheKey) -> Shard:
        """Verify one shard and map it.

        Raises:
            CheckpointCorruptError: its bytes are not those that were written.
            CheckpointMismatchError: it belongs to another key.
        """
        manifest = self._manifest(name, verify_directory)
        self._check(manifest, key)
        shape = manifest.metadata.get("shape")
        path = manifest.path(_ROWS)
        parts = _mapped(path)
        ids = parts.pop("ids", None)
        if (
            ids is None
            or not isinstance(shape, list)
            or len({*map(len, (ids, *parts.values()))}) > 1
        ):
            raise CheckpointCorruptError(f"{path} is no shard of a teacher cache.")
        return Shard(name, manifest.files[_ROWS].sha256, ids, parts, tuple(shape))

    def write_index(self, key: CacheKey, index: Index) -> None:
        """Declare the shards of the index complete."""
        metadata = {
            "key": key.to_json(),
            "augmentation_seed": self.seed,
            "shards": [list(shard) for shard in index.shards],
        }
        target = self.folder / "index"
        with atomic_directory(target, format_name=FORMAT, metadata=metadata) as draft:
            safetensors.torch.save_file({"ids": index.ids, "rows": index.rows}, draft / _INDEX)

    def read_index(self, key: CacheKey) -> Index:
        """Verify the index alone.

        Raises:
            CheckpointCorruptError: any byte is not the one that was written.
            CheckpointMismatchError: it belongs to another key.
        """
        manifest = self._manifest("index", verify_directory)
        self._check(manifest, key)
        path = manifest.path(_INDEX)
        tensors, shards = _mapped(path), manifest.metadata.get("shards")
        if not {"ids", "rows"} <= tensors.keys() or not isinstance(shards, list):
            raise CheckpointCorruptError(f"{path} is no index of a teacher cache.")
        listed = tuple((str(name), str(sha256)) for name, sha256 in shards)
        return Index(tensors["ids"], tensors["rows"], listed)

    def read_shards(self, key: CacheKey, index: Index) -> list[Shard]:
        """Verify and return the shards that the index lists; errors as of `read_shard`."""
        shards = []
        for name, sha256 in index.shards:
            if not (self.folder / name).is_dir():
                raise CheckpointCorruptError(f"{self.folder / name} is missing.")
            shard = self.read_shard(name, key)
            if shard.sha256 != sha256:
                raise CheckpointCorruptError(
                    f"{self.folder / name} is not the shard that the index was made for."
                )
            shards.append(shard)
        return shards

    def remove(self, name: str | None = None) -> None:
        """Remove one folder of the store, or all of it."""
        remove_directory(self.folder if name is None else self.folder / name)

    def _manifest(self, name: str, read: Callable[..., Manifest]) -> Manifest:
        folder = self.folder / name
        try:
            return read(folder, format_name=FORMAT)
        except ForeignDirectoryError as error:
            # Without its manifest it is damaged; with anything else in it, it is somebody else's.
            if folder.is_dir() and {*os.listdir(folder)} <= {_ROWS, _INDEX}:
                raise CheckpointCorruptError(f"{folder} lost its manifest.json.") from error
            raise

    def _check(self, manifest: Manifest, key: CacheKey) -> None:
        differences = key.differences(_mapping(manifest, "key"))
        if differences:
            raise CheckpointMismatchError(mismatch_message(manifest.directory, differences))
        if manifest.metadata.get("augmentation_seed") != self.seed:
            raise CheckpointCorruptError(
                f"{manifest.directory} was written for the augmentation seed "
                f"{manifest.metadata.get('augmentation_seed')}, not {self.seed}."
            )


def stores_in(directory: Path) -> list[SeedStore]:
    """Return the stores of all augmentation seeds that have a folder, by seed."""
    names = os.listdir(directory) if directory.is_dir() else []
    seeds = [name.removeprefix(_SEED) for name in names if name.startswith(_SEED)]
    return [SeedStore(directory, seed) for seed in sorted(map(int, filter(_is_integer, seeds)))]


def size_of(directory: Path) -> int:
    """Return the bytes of all files of a cache."""
    return sum(map(size_of_store, stores_in(directory)))


def size_of_store(store: SeedStore) -> int:
    """Return the bytes of all files of one augmentation seed."""
    return sum(path.stat().st_size for path in store.folder.rglob("*") if path.is_file())


def mismatch_message(place: Path, differences: str) -> str:
    """Return the message about outputs that belong to something else."""
    return (
        f"the teacher cache {place} holds outputs of something else: {differences}. Open it as it "
        "was built, use another directory, or replace it with build(..., overwrite=True)."
    )


def _mapped(path: Path) -> dict[str, Tensor]:
    try:
        # safetensors maps files for the CPU; pages are read when rows are.
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointCorruptError(f"{path} cannot be read: {error}") from error


def _mapping(manifest: Manifest, name: str) -> Mapping[str, Any]:
    value = manifest.metadata.get(name)
    if not isinstance(value, dict):
        raise CheckpointCorruptError(f"{manifest.directory}: its manifest lacks {name!r}.")
    return value


def _is_integer(text: str) -> bool:
    return text.removeprefix("-").isascii() and text.removeprefix("-").isdigit()
