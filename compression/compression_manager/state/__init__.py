"""Training state on disk: safe directories, checkpoints without pickle, random states."""

from compression_manager.state.checkpoint import (
    CHECKPOINT_FORMAT,
    find_checkpoint,
    list_checkpoints,
    read_checkpoint,
    write_checkpoint,
)
from compression_manager.state.directory import atomic_directory, read_directory
from compression_manager.state.files import remove_directory
from compression_manager.state.index import IndexEntry, read_index, write_index
from compression_manager.state.manifest import (
    FileRecord,
    Manifest,
    read_manifest,
    verify_directory,
)
from compression_manager.state.random_state import (
    capture_random_state,
    restore_random_state,
    seed_everything,
)
from compression_manager.state.tree import flatten, unflatten

__all__ = [
    "CHECKPOINT_FORMAT",
    "FileRecord",
    "IndexEntry",
    "Manifest",
    "atomic_directory",
    "capture_random_state",
    "find_checkpoint",
    "flatten",
    "list_checkpoints",
    "read_checkpoint",
    "read_directory",
    "read_index",
    "read_manifest",
    "remove_directory",
    "restore_random_state",
    "seed_everything",
    "unflatten",
    "verify_directory",
    "write_checkpoint",
    "write_index",
]
