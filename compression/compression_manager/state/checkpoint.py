"""A checkpoint: a directory with tensors, JSON and a manifest, holding a whole training state."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from compression_manager.errors import (
    CheckpointCorruptError,
    CheckpointError,
    ConfigError,
    ForeignDirectoryError,
)
from compression_manager.state.directory import atomic_directory
from compression_manager.state.files import is_temporary
from compression_manager.state.index import INDEX_NAME, read_index
from compression_manager.state.manifest import (
    MANIFEST_NAME,
    Manifest,
    locate,
    original_name,
    parse_json,
    read_manifest,
    verify_directory,
)
from compression_manager.state.tree import flatten, unflatten

CHECKPOINT_FORMAT = "compression_manager.checkpoint"
_TENSORS_NAME = "tensors.safetensors"
_STATE_NAME = "state.json"


def write_checkpoint(
    directory: str | os.PathLike[str],
    state: Mapping[str, Any],
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write a state so that a crash at any moment leaves the older checkpoint or this one.

    Args:
        directory: the checkpoint's own directory; an older checkpoint there is replaced.
        state: nested values as `compression_manager.state.tree.flatten` takes them.
        metadata: JSON values for people and tools; `global_step` lets `find_checkpoint` tell
            which of several is the newest.

    Raises:
        CheckpointError: the state holds something that cannot be stored (the message gives
            its key path), the directory holds something else, or it cannot be written.
    """
    document, tensors = flatten(dict(state))
    with atomic_directory(
        Path(directory), format_name=CHECKPOINT_FORMAT, metadata=metadata
    ) as folder:
        safetensors.torch.save_file(tensors, folder / _TENSORS_NAME)
        content = json.dumps(document, allow_nan=False)
        (folder / _STATE_NAME).write_text(content + "\n", encoding="utf-8")


def read_checkpoint(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the state that `write_checkpoint` wrote, after checking every byte of it.

    Tensors are on the CPU and own their memory.

    Raises:
        CheckpointCorruptError: a file is missing or damaged; the message names it.
        CheckpointError: there is no checkpoint at `directory`.
    """
    manifest = verify_directory(Path(directory), format_name=CHECKPOINT_FORMAT)
    path = manifest.path(_STATE_NAME)
    tensors = _read_tensors(manifest.path(_TENSORS_NAME))
    try:
        state = unflatten(parse_json(path.read_bytes(), path), tensors)
    except CheckpointCorruptError as error:
        raise CheckpointCorruptError(f"{path}: {error}") from error
    except ImportError as error:
        raise CheckpointError(f"{path} holds NumPy values; install numpy: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointCorruptError(f"{path} holds a {type(state).__name__}, not a dict.")
    return state


def find_checkpoint(
    directory: str | os.PathLike[str], which: Literal["latest", "best"] = "latest"
) -> Path:
    """Return the checkpoint that `directory` means.

    Args:
        directory: one checkpoint, which is returned as it is; or a folder that holds several.
        which: of several, the one with the most optimizer steps ("latest"), or the one that
            the checkpoint plugin's index calls best ("best").

    Raises:
        CheckpointCorruptError: a manifest or the index is damaged.
        CheckpointError: there is no checkpoint.
        ConfigError: `which` is something else.
    """
    if which not in {"latest", "best"}:
        raise ConfigError(f"which={which!r} is unknown. Valid: 'best', 'latest'.")
    root = locate(Path(directory))
    if not root.is_dir() or os.path.lexists(root / MANIFEST_NAME):
        return read_manifest(root, format_name=CHECKPOINT_FORMAT).directory
    return _best(root) if which == "best" else _latest(root)


def list_checkpoints(root: Path) -> list[Manifest]:
    """Return the manifests of the checkpoints in a folder, fewest optimizer steps first.

    Other things in the folder, and temporaries that a killed process left, are ignored.

    Raises:
        CheckpointCorruptError: a manifest is damaged.
    """
    return sorted(_manifests(root), key=_global_step)


def candidates(root: Path) -> list[Path]:
    """Return what in a folder may be a checkpoint, by name; temporaries are left out.

    Raises:
        CheckpointError: the folder cannot be read.
    """
    try:
        names = {original_name(name) for name in os.listdir(root) if not is_temporary(name)}
    except OSError as error:
        raise CheckpointError(f"cannot read {root}: {error}") from error
    return [root / name for name in sorted(names)]


def check_newest_is_there(root: Path, found: list[Manifest]) -> None:
    """Raise if the index lists a newer checkpoint than those found: it was damaged or deleted."""
    if not os.path.lexists(root / INDEX_NAME):
        return
    newest = max(read_index(root), key=lambda entry: entry.global_step, default=None)
    steps = [_global_step(manifest) for manifest in found]
    if newest is not None and newest.global_step > max(steps, default=-1):
        older = (
            f" To continue from an older one, resume from {found[-1].directory}." if found else ""
        )
        raise CheckpointCorruptError(
            f"{root / newest.name} is the newest checkpoint that {INDEX_NAME} lists, but it is "
            f"missing or has no {MANIFEST_NAME}.{older}"
        )


def _latest(root: Path) -> Path:
    found = list_checkpoints(root)
    check_newest_is_there(root, found)
    if not found:
        names = sorted(os.listdir(root))[:8]
        raise CheckpointError(
            f"{root} holds no checkpoint; it holds {', '.join(names) or 'nothing'}. Expected a "
            f"checkpoint (a directory with {MANIFEST_NAME}) or a folder of several."
        )
    return found[-1].directory


def _best(root: Path) -> Path:
    for entry in read_index(root):
        if entry.best:
            return read_manifest(root / entry.name, format_name=CHECKPOINT_FORMAT).directory
    raise CheckpointError(
        f"{root / INDEX_NAME} calls no checkpoint the best: the checkpoint plugin needs the "
        "option metric, and an evaluation that records it."
    )


def _manifests(root: Path) -> list[Manifest]:
    manifests = []
    for path in candidates(root):
        with contextlib.suppress(ForeignDirectoryError):
            manifests.append(read_manifest(path, format_name=CHECKPOINT_FORMAT))
    return manifests


def _global_step(manifest: Manifest) -> int:
    step = manifest.metadata.get("global_step")
    if type(step) is not int:
        raise CheckpointCorruptError(
            f"{manifest.directory / MANIFEST_NAME} records no global_step, so it cannot be "
            "compared with others; name one checkpoint."
        )
    return step


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        # Copies, because the mapped file may go away, and memory that torch allocates is
        # aligned as in the run that saved.
        return {k: v.clone() for k, v in safetensors.torch.load_file(path).items()}
    except (SafetensorError, RuntimeError, ValueError, KeyError, OSError) as error:
        raise CheckpointCorruptError(f"{path} is damaged: {error}") from error
