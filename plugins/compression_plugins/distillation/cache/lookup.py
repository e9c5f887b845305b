"""Finding rows by sample id; part of every training step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from compression_manager.errors import CheckpointCorruptError, ConfigError
from compression_plugins.distillation.cache.encoding import OWNER, Encoding
from compression_plugins.distillation.cache.store import Index, Shard


class CachedRows:
    """The complete outputs of one augmentation seed.

    Args:
        index: where each output lies.
        shards: those of the index, at least one.
        encoding: how they were stored.
        where: what they are, for messages.

    Raises:
        CheckpointCorruptError: index and shards do not fit together.
    """

    def __init__(
        self, index: Index, shards: Sequence[Shard], encoding: Encoding, where: str
    ) -> None:
        count = sum(len(shard.ids) for shard in shards)
        fits = index.ids.shape == index.rows.shape == (count,) and count > 0
        if not fits or len({shard.shape for shard in shards}) != 1:
            raise CheckpointCorruptError(f"{where}: index and shards do not fit together.")
        self._ids, self._rows, self._encoding, self._where = index.ids, index.rows, encoding, where
        self._parts = [shard.parts for shard in shards]
        self._ends = torch.tensor([len(shard.ids) for shard in shards]).cumsum(0)
        self.shape = shards[0].shape

    def __len__(self) -> int:
        return len(self._ids)

    def lookup(self, sample_ids: Tensor, device: torch.device) -> Tensor:
        """Return the float32 logits (batch, *, classes) of `sample_ids`.

        Args:
            sample_ids: (batch,) int64 on the CPU.
            device: of the result; the stored form is moved, and decoded there.

        Raises:
            ConfigError: an id is not there.
        """
        places = self._places(sample_ids)
        found = self._ids.index_select(0, places)
        if not torch.equal(found, sample_ids):
            missing = sample_ids[found != sample_ids].tolist()
            more = f" and {len(missing) - 1} more of the batch" if len(missing) > 1 else ""
            raise ConfigError(
                f"{self._where} holds no output for the sample id {missing[0]}{more}; it holds "
                f"{len(self)} samples, ids {int(self._ids[0])} to {int(self._ids[-1])}. Call "
                "cache.build with a loader that yields the missing ones."
            )
        parts = self._gather(self._rows.index_select(0, places))
        if device.type != "cpu":
            parts = {name: part.to(device) for name, part in parts.items()}
        return self._encoding.decode(parts, self.shape[-1])

    def _places(self, sample_ids: Tensor) -> Tensor:
        # An id above all others would be put behind the last one.
        return torch.searchsorted(self._ids, sample_ids).clamp_(max=len(self._ids) - 1)

    def _gather(self, rows: Tensor) -> Mapping[str, Tensor]:
        if len(self._parts) == 1 or len(rows) == 0:
            return {name: part.index_select(0, rows) for name, part in self._parts[0].items()}
        numbers = torch.bucketize(rows, self._ends, right=True)
        # Sorted by shard, so that each is read once.
        order = numbers.argsort()
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        pieces: dict[str, list[Tensor]] = {name: [] for name in self._parts[0]}
        counts = numbers.bincount(minlength=len(self._parts)).tolist()
        sorted_rows, done = rows[order], 0
        for number, count in enumerate(counts):
            if count == 0:
                continue
            own, done = sorted_rows[done : done + count], done + count
            start = int(self._ends[number - 1]) if number else 0
            for name, part in self._parts[number].items():
                pieces[name].append(part.index_select(0, own - start))
        return {name: torch.cat(parts).index_select(0, back) for name, parts in pieces.items()}


def as_sample_ids(value: object, *, where: str) -> Tensor:
    """Return `value` as int64 (batch,) on its device.

    Raises:
        ConfigError: it is no one-dimensional integer tensor.
    """
    integers = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
    if not isinstance(value, Tensor) or value.dim() != 1 or value.dtype not in integers:
        what = type(value).__name__
        if isinstance(value, Tensor):
            what = f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
        raise ConfigError(
            f"{OWNER}.{where} takes sample ids as an integer tensor (batch,), got {what}."
        )
    return value.long()
