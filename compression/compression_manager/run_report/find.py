"""Which files in a folder are those of one training run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compression_manager.errors import CheckpointError, ForeignDirectoryError
from compression_manager.run_report.event_files import holds_events
from compression_manager.state import CHECKPOINT_FORMAT, find_checkpoint, list_checkpoints
from compression_manager.state.manifest import (
    MANIFEST_NAME,
    Manifest,
    read_manifest,
)

# Folders below the one that the user names.
_DEPTH = 3


@dataclass(frozen=True)
class Found:
    """What lies in a run's folder.

    Attributes:
        checkpoints: manifests, fewest optimizer steps first; empty if there are none.
        events: folders with event files.
    """

    checkpoints: tuple[Manifest, ...]
    events: tuple[Path, ...]


def find_run(folder: Path) -> Found:
    """Look for the checkpoints and event files of one run, up to three folders deep.

    Args:
        folder: a run's folder, a folder of checkpoints, one checkpoint, or a folder of event
            files.

    Raises:
        CheckpointError: there is neither, or there are checkpoints of several runs.
        CheckpointCorruptError: a manifest is damaged.
    """
    if not folder.is_dir():
        what = "is a file" if os.path.lexists(folder) else "does not exist"
        raise CheckpointError(f"{folder} {what}; expected the folder of a training run.")
    if os.path.lexists(folder / MANIFEST_NAME):
        manifest = read_manifest(find_checkpoint(folder), format_name=CHECKPOINT_FORMAT)
        return Found((manifest,), ())
    groups, events = [], []
    for current in _folders(folder):
        if any(_is_checkpoint(child) for child in _children(current)):
            groups.append(current)
        if holds_events(current):
            events.append(current)
    if len(groups) > 1:
        raise CheckpointError(
            f"{folder} holds checkpoints of several runs, in {_listed(groups)}; name one."
        )
    if not groups and not events:
        names = sorted(os.listdir(folder))[:8]
        raise CheckpointError(
            f"{folder} holds no run; it holds {', '.join(names) or 'nothing'}. Looked, up to "
            f"{_DEPTH} folders deep, for checkpoints (directories with {MANIFEST_NAME}, which the "
            "checkpoint plugin writes) and for TensorBoard's event files (*.tfevents.*)."
        )
    # Raises if the newest one is missing.
    for group in groups:
        find_checkpoint(group)
    checkpoints = tuple(list_checkpoints(groups[0])) if groups else ()
    return Found(checkpoints, tuple(events))


def choose_events(
    folder: Path, events: Sequence[Path], recipe: Mapping[str, Any] | None
) -> Path | None:
    """Return which folder of event files belongs to the run; None if there is none.

    Args:
        folder: what the user named, for messages.
        events: folders with event files.
        recipe: that of the checkpoint, whose plugins name the folders that they write to; None
            without a checkpoint.

    Raises:
        CheckpointError: there are several, or none is what the recipe names.
    """
    if recipe is None:
        belonging = list(events)
    else:
        names = set(_written_names(recipe))
        belonging = [path for path in events if path.resolve().name in names]
        if events and not belonging:
            raise CheckpointError(
                f"{folder} holds parts of several runs: no plugin of the checkpoint's recipe "
                f"writes to a folder named like {_listed(events)}. Name one run's folder."
            )
    if len(belonging) > 1:
        raise CheckpointError(
            f"{folder} holds event files of several runs, in {_listed(belonging)}; name one."
        )
    return belonging[0] if belonging else None


def _written_names(recipe: Mapping[str, Any]) -> Iterable[str]:
    """Yield the last part of every folder that a plugin of the recipe writes to."""
    for options in recipe.get("plugins", {}).values():
        if isinstance(options.get("directory"), str):
            yield Path(options["directory"]).resolve().name


def _folders(root: Path) -> list[Path]:
    """Return `root` and visible folders below it, checkpoints left out."""
    found, level = [root], [root]
    for _ in range(_DEPTH):
        level = [
            child
            for parent in level
            for child in _children(parent)
            if not child.name.startswith(".") and not os.path.lexists(child / MANIFEST_NAME)
        ]
        found += level
    return found


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError as error:
        raise CheckpointError(f"cannot read {folder}: {error}") from error


def _is_checkpoint(path: Path) -> bool:
    if not os.path.lexists(path / MANIFEST_NAME):
        return False
    try:
        read_manifest(path, format_name=CHECKPOINT_FORMAT)
    except ForeignDirectoryError:
        return False
    except CheckpointError:
        return True  # a damaged one, which is reported where it is read
    return True


def _listed(paths: Iterable[Path]) -> str:
    return ", ".join(map(str, paths))
