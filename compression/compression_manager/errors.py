"""Every exception that the framework raises on purpose.

Catch `CompressionError` to catch them all. Each message says what is wrong, where
(plugin, hook, layer, key path or file) and what would be valid.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class CompressionError(Exception):
    """Base class of all errors raised by the framework and its plugins.

    Attributes:
        option: the option at fault in its plugin's config, for example `overrides[0].layer`,
            or None.
        key_path: where a recipe has it, for example `plugins.qat.overrides[0].layer`, or None.
    """

    option: str | None = None
    key_path: str | None = None


class ConfigError(CompressionError):
    """A configuration, recipe or argument is invalid."""


class MissingObjectError(ConfigError):
    """A live object, which a recipe cannot hold, is missing beside options that need it.

    A config's `__post_init__` raises it after all its other checks, so that
    `compression-manager check` can tell a sound recipe without its objects from a wrong one.

    Attributes:
        option: the option that takes the object, for example `teacher_model`.
    """

    option: str

    def __init__(self, message: str, *, option: str) -> None:
        super().__init__(message)
        self.option = option

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how to copy it into another process, which calls it with all its arguments."""
        return functools.partial(type(self), option=self.option), self.args, vars(self)


class LifecycleError(CompressionError):
    """Hooks were called in an order that the training loop does not allow."""


class LossError(CompressionError):
    """A loss is not a finite floating-point scalar."""


class QuantizationError(CompressionError):
    """A scheme, layer or range cannot be quantized as asked."""


class NotExportableError(QuantizationError):
    """The object has no fixed parameters and cannot be exported."""


class ParityError(CompressionError):
    """A converted model does not compute what was trained."""


class CheckpointError(CompressionError):
    """A checkpoint cannot be written or read."""


class CheckpointCorruptError(CheckpointError):
    """A checkpoint's bytes do not match its manifest."""


class CheckpointMismatchError(CheckpointError):
    """A checkpoint is sound but belongs to another model, plugin list or teacher."""


class ForeignDirectoryError(CheckpointError):
    """There is no checkpoint or converted model at a path, or it is something else."""


class PluginError(CompressionError):
    """A plugin is unusable, or raised an exception that is not one of ours.

    Attributes:
        plugin: name of the plugin instance.
        hook: name of the hook that was running, or None outside of hooks.
    """

    def __init__(self, message: str, *, plugin: str, hook: str | None = None) -> None:
        super().__init__(message)
        self.plugin = plugin
        self.hook = hook

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how to copy it into another process, which calls it with all its arguments."""
        make = functools.partial(type(self), plugin=self.plugin, hook=self.hook)
        return make, self.args, vars(self)


@contextmanager
def blame_option(option: str) -> Iterator[None]:
    """Name the option of the plugin's own config that an error of the block is about.

    Inside a hook: `with blame_option("overrides[0].layer"): ...`. The plugin's name is put in
    front where the error leaves the hook. Errors that name an option already stay as they are.
    """
    try:
        yield
    except CompressionError as error:
        if error.option is None:
            error.option = option
        raise


def suggest(name: str, valid: Iterable[str], *, limit: int = 12) -> str:
    """Return the tail of an error message: the nearest valid names, then the valid ones.

    `suggest("temprature", ["temperature", "name"])` gives
    `"did you mean 'temperature'? Valid: name, temperature."`.
    """
    names = sorted(set(valid) - {""})
    if not names:
        return "there is none to choose from."
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(item) for item in near)}? " if near else ""
    shown = ", ".join(names[:limit])
    more = f", ... ({len(names) - limit} more)" if len(names) > limit else ""
    return f"{hint}Valid: {shown}{more}."
