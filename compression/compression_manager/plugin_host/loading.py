"""From plugin instances to checked and guarded hooks."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import pluggy

from compression_manager import hookspecs
from compression_manager.errors import CompressionError, PluginError, suggest
from compression_manager.hookspecs import OPTIONAL_HOOKS
from compression_manager.plugin import PROJECT_NAME, Plugin
from compression_manager.services import ANSWER_TYPES

if TYPE_CHECKING:
    from compression_manager.context import Context

_IMPLEMENTATION_MARK = f"{PROJECT_NAME}_impl"
_SPECIFICATION_MARK = f"{PROJECT_NAME}_spec"


def implemented_hooks(plugin: Plugin[Any]) -> dict[str, Callable[..., Any]]:
    """Return attribute name -> hook implementation, checked against the specification.

    Raises:
        PluginError: an unknown hook name, a hook without its decorator, a wrapper of
            `on_exception`, or a parameter that the hook does not have or that has a default.
    """
    specifications = _specifications()
    found: dict[str, Callable[..., Any]] = {}
    for attribute in dir(type(plugin)):
        # Properties are not evaluated: they may not work before prepare.
        if not callable(getattr(type(plugin), attribute, None)):
            continue
        method = getattr(plugin, attribute)
        marks = getattr(method, _IMPLEMENTATION_MARK, None)
        if marks is not None:
            hook = marks.get("specname") or attribute
            _check_implementation(plugin, hook, method, specifications)
            if hook == "on_exception" and (marks["wrapper"] or marks["hookwrapper"]):
                raise PluginError(
                    f"{_describe(plugin)} wraps 'on_exception', which is called plugin by plugin, "
                    "so that one that fails keeps no other from hearing; implement it without "
                    "wrapper=True.",
                    plugin=plugin.name,
                    hook=hook,
                )
            found[attribute] = method
        elif attribute in specifications:
            raise PluginError(
                f"{_describe(plugin)}: method '{attribute}' has the name of a hook and would not "
                "be called; decorate it with @hookimpl (an overriding method too).",
                plugin=plugin.name,
                hook=attribute,
            )
    return found


def required_hooks(plugins: Sequence[Plugin[Any]]) -> dict[str, list[str]]:
    """Return optional hook -> names of the plugins that cannot do without it.

    Raises:
        PluginError: a plugin requires something that is no optional hook.
    """
    required: dict[str, list[str]] = {}
    for plugin in plugins:
        with naming(plugin, "required_hooks"):
            hooks = plugin.required_hooks()
        for hook in hooks:
            if hook not in OPTIONAL_HOOKS:
                raise PluginError(
                    f"{_describe(plugin)} requires '{hook}', which is no optional hook; "
                    f"{suggest(hook, OPTIONAL_HOOKS)}",
                    plugin=plugin.name,
                    hook=hook,
                )
            required.setdefault(hook, []).append(plugin.name)
    return required


def register(plugins: Sequence[Plugin[Any]]) -> pluggy.PluginManager:
    """Return a pluggy manager that calls the plugins in their order; what they raise names them."""
    hooks = pluggy.PluginManager(PROJECT_NAME)
    hooks.add_hookspecs(hookspecs)
    guarded = [(plugin.name, *_guarded_parts(plugin)) for plugin in plugins]
    # pluggy calls what was registered last first, and of what is marked trylast the reverse.
    for name, usual, _ in reversed(guarded):
        hooks.register(usual, name=name)
    for name, _, last in guarded:
        hooks.register(last, name=f"{name} (trylast)")
    hooks.check_pending()
    return hooks


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


@contextmanager
def naming(plugin: Plugin[Any], method: str) -> Iterator[None]:
    """Name the plugin and its method in what the block raises, as for hooks."""
    try:
        yield
    except Exception as error:
        raise_named(error, plugin, method)


class GuardedHooks:
    """Holds guarded hook implementations of one plugin, as pluggy is to call them.

    Attributes:
        plugin: whose they are.
    """

    def __init__(self, plugin: Plugin[Any]) -> None:
        self.plugin = plugin


def _guarded_parts(plugin: Plugin[Any]) -> tuple[GuardedHooks, GuardedHooks]:
    """Return the usual implementations, and those marked trylast."""
    usual, last = GuardedHooks(plugin), GuardedHooks(plugin)
    for attribute, method in implemented_hooks(plugin).items():
        marks = getattr(method, _IMPLEMENTATION_MARK)
        hook = marks.get("specname") or attribute
        setattr(last if marks["trylast"] else usual, attribute, _guard(plugin, hook, method))
    return usual, last


def _specifications() -> dict[str, list[str]]:
    return {
        name: list(inspect.signature(function).parameters)
        for name, function in vars(hookspecs).items()
        if hasattr(function, _SPECIFICATION_MARK)
    }


def _check_implementation(
    plugin: Plugin[Any],
    hook: str,
    method: Callable[..., Any],
    specifications: Mapping[str, list[str]],
) -> None:
    where = _describe(plugin)
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
        if parameter.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
            raise PluginError(
                f"{where}: parameter '{name}' of hook '{hook}' must be an ordinary parameter, "
                f"not {parameter.kind.description}.",
                plugin=plugin.name,
                hook=hook,
            )


def _guard(plugin: Plugin[Any], hook: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap one implementation, so that what it raises or answers wrongly names it."""
    if inspect.isgeneratorfunction(method):

        @functools.wraps(method)
        def guarded_wrapper(*args: Any) -> Generator[Any, Any, Any]:
            try:
                return (yield from method(*args))
            except Exception as error:
                raise_named(error, plugin, hook)

        return guarded_wrapper

    answer_type = ANSWER_TYPES.get(hook)

    @functools.wraps(method)
    def guarded(*args: Any) -> Any:
        try:
            answer = method(*args)
        except Exception as error:
            raise_named(error, plugin, hook)
        if answer_type is not None and not isinstance(answer, (answer_type, type(None))):
            raise PluginError(
                f"plugin '{plugin.name}' must answer '{hook}' with None or an object of "
                f"type {answer_type.__name__}, not with {type(answer).__name__}.",
                plugin=plugin.name,
                hook=hook,
            )
        if hook == "make_distillation_loss" and answer is not None:
            return _named_calls(answer, plugin, hook)
        return answer

    return guarded


def _named_calls(
    function: Callable[..., Any], plugin: Plugin[Any], hook: str
) -> Callable[..., Any]:
    """Return `function`, whose errors name the plugin that offers it and not the one that calls."""

    @functools.wraps(function, updated=())
    def call(*args: Any, **keywords: Any) -> Any:
        try:
            return function(*args, **keywords)
        except Exception as error:
            raise_named(error, plugin, hook)

    return call


def raise_named(error: Exception, plugin: Plugin[Any], hook: str) -> NoReturn:
    """Raise what an implementation raised: our own errors with a note, others as PluginError."""
    if isinstance(error, CompressionError):
        _place_option(error, plugin)
        if not isinstance(error, PluginError) and not getattr(error, "__notes__", None):
            error.add_note(f"raised by plugin '{plugin.name}' in hook '{hook}'")
        raise error
    raise PluginError(
        f"plugin '{plugin.name}' failed in hook '{hook}': {type(error).__name__}: {error}",
        plugin=plugin.name,
        hook=hook,
    ) from error


def _place_option(error: CompressionError, plugin: Plugin[Any]) -> None:
    """Put plugin and option at fault before the message, unless that is done."""
    if error.option is not None and error.key_path is None:
        error.key_path = f"plugins.{plugin.name}.{error.option}"
        error.args = (f"{plugin.name}.{error.option}: {error}", *error.args[1:])


def _describe(plugin: Plugin[Any]) -> str:
    return f"plugin '{plugin.name}' ({type(plugin).__module__}.{type(plugin).__qualname__})"
