"""Checks for the `__post_init__` of config dataclasses; they say field, rule and value.

Each raises ConfigError, for example
`CheckpointConfig.keep_best_n must be an integer of at least 1, got 0.` A bool is no number
here, and neither is NaN or infinity. `owner` is the config instance (or its name), `field` the
name of the option.
"""

from __future__ import annotations

import math
import operator
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TypeGuard

from compression_manager.errors import ConfigError, suggest

MAX_SEED = 2**32 - 1  # numpy's limit; torch takes more


def require_integer(
    owner: object,
    field: str,
    value: object,
    *,
    minimum: int | None = None,
    maximum: int | None = None,
) -> None:
    """Raise ConfigError unless `value` is an int within the limits, both included."""
    if (
        not isinstance(value, int)
        or isinstance(value, bool)
        or (minimum is not None and value < minimum)
        or (maximum is not None and value > maximum)
    ):
        raise _error(owner, field, f"an integer{_limits(minimum, maximum)}", value)


def require_positive(owner: object, field: str, value: object) -> None:
    """Raise ConfigError unless `value` is a finite number above 0."""
    if not (_is_number(value) and value > 0):  # type: ignore[operator]  # _is_number narrows
        raise _error(owner, field, "a finite number above 0", value)


def require_not_negative(owner: object, field: str, value: object) -> None:
    """Raise ConfigError unless `value` is a finite number of at least 0."""
    if not (_is_number(value) and value >= 0):  # type: ignore[operator]  # _is_number narrows
        raise _error(owner, field, "a finite number of at least 0", value)


def require_fraction(owner: object, field: str, value: object) -> None:
    """Raise ConfigError unless `value` is a number from 0 to 1, both included."""
    if not (_is_number(value) and 0 <= value <= 1):  # type: ignore[operator]  # _is_number narrows
        raise _error(owner, field, "a number from 0 to 1", value)


def require_choice(owner: object, field: str, value: object, choices: Iterable[str]) -> None:
    """Raise ConfigError, with the nearest names, unless `value` is one of `choices`."""
    names = list(choices)
    if not isinstance(value, str) or value not in names:
        message = f"{_name(owner)}.{field} got {_show(value)}; {suggest(str(value), names)}"
        raise ConfigError(message)


def require_type(
    owner: object, field: str, value: object, expected: type | tuple[type, ...]
) -> None:
    """Raise ConfigError unless `value` is an instance of `expected`."""
    if not isinstance(value, expected):
        types = expected if isinstance(expected, tuple) else (expected,)
        names = " or ".join("None" if item is type(None) else item.__name__ for item in types)
        raise _error(owner, field, f"of type {names}", value)


def is_seed(value: object) -> TypeGuard[int]:
    """Return whether `value` is a whole number from 0 to `MAX_SEED`."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_SEED


def as_count(call: str, name: str, value: object) -> int:
    """Return `value`, the argument `name` of `call`, as an int; NumPy's and torch's are taken too.

    Raises:
        ConfigError: it is no whole number, or negative.
    """
    try:
        count = -1 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]  # raises, caught
    except TypeError:
        count = -1
    if count < 0:
        raise ConfigError(f"{call} takes {name} as a whole number from 0, got {value!r}.")
    return count


def as_path(call: str, value: object, *, of: str = "folder") -> Path:
    """Return `value`, the argument of `call`, as a path.

    Raises:
        ConfigError: it is neither a text nor a path, or it is empty.
    """
    if not isinstance(value, (str, Path)) or not str(value):
        raise ConfigError(f"{call} takes the path of a {of}, got {value!r}.")
    return Path(value)


def write_text(call: str, path: Path, text: str) -> Path:
    """Write `text`, the result of `call`, to `path`, replacing a file that is there.

    Raises:
        ConfigError: the file cannot be written, for example because its folder does not exist.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            f"{call} cannot write {path}: {reason}; pass a file's path in a folder that exists."
        ) from error
    return path


def require_writable_folder(directory: str | Path) -> None:
    """Raise ConfigError unless `directory` is a folder, or can become one, and files fit into it.

    Tried by creating and removing an empty folder in the nearest one that exists: permissions
    alone do not tell (the superuser passes them, read-only and virtual file systems refuse).
    """
    path = Path(os.path.realpath(directory))
    existing = next(folder for folder in (path, *path.parents) if os.path.lexists(folder))
    if not existing.is_dir():
        raise ConfigError(f"{directory} cannot be a folder, because {existing} is a file.")
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".probe-", dir=existing))
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"{directory} cannot be written: {existing}: {reason}.") from error


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _limits(minimum: int | None, maximum: int | None) -> str:
    if minimum is not None and maximum is not None:
        return f" from {minimum} to {maximum}"
    if minimum is not None:
        return f" of at least {minimum}"
    return f" of at most {maximum}" if maximum is not None else ""


def _error(owner: object, field: str, rule: str, value: object) -> ConfigError:
    return ConfigError(f"{_name(owner)}.{field} must be {rule}, got {_show(value)}.")


def _name(owner: object) -> str:
    return owner if isinstance(owner, str) else type(owner).__name__


def _show(value: object) -> str:
    """Return a repr that stays short for tensors, modules and long texts."""
    text = repr(value)
    return text if len(text) <= 80 and "\n" not in text else f"a {type(value).__name__}"
