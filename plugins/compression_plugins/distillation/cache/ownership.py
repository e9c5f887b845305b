"""Whose outputs a cache's folder holds, and who builds it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from compression_manager.errors import CheckpointError, CheckpointMismatchError
from compression_manager.state.files import exclusive, remove_abandoned, writing
from compression_plugins.distillation.cache.encoding import Encoding
from compression_plugins.distillation.cache.key import CacheKey
from compression_plugins.distillation.cache.store import SeedStore, mismatch_message, stores_in


@contextmanager
def only_builder(directory: Path) -> Iterator[None]:
    """Keep other builds out of a cache's folder until the block or the process ends.

    Raises:
        CheckpointError: another build is running, or the folder cannot be created.
    """
    with ExitStack() as until_built:
        with writing(directory):
            try:
                until_built.enter_context(exclusive(directory))
            except BlockingIOError:
                raise CheckpointError(
                    f"the teacher cache {directory} is being built already, by another process or "
                    "in this one. Wait until that build has finished; of several ranks let one "
                    "build, and the others wait for it."
                ) from None
        yield


def key_of(directory: Path, preprocessing: str, encoding: Encoding) -> CacheKey:
    """Return the key of all that is there, finished or not.

    Raises:
        CheckpointMismatchError: preprocessing or encoding is another, or the seeds differ.
        CheckpointError: nothing is there.
    """
    stored = ((store, store.stored_key()) for store in stores_in(directory))
    found = [(store, key) for store, key in stored if key is not None]
    if not found:
        raise CheckpointError(
            f"{directory} holds no outputs of a teacher yet. Call cache.build(teacher, loader)."
        )
    own = CacheKey.of(str(found[0][1].get("teacher_sha256")), preprocessing, encoding)
    for store, key in found:
        if differences := own.differences(key):
            raise CheckpointMismatchError(mismatch_message(store.folder, differences))
    return own


def stores_of_others(directory: Path, key: CacheKey, *, allowed: bool) -> list[SeedStore]:
    """Return the stores, of any augmentation seed, that belong to another key.

    Raises:
        CheckpointMismatchError: there are some, and none is allowed.
    """
    if directory.is_dir():
        remove_abandoned(directory)
    others = []
    for store in stores_in(directory):
        found = store.stored_key()
        differences = "" if found is None else key.differences(found)
        if differences and not allowed:
            raise CheckpointMismatchError(mismatch_message(store.folder, differences))
        if differences:
            others.append(store)
    return others
