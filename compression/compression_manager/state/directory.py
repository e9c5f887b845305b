"""Directories that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from compression_manager.errors import CheckpointError
from compression_manager.state.files import (
    make_folder,
    remove_abandoned,
    remove_directory,
    sync,
    temporary,
    writing,
)
from compression_manager.state.manifest import (
    MANIFEST_NAME,
    Manifest,
    backup_path,
    original_name,
    read_manifest,
    verify_directory,
    write_manifest,
)

Content = TypeVar("Content")

# Of a directory that is replaced while it is read; seconds between two.
_ATTEMPTS = 20
_PAUSE = 0.05


@contextlib.contextmanager
def atomic_directory(
    final: Path,
    *,
    format_name: str,
    version: int = 1,
    metadata: Mapping[str, Any] | None = None,
) -> Iterator[Path]:
    """Yield a temporary folder to write files into; it becomes `final` when the body ends.

    Then the manifest is written, every file is forced to the disk and the folder renamed. A
    kill or power failure at any moment leaves the older directory or the new one, readable
    through `verify_directory(final)`. If the body raises, the older one stays as it was.

    Args:
        final: the directory to create. An existing one is replaced only if it is empty or
            holds nothing but what this function wrote with the same `format_name`.
        format_name: what kind of directory it is, for example
            "compression_manager.checkpoint".
        version: version of that format.
        metadata: JSON values (no NaN or infinity) for the manifest, for people and tools.

    Raises:
        CheckpointError: `final` is something else that must not be replaced; or it cannot be
            written (the disk is full, permission is missing).
    """
    target = Path(os.path.realpath(final))
    if target == Path.cwd():
        raise CheckpointError(
            f"{final} is the working directory, which cannot be replaced under a running program; "
            "name a folder within it."
        )
    with writing(target):
        _recover(target, format_name, version)
        _refuse_foreign(target, format_name, version)
        make_folder(target.parent)
        remove_abandoned(target.parent)
        _remove_replaced(target.parent, format_name, version)
        with temporary(target, Path.mkdir) as draft:
            yield draft
            write_manifest(draft, format_name=format_name, version=version, metadata=metadata or {})
            for path in draft.iterdir():
                sync(path)
            sync(draft)
            _replace(draft, target)


def read_directory(
    path: Path, read: Callable[[Manifest], Content], *, format_name: str, version: int = 1
) -> Content:
    """Return what `read` makes of a verified directory, all of it from one version.

    Another process may replace the directory meanwhile; it is read again then.

    Args:
        path: as for `verify_directory`, with `format_name` and `version`.
        read: opens the files of the manifest.

    Raises:
        CheckpointError: as `verify_directory`; or it is replaced faster than it is read.
    """
    for _ in range(_ATTEMPTS):
        before = _identity(path)
        try:
            content = read(verify_directory(path, format_name=format_name, version=version))
        # Of a missing file, safetensors says RuntimeError.
        except (CheckpointError, OSError, RuntimeError, SafetensorError):
            if _identity(path) == before:
                raise
        else:
            if _identity(path) == before:
                return content
        time.sleep(_PAUSE)
    raise CheckpointError(f"{path} is replaced again and again while it is read.")


def _identity(path: Path) -> list[tuple[int, ...] | None]:
    """Return what no other version has: of the directory, and of one that is being replaced."""
    target = Path(os.path.realpath(path))
    found: list[tuple[int, ...] | None] = []
    for place in (target, backup_path(target) if target.name else target):
        try:
            state = os.stat(place)
        except OSError:
            found.append(None)
        else:
            found.append((state.st_dev, state.st_ino, state.st_mtime_ns))
    return found


def _replace(draft: Path, target: Path) -> None:
    """Rename `draft` to `target`; an older target keeps a recoverable name meanwhile."""
    backup = backup_path(target)
    replacing = target.exists()
    if replacing:
        os.rename(target, backup)
    try:
        os.rename(draft, target)
    except OSError:
        if replacing:
            os.rename(backup, target)
        raise
    sync(target.parent)
    if replacing:
        with contextlib.suppress(FileNotFoundError):  # another process's write removed it
            remove_directory(backup)


def _remove_replaced(folder: Path, format_name: str, version: int) -> None:
    """Remove older versions that a process, killed right after replacing them, left."""
    for name in os.listdir(folder):
        if original_name(name) != name and (folder / original_name(name)).exists():
            with contextlib.suppress(CheckpointError, FileNotFoundError):
                read_manifest(folder / name, format_name=format_name, version=version)
                remove_directory(folder / name)


def _recover(target: Path, format_name: str, version: int) -> None:
    """Finish or undo a replacement during which a process was killed."""
    backup = backup_path(target)
    if not os.path.lexists(backup):
        return
    _refuse_foreign(backup, format_name, version)
    if target.exists():
        remove_directory(backup)
    else:
        os.rename(backup, target)


def _refuse_foreign(target: Path, format_name: str, version: int) -> None:
    """Refuse to replace anything that is not wholly ours.

    Raises:
        CheckpointError: `target` is a file, or a folder with other things in it.
    """
    if not target.name:
        raise CheckpointError(f"{target} cannot be replaced; name a directory inside it.")
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise CheckpointError(f"{target} is a file; expected a directory, or nothing there yet.")
    present = set(os.listdir(target))
    if not present:
        return
    try:
        manifest = read_manifest(target, format_name=format_name, version=version)
    except CheckpointError as error:
        raise CheckpointError(
            f"{target} is not replaced, because it was not written here or is damaged: {error} "
            "Choose another directory or remove it."
        ) from error
    others = sorted(present - {MANIFEST_NAME} - manifest.files.keys())
    if others:
        raise CheckpointError(
            f"{target} is not replaced, because it also holds {', '.join(others)}. Move these "
            "or choose another directory."
        )
