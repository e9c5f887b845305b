"""Plugins that fail on purpose."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Generator
from typing import Any

from compression_manager.plugin import Plugin


class InjectedError(Exception):
    """What a test raises where a hook or a loop is to fail."""


def fail(*arguments: object) -> None:
    """Raise InjectedError, whatever it is called with."""
    raise InjectedError("on purpose")


def failing(plugin_class: type[Plugin[Any]], attribute: str, *, after: bool) -> type[Plugin[Any]]:
    """Return a subclass that raises InjectedError in one hook.

    Args:
        plugin_class: the plugin's class.
        attribute: name of the method that implements the hook.
        after: raise when the method's work is done; otherwise instead of it.
    """
    original = getattr(plugin_class, attribute)

    @functools.wraps(original)
    def fail_outright(self: Any, *values: Any) -> None:
        if after:
            original(self, *values)
        raise InjectedError(attribute)

    @functools.wraps(original)
    def fail_around(self: Any, *values: Any) -> Generator[Any, Any, Any]:
        if after:
            yield from original(self, *values)
        raise InjectedError(attribute)
        yield  # makes it a generator, which pluggy wants of a wrapper

    method = fail_around if inspect.isgeneratorfunction(original) else fail_outright
    return type(f"Failing{plugin_class.__name__}", (plugin_class,), {attribute: method})
