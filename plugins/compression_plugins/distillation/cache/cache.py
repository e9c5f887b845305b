"""A cache of a teacher's outputs: built once, then read in every step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compression_manager.configuration.checks import (
    as_path,
    require_integer,
    require_type,
    require_writable_folder,
)
from compression_manager.errors import CheckpointMismatchError
from compression_manager.models.calling import quiet_evaluation
from compression_manager.tracking.batches import number_of_batches, undisturbed
from compression_plugins.distillation.cache.batch_reader import BatchReader
from compression_plugins.distillation.cache.budget import check_budget, expected_samples
from compression_plugins.distillation.cache.building import Builder
from compression_plugins.distillation.cache.distortion import CacheDistortion, compare
from compression_plugins.distillation.cache.encoding import OWNER, Encoding
from compression_plugins.distillation.cache.key import CacheKey
from compression_plugins.distillation.cache.lookup import CachedRows, as_sample_ids
from compression_plugins.distillation.cache.opening import finished_seeds, open_rows, rows_of
from compression_plugins.distillation.cache.ownership import (
    key_of,
    only_builder,
    stores_of_others,
)
from compression_plugins.distillation.cache.progress import progress_bar
from compression_plugins.distillation.cache.store import (
    SeedStore,
    mismatch_message,
    size_of,
    size_of_store,
)
from compression_plugins.distillation.teachers.teacher import weights_hash

TeacherForward = Callable[[nn.Module, Any], Any]


class TeacherCache:
    """A teacher's logits on disk, by sample id and augmentation seed.

    With `top_k` the k largest logits of each prediction are kept with their classes, and the
    mass of the others as one number: `lookup` gives each of them the logit log(mean(exp(z))) over
    what was left out, z being its logits. At temperature 1 the softmax then has the teacher's
    probabilities for the kept classes, and the teacher's total for the others. Above it, evenly
    spread logits make the total of the others too large (below it, too small), because their
    differences are gone; `distortion` tells by how much the loss changes.

    'int8' has 256 steps from the smallest to the largest logit of each prediction. In float32 with
    all classes the logits of a float32, float16 or bfloat16 teacher come back bit for bit.

    A cache holds outputs of one teacher, with one preprocessing and one encoding, for any number
    of augmentation seeds. Outputs are memory-mapped: rows are read when they are looked up. The
    SHA-256 of every file is checked when a seed is first used, and not later, so that no training
    step waits for it.

    Args:
        directory: a folder of its own; created by `build`.
        top_k: logits to keep of each prediction, fewer than there are classes; None: all.
        dtype: of the kept logits: 'float32', 'float16' or 'int8'.
        preprocessing: your name for everything that happens to a sample before the teacher sees
            it, for example "resize-224"; change it whenever that changes.
        byte_budget: most bytes for the whole cache; None: no limit.
        shard_size: samples per file, at least; also what an interrupted build loses at most.

    Raises:
        ConfigError: an option of a wrong type or out of range.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        top_k: int | None = None,
        dtype: str = "float32",
        preprocessing: str = "",
        byte_budget: int | None = None,
        shard_size: int = 16384,
    ) -> None:
        self.directory = as_path(OWNER, directory)
        self.encoding = Encoding(top_k, dtype)
        require_type(OWNER, "preprocessing", preprocessing, str)
        if byte_budget is not None:
            require_integer(OWNER, "byte_budget", byte_budget, minimum=1)
        require_integer(OWNER, "shard_size", shard_size, minimum=1)
        self.preprocessing = preprocessing
        self.byte_budget = byte_budget
        self.shard_size = shard_size
        self._opened: dict[int, CachedRows] = {}

    @property
    def teacher_sha256(self) -> str:
        """SHA-256 of the weights of the teacher whose outputs these are.

        Raises:
            CheckpointError: nothing was built yet.
        """
        return key_of(self.directory, self.preprocessing, self.encoding).teacher_sha256

    @property
    def size_bytes(self) -> int:
        """Bytes of all files, unfinished builds included."""
        return size_of(self.directory)

    @property
    def augmentation_seeds(self) -> list[int]:
        """The augmentation seeds whose build has finished, sorted."""
        return finished_seeds(self.directory)

    def sample_shape(self, augmentation_seed: int = 0) -> tuple[int, ...]:
        """Return the shape (*, classes) of one output; errors as of `verify`."""
        return self._rows(augmentation_seed).shape

    def build(
        self,
        teacher: nn.Module,
        loader: Iterable[Any],
        *,
        augmentation_seed: int = 0,
        inputs_of: Callable[[Any], Any] | None = None,
        ids_of: Callable[[Any], Any] | None = None,
        teacher_forward: TeacherForward | None = None,
        teacher_output: str | int | None = None,
        overwrite: bool = False,
    ) -> None:
        """Store the teacher's outputs for every sample of `loader`; skip what is there.

        The teacher runs in eval mode without gradients; its modes, the random state and the
        loader's own generators are left as found. Killed at any moment, it goes on with the next
        call; damaged files are built again. Only batches with an id that is missing reach the
        teacher, and the loader is not gone through when its number of samples and its first batch
        show that all are there. One build at a time: another one is refused.

        Args:
            teacher: the trained teacher; inputs are moved to its device.
            loader: yields `(inputs, targets, sample_ids)`, or mappings with "sample_ids", as a
                DataLoader over an `IndexedDataset` does. All outputs must have one shape.
            augmentation_seed: what the random augmentation of these inputs follows from.
            inputs_of: a batch -> what the teacher is called with (a mapping: by keyword without
                labels, a tuple: by position), for other batches.
            ids_of: a batch -> integer tensor (batch,), for other batches.
            teacher_forward: `teacher_forward(teacher, inputs)`; default: as the loop calls it.
            teacher_output: key or index of the logits in the teacher's output; default: found.
            overwrite: remove what the directory holds of another teacher, preprocessing or
                encoding instead of raising.

        Raises:
            ConfigError: the estimate exceeds the byte budget (before anything is written);
                outputs that are not finite or differ in shape; an id that comes twice with
                different outputs; a batch of another form.
            CheckpointMismatchError: the directory holds something else's outputs.
            CheckpointError: the directory cannot be written, or another build is running.
        """
        require_integer(f"{OWNER}.build", "augmentation_seed", augmentation_seed)
        require_type(f"{OWNER}.build", "teacher", teacher, nn.Module)
        require_writable_folder(self.directory)
        key = CacheKey.of(weights_hash(teacher), self.preprocessing, self.encoding)
        reader = BatchReader(teacher, inputs_of, ids_of, teacher_forward, teacher_output)
        samples = number_of_batches(getattr(loader, "dataset", None), None)
        with only_builder(self.directory), quiet_evaluation(teacher), undisturbed(loader):
            stale = stores_of_others(self.directory, key, allowed=overwrite)
            if stale:
                # Nothing is removed for a call that fails at once.
                self._try_first_batch(loader, reader, sum(map(size_of_store, stale)))
                for store in stale:
                    store.remove()
            self._opened.clear()
            store = SeedStore(self.directory, augmentation_seed)
            builder = Builder(store, key, self.encoding, self.shard_size, self._check_room)
            self._fill(builder, loader, reader, samples)
            index, shards = builder.finish()
        self._opened[augmentation_seed] = rows_of(
            self.directory, augmentation_seed, index, shards, self.encoding
        )

    def lookup(
        self,
        sample_ids: Tensor,
        *,
        augmentation_seed: int = 0,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Return the float32 logits (batch, *, classes) of `sample_ids`.

        Args:
            sample_ids: (batch,) integers, best on the CPU, where the cache is.
            augmentation_seed: with which the samples were augmented.
            device: of the result; default: that of `sample_ids`.

        Raises:
            ConfigError: an id is not cached.
            CheckpointError: as of `verify`, in the first call for a seed.
        """
        ids = as_sample_ids(sample_ids, where="lookup")
        rows = self._opened.get(augmentation_seed) or self._rows(augmentation_seed)
        target = ids.device if device is None else torch.device(device)
        return rows.lookup(ids.cpu(), target)

    def verify(self, augmentation_seed: int = 0) -> None:
        """Check every byte of one augmentation seed, and read what is there now from here on.

        Raises:
            CheckpointCorruptError: a file is missing or damaged.
            CheckpointMismatchError: it was built with another preprocessing or encoding.
            CheckpointError: it was not built, or its build has not finished.
        """
        self._opened.pop(augmentation_seed, None)
        self._rows(augmentation_seed)

    def check(self, teacher: nn.Module) -> None:
        """Refuse a teacher other than the one whose outputs these are.

        Another process may have built them anew: files are opened and verified again from here on.

        Raises:
            CheckpointMismatchError: its weights are others.
            CheckpointError: as of `verify`.
        """
        self._opened.clear()
        own = weights_hash(teacher)
        if own != self.teacher_sha256:
            raise CheckpointMismatchError(
                mismatch_message(
                    self.directory, f"teacher_sha256 is {self.teacher_sha256!r}, here {own!r}"
                )
            )

    def distortion(
        self,
        student: Tensor,
        live: Tensor,
        sample_ids: Tensor,
        *,
        temperature: float = 1.0,
        augmentation_seed: int = 0,
    ) -> CacheDistortion:
        """Return what the cached form changes in the distillation loss of a batch.

        Args:
            student: (batch, *, classes) logits of the student for these samples.
            live: the same shape, logits of the teacher in eval mode.
            sample_ids: (batch,) their ids.
            temperature: of `kd_loss`.
            augmentation_seed: with which the samples were augmented.

        Raises:
            ConfigError: shapes that differ, or an id that is not cached.
        """
        cached = self.lookup(sample_ids, augmentation_seed=augmentation_seed)
        return compare(student, live, cached, temperature)

    def _fill(
        self, builder: Builder, loader: Iterable[Any], reader: BatchReader, samples: int | None
    ) -> None:
        room_checked = False
        with progress_bar(loader) as batches:
            for batch in batches:
                ids = reader.ids(batch)
                if builder.needs(ids):
                    logits = reader.logits(batch)
                    if not room_checked:
                        rows = max(expected_samples(loader, len(ids)) - len(builder), 1)
                        self._check_room(rows, tuple(logits.shape[1:]))
                        room_checked = True
                    builder.add(ids, logits)
                elif builder.finished and len(builder) == samples:
                    break

    def _try_first_batch(self, loader: Iterable[Any], reader: BatchReader, freed: int) -> None:
        for batch in loader:
            count, logits = len(reader.ids(batch)), reader.logits(batch)
            self.encoding.encode(logits)
            rows = expected_samples(loader, count)
            self._check_room(rows, tuple(logits.shape[1:]), freed=freed)
            return

    def _rows(self, seed: int) -> CachedRows:
        if seed not in self._opened:
            self._opened[seed] = open_rows(self.directory, seed, self.preprocessing, self.encoding)
        return self._opened[seed]

    def _check_room(self, rows: int, shape: tuple[int, ...], *, freed: int = 0) -> None:
        if self.byte_budget is not None:
            used = self.size_bytes - freed
            check_budget(self.byte_budget, used, rows, shape, self.encoding, self.shard_size)
