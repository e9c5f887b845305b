"""The manifest of a saved directory: what it is, and the size and SHA-256 of every file."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compression_manager.errors import (
    CheckpointCorruptError,
    CheckpointError,
    ForeignDirectoryError,
)
from compression_manager.state.files import is_regular_file

MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 (hexadecimal) of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a saved directory says about itself.

    Attributes:
        directory: where it was found; read the files from here. After a crash in the middle
            of a replacement this is the older version's hidden name.
        format_name: what kind of directory it is.
        version: version of that format, from 1.
        metadata: what the writer wanted people and tools to see (JSON values).
        files: name -> record of every file except the manifest.
    """

    directory: Path
    format_name: str
    version: int
    metadata: Mapping[str, Any]
    files: Mapping[str, FileRecord]

    def path(self, name: str) -> Path:
        """Return the path of a listed file.

        Raises:
            CheckpointCorruptError: the manifest does not list it.
        """
        if name not in self.files:
            raise CheckpointCorruptError(
                f"{self.directory}: {MANIFEST_NAME} does not list {name}; it lists "
                f"{', '.join(sorted(self.files)) or 'nothing'}."
            )
        return self.directory / name


def write_manifest(
    directory: Path, *, format_name: str, version: int, metadata: Mapping[str, Any]
) -> None:
    """Write the manifest of the files that now lie in `directory` (no subfolders)."""
    paths = sorted(directory.iterdir())
    document: dict[str, Any] = {
        "format": format_name,
        "version": version,
        "metadata": dict(metadata),
        "files": {
            path.name: {"size": path.stat().st_size, "sha256": _file_sha256(path)} for path in paths
        },
    }
    document["sha256"] = _document_sha256(document)
    target = directory / MANIFEST_NAME
    target.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    # Libraries create their files for the owner only; give all of them what the umask allows.
    for path in paths:
        path.chmod(target.stat().st_mode)


def verify_directory(path: Path, *, format_name: str, version: int = 1) -> Manifest:
    """Check a saved directory completely, before anything in it is parsed.

    Files that the manifest does not list are ignored.

    Args:
        path: the directory.
        format_name: the format it must have.
        version: the newest version of the format that the caller reads.

    Raises:
        CheckpointCorruptError: a listed file is missing, is no regular file, or differs in
            size or SHA-256; or the manifest is damaged. The message names the file.
        CheckpointError: there is no such directory, or it is something else.
    """
    manifest = read_manifest(path, format_name=format_name, version=version)
    for name, record in manifest.files.items():
        _verify_file(manifest.directory / name, record)
    return manifest


def read_manifest(path: Path, *, format_name: str, version: int = 1) -> Manifest:
    """Read and check the manifest alone; arguments and errors as in `verify_directory`."""
    directory = locate(path)
    document = parse_json(_manifest_content(directory, format_name), directory / MANIFEST_NAME)
    found = document.get("format") if isinstance(document, dict) else None
    if not _is_intact(document):
        # One damaged key or value leaves the others, which other software's manifests lack.
        if found == format_name or _looks_like_ours(document):
            raise _damaged(directory, "its content does not match its own SHA-256")
        raise _foreign(directory, f"its {MANIFEST_NAME} is foreign", format_name)
    if found != format_name:
        raise _foreign(directory, f"its format is {found!r}", format_name)
    return _parse(directory, document, version)


def backup_path(target: Path) -> Path:
    """Return the hidden name that a directory has while it is being replaced."""
    return target.with_name(f".{target.name}.replaced")


def original_name(name: str) -> str:
    """Return the name that a directory with a name from `backup_path` had; others as they are."""
    match = re.fullmatch(r"\.(.+)\.replaced", name)
    return match[1] if match else name


def locate(path: Path) -> Path:
    """Return `path`, or where its older version lies after a kill during a replacement."""
    target = Path(os.path.realpath(path))
    if target.name and not target.exists():
        backup = backup_path(target)
        if backup.is_dir():
            return backup
    return path


def parse_json(content: bytes, path: Path) -> Any:
    """Parse a JSON file's bytes.

    Raises:
        CheckpointCorruptError: it is no JSON, or nested too deeply to be ours.
    """
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointCorruptError(f"{path} is damaged: {error}") from error


def _manifest_content(directory: Path, format_name: str) -> bytes:
    try:
        if not os.path.lexists(directory):
            raise _foreign(directory, "it does not exist", format_name)
        if not directory.is_dir():
            raise _foreign(directory, "it is not a directory", format_name)
        if not is_regular_file(directory / MANIFEST_NAME):
            names = sorted(os.listdir(directory))
            shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            found = f"it holds {shown}" if names else "it is empty"
            raise _foreign(directory, f"{found} and no file {MANIFEST_NAME}", format_name)
        return (directory / MANIFEST_NAME).read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {directory}: {error}") from error


def _is_intact(document: Any) -> bool:
    if not isinstance(document, dict):
        return False
    try:
        return document.get("sha256") == _document_sha256(document)
    except RecursionError:
        return False


def _looks_like_ours(document: Any) -> bool:
    return isinstance(document, dict) and {"sha256", "files"} <= document.keys()


def _parse(directory: Path, document: Mapping[str, Any], version: int) -> Manifest:
    found = document.get("version")
    if type(found) is not int or found < 1:
        raise _damaged(directory, f"version is {found!r}")
    if found > version:
        raise CheckpointError(
            f"{directory} has version {found} of the format {document['format']!r}; this "
            f"release reads up to {version}. Read it with the release that wrote it."
        )
    metadata, files = document.get("metadata"), document.get("files")
    if not isinstance(metadata, dict) or not isinstance(files, dict):
        raise _damaged(directory, "metadata and files must be objects")
    records = {name: _record(directory, name, value) for name, value in files.items()}
    return Manifest(directory, document["format"], found, metadata, records)


def _record(directory: Path, name: str, value: Any) -> FileRecord:
    if not is_plain_name(name) or name == MANIFEST_NAME:
        raise _damaged(directory, f"{name!r} is not the name of a file in the directory")
    if not isinstance(value, dict):
        raise _damaged(directory, f"the record of {name!r} is no object")
    size, sha256 = value.get("size"), value.get("sha256")
    if type(size) is not int or not isinstance(sha256, str):
        raise _damaged(directory, f"the record of {name!r} lacks size or sha256")
    return FileRecord(size, sha256)


def is_plain_name(name: str) -> bool:
    """Return whether `name` names something directly inside a folder, and nothing else."""
    return name not in {"", ".", ".."} and not any(char in name for char in "/\\:\0")


def _verify_file(path: Path, record: FileRecord) -> None:
    if not os.path.lexists(path):
        raise CheckpointCorruptError(f"{path} is missing, but {MANIFEST_NAME} lists it.")
    if not is_regular_file(path):
        raise CheckpointCorruptError(f"{path} is a link or folder, not a regular file.")
    try:
        size = path.stat().st_size
        if size != record.size:
            raise CheckpointCorruptError(
                f"{path} has {size} bytes, but {MANIFEST_NAME} says {record.size}."
            )
        if _file_sha256(path) != record.sha256:
            raise CheckpointCorruptError(
                f"{path} is damaged: its SHA-256 is not the one in {MANIFEST_NAME}."
            )
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _document_sha256(document: Mapping[str, Any]) -> str:
    """Return the digest of a manifest's content, so that a flipped bit in it shows too."""
    content = {key: value for key, value in document.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _foreign(directory: Path, found: str, format_name: str) -> ForeignDirectoryError:
    return ForeignDirectoryError(
        f"{directory} is not a {format_name!r} directory: {found}. Expected a directory of that "
        f"format, which this framework wrote, with a {MANIFEST_NAME}."
    )


def _damaged(directory: Path, why: str) -> CheckpointCorruptError:
    return CheckpointCorruptError(f"{directory / MANIFEST_NAME} is damaged: {why}.")
