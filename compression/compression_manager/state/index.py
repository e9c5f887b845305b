"""`index.json` in a folder of checkpoints: which are kept, their metric, and the best one."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compression_manager.errors import CheckpointCorruptError, CheckpointError
from compression_manager.json_values import json_values
from compression_manager.state.files import is_regular_file, write_file
from compression_manager.state.manifest import is_plain_name, parse_json

INDEX_NAME = "index.json"
_FORMAT = "compression_manager.checkpoint_index"
_VERSION = 1


@dataclass(frozen=True)
class IndexEntry:
    """One kept checkpoint.

    Attributes:
        name: its directory inside the folder.
        epoch: the epoch in which it was saved, from 0.
        global_step: optimizer steps completed when it was saved.
        metric: the watched metric at that moment, or None where there was no evaluation.
        best: whether it is the best one of all; at most one is.
    """

    name: str
    epoch: int
    global_step: int
    metric: float | None
    best: bool


def write_index(root: Path, entries: Iterable[IndexEntry]) -> None:
    """Write the index of a folder of checkpoints, whole or not at all.

    Raises:
        CheckpointError: it cannot be written.
    """
    document = {
        "format": _FORMAT,
        "version": _VERSION,
        "checkpoints": [
            {
                "name": entry.name,
                "epoch": entry.epoch,
                "global_step": entry.global_step,
                "metric": json_values(entry.metric),
                "best": entry.best,
            }
            for entry in entries
        ],
    }
    write_file(root / INDEX_NAME, json.dumps(document, indent=2, allow_nan=False) + "\n")


def read_index(root: Path) -> list[IndexEntry]:
    """Return the entries of a folder's index.

    Raises:
        CheckpointError: there is no index.
        CheckpointCorruptError: the index is damaged.
    """
    path = root / INDEX_NAME
    if not is_regular_file(path):
        raise CheckpointError(
            f"{root} holds no {INDEX_NAME}, which the checkpoint plugin writes; so nothing says "
            "which checkpoint is the best."
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    document = parse_json(content, path)
    try:
        if document["format"] != _FORMAT or document["version"] != _VERSION:
            raise ValueError(f"expected {_FORMAT!r} version {_VERSION}")
        return [_entry(item) for item in document["checkpoints"]]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointCorruptError(f"{path} is damaged: {error!r}") from error


def _entry(item: Any) -> IndexEntry:
    if not is_plain_name(item["name"]):
        raise ValueError(f"{item['name']!r} is not the name of a directory in the folder")
    return IndexEntry(
        name=item["name"],
        epoch=int(item["epoch"]),
        global_step=int(item["global_step"]),
        metric=None if item["metric"] is None else float(item["metric"]),
        best=bool(item["best"]),
    )
