"""From an entry-point name to a checked plugin class; from an instance to guarded hooks."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, NoReturn

import pluggy

from compression_manager import hookspecs
from compression_manager.errors import CompressionError, ConfigError, PluginError, suggest
from compression_manager.plugin import ENTRY_POINT_GROUP, PROJECT_NAME, Plugin

if TYPE_CHECKING:
    from compression_manager.context import Context

_IMPLEMENTATION_MARK = f"{PROJECT_NAME}_impl"
_SPECIFICATION_MARK = f"{PROJECT_NAME}_spec"


def installed_plugins() -> dict[str, EntryPoint]:
    """Return name -> entry point of every installed plugin, without importing any."""
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}


def load_plugin_class(name: str) -> type[Plugin[Any]]:
    """Import the plugin registered under `name`, and no other.

    Raises:
        ConfigError: no plugin of that name is installed.
        PluginError: it cannot be imported, or is no `Plugin` subclass with a `config_class`;
            the message names the distribution that installed it.
    """
    installed = installed_plugins()
    if name not in installed:
        raise ConfigError(f"no plugin named '{name}' is installed; {suggest(name, installed)}")
    entry = installed[name]
    origin = f"plugin '{name}' ({entry.value}, installed by {_distribution_name(entry)})"
    try:
        plugin_class = entry.load()
    except Exception as error:
        raise PluginError(f"{origin} cannot be imported: {error!r}.", plugin=name) from error
    if not (isinstance(plugin_class, type) and issubclass(plugin_class, Plugin)):
        raise PluginError(
            f"{origin} must be a subclass of compression_manager.Plugin, got {plugin_class!r}.",
            plugin=name,
        )
    config_class = getattr(plugin_class, "config_class", None)
    if config_class is None or getattr(config_class, "plugin", None) != name:
        raise PluginError(
            f"{origin} must set config_class to a PluginConfig whose 'plugin' is {name!r}.",
            plugin=name,
        )
    return plugin_class


def implemented_hooks(plugin: Plugin[Any]) -> dict[str, Callable[..., Any]]:
    """Return attribute name -> hook implementation, checked against the specification.

    Raises:
        PluginError: an unknown hook name, or a parameter that the hook does not have or that
            has a default.
    """
    found: dict[str, Callable[..., Any]] = {}
    for attribute, method in inspect.getmembers(plugin, inspect.isroutine):
        marks = getattr(method, _IMPLEMENTATION_MARK, None)
        if marks is not None:
            _check_implementation(plugin, marks.get("specname") or attribute, method)
            found[attribute] = method
    return found


def register(hooks: pluggy.PluginManager, plugin: Plugin[Any]) -> None:
    """Register the plugin's hook implementations so that what they raise names them."""
    guarded = _Guarded()
    for attribute, method in implemented_hooks(plugin).items():
        setattr(guarded, attribute, _guard(plugin, method))
    hooks.register(guarded, name=plugin.name)


def announce_exception(
    hooks: pluggy.HookRelay, context: Context, error: BaseException
) -> list[Exception]:
    """Call `on_exception` of every plugin, whatever one of them raises; return what they raised."""
    failures: list[Exception] = []
    arguments = {"context": context, "error": error}
    for implementation in reversed(hooks.on_exception.get_hookimpls()):
        try:
            implementation.function(*(arguments[name] for name in implementation.argnames))
        except Exception as failure:
            failures.append(failure)
    return failures


class _Guarded:
    """Holds the guarded hook implementations of one plugin."""


def _specifications() -> dict[str, list[str]]:
    return {
        name: list(inspect.signature(function).parameters)
        for name, function in vars(hookspecs).items()
        if hasattr(function, _SPECIFICATION_MARK)
    }


def _check_implementation(plugin: Plugin[Any], hook: str, method: Callable[..., Any]) -> None:
    specifications = _specifications()
    where = f"plugin '{plugin.name}' ({type(plugin).__module__}.{type(plugin).__qualname__})"
    if hook not in specifications:
        raise PluginError(
            f"{where} implements '{hook}', which is no hook; {suggest(hook, specifications)}",
            plugin=plugin.name,
            hook=hook,
        )
    valid = specifications[hook]
    for name, parameter in inspect.signature(method).parameters.items():
        if name not in valid:
            raise PluginError(
                f"{where}: hook '{hook}' has no parameter '{name}'; {suggest(name, valid)}",
                plugin=plugin.name,
                hook=hook,
            )
        if parameter.default is not inspect.Parameter.empty:
            raise PluginError(
                f"{where}: parameter '{name}' of hook '{hook}' must not have a default, "
                "because pluggy would then pass the default instead of the value.",
                plugin=plugin.name,
                hook=hook,
            )


def _guard(plugin: Plugin[Any], method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap one implementation: our own errors get a note, all others become PluginError."""
    hook = getattr(method, _IMPLEMENTATION_MARK).get("specname") or method.__name__

    if inspect.isgeneratorfunction(method):

        @functools.wraps(method)
        def guarded_wrapper(*args: Any) -> Generator[Any, Any, Any]:
            try:
                return (yield from method(*args))
            except Exception as error:
                _raise_named(error, plugin, hook)

        return guarded_wrapper

    @functools.wraps(method)
    def guarded(*args: Any) -> Any:
        try:
            return method(*args)
        except Exception as error:
            _raise_named(error, plugin, hook)

    return guarded


def _raise_named(error: Exception, plugin: Plugin[Any], hook: str) -> NoReturn:
    if isinstance(error, CompressionError):
        if not getattr(error, "__notes__", None):
            error.add_note(f"raised by plugin '{plugin.name}' in hook '{hook}'")
        raise error
    raise PluginError(
        f"plugin '{plugin.name}' failed in hook '{hook}': {type(error).__name__}: {error}",
        plugin=plugin.name,
        hook=hook,
    ) from error


def _distribution_name(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "an unknown distribution"
