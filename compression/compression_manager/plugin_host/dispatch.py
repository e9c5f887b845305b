"""Calls of the hooks, with the plugins and their order looked up once."""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import TYPE_CHECKING, Any, cast

import pluggy

from compression_manager.plugin_host.loading import GuardedHooks, raise_named


class Hooks:
    """All hooks as functions of keyword arguments, as pluggy's relay has them.

    pluggy decides, when the plugins are registered, who is called and in which order. A hook
    without wrappers, of which all answers count, is then called without it, because it would
    check and sort out the same again in every step.

    Attributes:
        relay: pluggy's own, with all plugins registered; later ones are not seen.
    """

    def __init__(self, relay: pluggy.HookRelay) -> None:
        self.relay = relay
        for name, caller in vars(relay).items():
            setattr(self, name, _direct(caller))

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Callable[..., Any]: ...


def _direct(caller: pluggy.HookCaller) -> Callable[..., Any]:
    """Return what calls the implementations of one hook, the last registered first."""
    implementations = caller.get_hookimpls()[::-1]
    assert caller.spec is not None  # plugins have hooks of the specification only
    has_wrappers = any(item.wrapper or item.hookwrapper for item in implementations)
    if has_wrappers or caller.spec.opts["firstresult"]:
        return caller
    calls = []
    for item in implementations:
        guarded = cast(GuardedHooks, item.plugin)
        method = vars(item.function)["__wrapped__"]  # not the guard: errors are named below
        calls.append((guarded.plugin, method, _chooser(item.argnames)))

    def call(**arguments: Any) -> list[Any]:
        answers = []
        for plugin, method, choose in calls:
            try:
                answer = method(*choose(arguments))
            except Exception as error:
                raise_named(error, plugin, caller.name)
            if answer is not None:
                answers.append(answer)
        return answers

    return call


def _chooser(names: tuple[str, ...]) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
    """Return what takes the values of `names` out of a dictionary, as a tuple."""
    if not names:
        return lambda arguments: ()
    if len(names) == 1:
        name = names[0]
        return lambda arguments: (arguments[name],)
    return itemgetter(*names)
