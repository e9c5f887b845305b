"""`compression-manager inspect`: what is in a checkpoint, and is it sound?"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from compression_manager.cli.outcome import Outcome, to_json, to_yaml
from compression_manager.errors import CheckpointError, ForeignDirectoryError
from compression_manager.json_values import json_values
from compression_manager.state import (
    CHECKPOINT_FORMAT,
    Manifest,
    flatten,
    read_checkpoint,
    read_manifest,
)
from compression_manager.state.checkpoint import candidates, check_newest_is_there
from compression_manager.state.index import INDEX_NAME, read_index
from compression_manager.state.manifest import MANIFEST_NAME, locate
from compression_manager.training.state_checks import check_kinds

NAME = "inspect"
SUMMARY = "verify a checkpoint and show what it holds"
DESCRIPTION = """\
Verify a checkpoint, or each one in a folder of several: the SHA-256 of every file against
the manifest, then whether it holds a training state. Print where the training stood, the
metrics of its evaluations, files with sizes, the number of tensors, the keys of every
plugin's state, and the recipe, as YAML or JSON. Nothing is changed.
"""
EXAMPLES = """\
examples:
  compression-manager inspect runs/demo/checkpoints
  compression-manager inspect runs/demo/checkpoints/step-00000120 --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments."""
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a checkpoint, or a folder of several"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> Outcome:
    """Inspect one checkpoint or several.

    Raises:
        CheckpointError: there is none, or the only one is not sound.
    """
    root = locate(Path(options.checkpoint))
    if not root.is_dir() or os.path.lexists(root / MANIFEST_NAME):
        return _show([_inspect(root)[1]], (), as_json=options.json)
    found, problems = _inspect_folder(root)
    return _show(found, problems, as_json=options.json)


def _show(found: list[dict[str, Any]], problems: Iterable[str], *, as_json: bool) -> Outcome:
    write = to_json if as_json else to_yaml
    return Outcome(write({"checkpoints": found}), tuple(problems))


def _inspect_folder(root: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Return what each checkpoint holds, fewest steps first, and what is wrong."""
    sound: list[tuple[Manifest, dict[str, Any]]] = []
    damaged: list[dict[str, Any]] = []
    for path in candidates(root):
        try:
            sound.append(_inspect(path))
        except ForeignDirectoryError:
            continue
        except CheckpointError as error:
            damaged.append({"directory": str(path), "error": str(error)})
    problems = [item["error"] for item in damaged]
    if not sound and not damaged:
        folders = [str(path) for path in candidates(root) if os.path.lexists(path / INDEX_NAME)]
        raise CheckpointError(
            f"{root} holds no checkpoint"
            + (f", but there are some in {', '.join(folders)}." if folders else ".")
            + f" Expected a checkpoint (a directory with {MANIFEST_NAME}) or a folder of several."
        )
    sound.sort(key=lambda item: item[1]["global_step"])
    try:
        _mark_best(root, [described for _, described in sound])
        if not damaged:
            check_newest_is_there(root, [manifest for manifest, _ in sound])
    except CheckpointError as error:
        problems.append(str(error))
    return [*(described for _, described in sound), *damaged], problems


def _mark_best(root: Path, described: list[dict[str, Any]]) -> None:
    if not os.path.lexists(root / INDEX_NAME):
        return
    best = {entry.name for entry in read_index(root) if entry.best}
    for item in described:
        item["best"] = Path(item["directory"]).name in best


def _inspect(path: Path) -> tuple[Manifest, dict[str, Any]]:
    """Return the verified manifest, and what the checkpoint holds as JSON values."""
    state = read_checkpoint(path)
    manifest = read_manifest(path, format_name=CHECKPOINT_FORMAT)
    try:
        check_kinds(state)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return manifest, {
        "directory": str(manifest.directory),
        "verified": True,
        "epoch": state["epoch"],
        "step": state["step"],
        "global_step": state["global_step"],
        "stopped": state["stop"]["reason"] if state["stop"]["should_stop"] else None,
        "evaluations": json_values(state["evaluations"]),
        "files": {name: record.size for name, record in sorted(manifest.files.items())},
        "tensors": len(flatten(state)[1]),
        "plugin_states": {name: sorted(map(str, own)) for name, own in state["plugins"].items()},
        "tracked": sorted(map(str, state["tracked"])),
        "recipe": json_values(state["recipe"]),
    }
