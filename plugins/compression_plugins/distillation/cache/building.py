"""Filling a cache: batch by batch into shards, going on where an earlier build stopped."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from compression_manager.errors import CheckpointCorruptError, ConfigError
from compression_plugins.distillation.cache.encoding import OWNER, Encoding
from compression_plugins.distillation.cache.key import CacheKey
from compression_plugins.distillation.cache.store import Index, SeedStore, Shard

# Two outputs of one sample may differ by rounding: other batches, bfloat16, int8.
_SAME = 0.02


class Builder:
    """Takes batches of outputs and writes shards and index; damaged files are removed at once.

    Args:
        store: where to.
        key: what the outputs belong to; everything in `store` must have the same.
        encoding: how they are stored.
        shard_size: rows after which a shard is written; what is not written is lost in a kill.
        check_room: called before anything is written and before each shard with the number of
            rows to come and their shape; raises if they don't fit.
    """

    def __init__(
        self,
        store: SeedStore,
        key: CacheKey,
        encoding: Encoding,
        shard_size: int,
        check_room: Callable[[int, tuple[int, ...]], None],
    ) -> None:
        self._store, self._key, self._encoding = store, key, encoding
        self._shard_size, self._check_room = shard_size, check_room
        self._shards = _sound_shards(store, key)
        self._shape = self._shards[0].shape if self._shards else None
        self._places: dict[int, int] = {}  # id -> row, counted through shards and pending batches
        self._stored: list[tuple[int, Mapping[str, Tensor]]] = []  # first row, tensors
        self._pending: list[tuple[Tensor, dict[str, Tensor]]] = []
        self._passed: set[int] = set()
        self._index = _sound_index(store, key, self._shards)
        for shard in self._shards:
            self._register(shard.ids.tolist(), shard.parts)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def finished(self) -> bool:
        """Whether an earlier build wrote an index of exactly what is there."""
        return self._index is not None

    def needs(self, ids: list[int]) -> bool:
        """Return whether the teacher must run for a batch with these ids.

        It must not if all were stored by an earlier build. An id that this build has seen before
        is computed again and compared.
        """
        fresh = [sample for sample in ids if sample not in self._places]
        repeated = len(set(ids)) < len(ids) or not self._passed.isdisjoint(ids)
        if not fresh and not repeated:
            self._passed.update(ids)
            return False
        return True

    def add(self, ids: list[int], logits: Tensor) -> None:
        """Store the outputs (batch, *, classes) of `ids`; a full shard is written.

        Raises:
            ConfigError: the outputs are not finite or do not fit the others; or an id comes
                twice with different ones.
        """
        logits = logits.detach().cpu()
        self._check_outputs(ids, logits)
        encoded = self._encoding.encode(logits)
        fresh: list[int] = []
        for row, sample in enumerate(ids):
            if sample not in self._places:
                self._places[sample] = len(self._places)
                fresh.append(row)
            elif sample in self._passed:
                self._compare(sample, row, encoded, [ids[number] for number in fresh], fresh)
            self._passed.add(sample)
        if not fresh:
            return
        kept = torch.tensor(fresh)
        parts = {name: part.index_select(0, kept) for name, part in encoded.items()}
        self._pending.append((torch.tensor([ids[row] for row in fresh]), parts))
        self._stored.append((len(self._places) - len(fresh), parts))
        if sum(len(own) for own, _ in self._pending) >= self._shard_size:
            self._flush()

    def finish(self) -> tuple[Index, list[Shard]]:
        """Write what is pending, and the index; return all that is there."""
        if self._pending:
            self._flush()
        if not self._shards:
            raise ConfigError(f"{OWNER}.build got a loader without a batch.")
        if self._index is None:
            ids, rows = torch.cat([shard.ids for shard in self._shards]).sort()
            listed = tuple((shard.name, shard.sha256) for shard in self._shards)
            self._index = Index(ids, rows, listed)
            self._store.write_index(self._key, self._index)
        return self._index, self._shards

    def _flush(self) -> None:
        assert self._shape is not None  # set with the first outputs
        ids = torch.cat([own for own, _ in self._pending])
        names = self._pending[0][1]
        parts = {name: torch.cat([part[name] for _, part in self._pending]) for name in names}
        self._check_room(len(ids), self._shape)
        last = self._store.shard_names()[-1:] or ["shard--1"]
        number = int(last[0].removeprefix("shard-")) + 1
        shard = self._store.write_shard(
            f"shard-{number:08d}", self._key, ids, parts, list(self._shape)
        )
        self._index = None
        del self._stored[len(self._stored) - len(self._pending) :]
        self._pending.clear()
        self._shards.append(shard)
        self._stored.append((len(self._places) - len(ids), shard.parts))

    def _register(self, ids: list[int], parts: Mapping[str, Tensor]) -> None:
        self._stored.append((len(self._places), parts))
        for sample in ids:
            self._places[sample] = len(self._places)

    def _check_outputs(self, ids: list[int], logits: Tensor) -> None:
        if logits.dim() < 2 or len(logits) != len(ids):
            raise ConfigError(
                f"{OWNER}.build got {len(ids)} sample ids, but the teacher's logits have the shape "
                f"{tuple(logits.shape)}; expected ({len(ids)}, *, classes)."
            )
        shape = tuple(logits.shape[1:])
        if self._shape is not None and shape != self._shape:
            raise ConfigError(
                f"{OWNER}.build needs outputs of one shape for all samples; those of the sample id "
                f"{ids[0]} have {shape}, earlier ones {self._shape}. Pad all samples to one length."
            )
        finite = logits.flatten(1).isfinite().all(1)
        if not bool(finite.all()):
            sample = ids[int(finite.logical_not().nonzero()[0])]
            raise ConfigError(
                f"the teacher's logits of the sample id {sample} are not finite; nothing can be "
                "learned from them. Look at this sample and the teacher's dtype."
            )
        self._shape = shape

    def _compare(
        self,
        sample: int,
        row: int,
        encoded: Mapping[str, Tensor],
        own: list[int],
        fresh: list[int],
    ) -> None:
        new = {name: part[row : row + 1] for name, part in encoded.items()}
        if sample in own:  # earlier in the same batch
            first = fresh[own.index(sample)]
            old = {name: part[first : first + 1] for name, part in encoded.items()}
        else:
            place = self._places[sample]
            start, parts = self._stored[
                bisect.bisect_right([start for start, _ in self._stored], place) - 1
            ]
            old = {name: part[place - start : place - start + 1] for name, part in parts.items()}
        decode = self._encoding.decode_values
        difference = (decode(new) - decode(old)).abs().max().item()
        if difference > _SAME * decode(old).abs().max().item():
            raise ConfigError(
                f"the teacher's logits of the sample id {sample}, which the loader yields twice, "
                f"differ by {difference:g}: either two samples share the id, or random "
                "augmentation does not follow from the sample id and the seed (see "
                "IndexedDataset(augmentation_seed=...))."
            )


def _sound_shards(store: SeedStore, key: CacheKey) -> list[Shard]:
    """Return the verified shards; damaged ones are removed, so that they are built again."""
    shards = []
    for name in store.shard_names():
        try:
            shards.append(store.read_shard(name, key))
        except CheckpointCorruptError:
            store.remove(name)
    return shards


def _sound_index(store: SeedStore, key: CacheKey, shards: list[Shard]) -> Index | None:
    """Return the index if it lists exactly these shards; a damaged one is removed."""
    if not store.has_index():
        return None
    try:
        index = store.read_index(key)
    except CheckpointCorruptError:
        store.remove("index")
        return None
    found = tuple((shard.name, shard.sha256) for shard in shards)
    return index if index.shards == found else None
