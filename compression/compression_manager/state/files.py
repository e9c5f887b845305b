"""Files and folders that survive a kill or a power failure: sync, temporaries, replacement."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from compression_manager.errors import CheckpointError

if sys.platform != "win32":
    import fcntl

_TEMPORARY = re.compile(r"\..+\.tmp-[0-9a-f]{16}")

# Descriptors of `exclusive`.
_exclusive: set[int] = set()


def _let_go_in_child() -> None:
    # A lock outlives its process as long as a forked one, such as a loader's worker, shares it.
    for descriptor in _exclusive:
        os.close(descriptor)
    _exclusive.clear()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_let_go_in_child)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what a full disk or missing permission raises into a CheckpointError.

    A full disk surfaces as OSError from Python, SafetensorError or RuntimeError from the
    libraries that write tensors.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error


def temporary_path(target: Path) -> Path:
    """Return a fresh hidden name beside `target`, on the same file system."""
    return target.with_name(f".{target.name}.tmp-{secrets.token_hex(8)}")


def is_temporary(name: str) -> bool:
    """Return whether `name` is one that `temporary_path` gives."""
    return _TEMPORARY.fullmatch(name) is not None


def sync(path: Path) -> None:
    """Force a file, or the entries of a folder, to the disk."""
    if sys.platform == "win32" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def temporary(target: Path, create: Callable[[Path], object]) -> Iterator[Path]:
    """Create a temporary beside `target`, and remove what is left of it in the end.

    It is held until then: the system releases the hold when the process ends, however it
    ends, so that `remove_abandoned` can tell a killed process's temporary from one in use.

    Args:
        target: what the body renames the temporary to.
        create: makes the file or folder.
    """
    path, descriptor = _create_and_hold(target, create)
    try:
        yield path
    finally:
        discard(path)
        if descriptor is not None:
            os.close(descriptor)


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold `folder`, created if need be, until the block or the process ends, however it ends.

    What was created here and is empty in the end is removed again. Where the system or the file
    system has no locks, nothing is held.

    Raises:
        BlockingIOError: it is held already, here or in another process.
        OSError: it cannot be created.
    """
    target = Path(os.path.realpath(folder))
    created, descriptor = _create_and_lock(target)
    if descriptor is not None:
        _exclusive.add(descriptor)
    process = os.getpid()
    try:
        yield
    finally:
        if process == os.getpid():  # a forked one has let go
            try:
                with contextlib.suppress(OSError):  # it is not empty
                    for path in created:
                        path.rmdir()
            finally:
                if descriptor is not None:
                    _exclusive.discard(descriptor)
                    os.close(descriptor)


def remove_abandoned(folder: Path) -> None:
    """Remove the temporaries in `folder` that killed processes left."""
    for name in os.listdir(folder):
        if is_temporary(name):
            with contextlib.suppress(OSError):
                descriptor = _hold(folder / name)
                if descriptor is not None:
                    discard(folder / name)
                    os.close(descriptor)


def _create_and_hold(target: Path, create: Callable[[Path], object]) -> tuple[Path, int | None]:
    while True:
        path = temporary_path(target)
        create(path)
        try:
            descriptor = _hold(path)
        except (BlockingIOError, FileNotFoundError):
            continue  # another process took it for abandoned before it was held
        except OSError:
            return path, None  # no locks here: left-overs stay until removed by hand
        if path.exists():
            return path, descriptor
        if descriptor is not None:
            os.close(descriptor)


def _create_and_lock(target: Path) -> tuple[list[Path], int | None]:
    """Return the folders that were created, innermost first, and the descriptor of the lock."""
    created = [path for path in (target, *target.parents) if not path.exists()]
    while True:
        make_folder(target)
        try:
            descriptor = _hold(target)
        except BlockingIOError:
            raise
        except FileNotFoundError:
            continue  # who held it before removed it
        except OSError:
            return created, None
        if descriptor is None:
            return created, None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), target.stat()):
                return created, descriptor
        os.close(descriptor)


def _hold(path: Path) -> int | None:
    """Return a descriptor that holds `path`; None where the system has no locks.

    Raises:
        OSError: another process holds it, it is gone, or the file system has no locks.
    """
    if sys.platform == "win32":
        return None
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def discard(path: Path) -> None:
    """Remove a temporary file or folder, whatever is left of it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_directory(path: Path) -> None:
    """Remove a folder so that a kill leaves it whole or gone, never half there."""
    hidden = temporary_path(path)
    os.rename(path, hidden)
    sync(path.parent)
    discard(hidden)


def make_folder(path: Path) -> None:
    """Create `path` and its missing parents, and force their entries to the disk."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)


def is_regular_file(path: Path) -> bool:
    """Return whether `path` is a file and not a link, folder, pipe or device."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def write_file(path: Path, content: str) -> None:
    """Write a text file whole or not at all, replacing an older one.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written.
    """
    with writing(path):
        make_folder(path.parent)
        remove_abandoned(path.parent)
        with temporary(path, Path.touch) as draft:
            draft.write_text(content, encoding="utf-8")
            sync(draft)
            os.replace(draft, path)
            sync(path.parent)
