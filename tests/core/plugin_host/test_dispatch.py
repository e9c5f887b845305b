"""Hooks are called as pluggy calls them, whatever an implementation asks for."""

from __future__ import annotations

from typing import Any

import pytest

from compression_manager import Plugin, PluginError, hookimpl
from compression_manager.plugin import PluginConfig
from compression_manager.plugin_host.dispatch import Hooks
from compression_manager.plugin_host.loading import register

CONTEXT: Any = object()


class Answering(Plugin[PluginConfig]):
    """Answers with its name and what it was called with."""

    config_class = PluginConfig

    @hookimpl
    def on_epoch_begin(self, epoch: int, context: Any) -> Any:
        return (self.name, epoch, context)

    @hookimpl(trylast=True)
    def on_step_begin(self, step: int) -> Any:
        return (self.name, step)

    @hookimpl
    def on_step_end(self) -> Any:
        return self.name


class Silent(Plugin[PluginConfig]):
    """Answers nothing, or fails."""

    config_class = PluginConfig

    @hookimpl
    def on_epoch_begin(self) -> None:
        return None

    @hookimpl
    def on_step_end(self) -> None:
        raise ValueError("no")


class Unbound(Plugin[PluginConfig]):
    """Needs no instance."""

    config_class = PluginConfig

    @staticmethod
    @hookimpl
    def on_step_begin(step: int) -> Any:
        return step

    @classmethod
    @hookimpl
    def on_step_end(cls) -> Any:
        raise ValueError(cls.__name__)


class Wrapping(Plugin[PluginConfig]):
    """Changes what the others answer."""

    config_class = PluginConfig

    @hookimpl(wrapper=True)
    def on_epoch_begin(self) -> Any:
        answers = yield
        return [*answers, "wrapped"]


def _hooks(*plugins: tuple[type[Plugin[Any]], str]) -> Hooks:
    made = [kind(PluginConfig(name=name)) for kind, name in plugins]
    return Hooks(register(made).hook)


def test_answers_and_order_are_pluggys() -> None:
    hooks = _hooks((Answering, "a"), (Silent, "b"), (Answering, "c"))
    for name, arguments in (
        ("on_epoch_begin", {"context": CONTEXT, "epoch": 3}),
        ("on_step_begin", {"context": CONTEXT, "step": 5}),
        ("on_train_end", {"context": CONTEXT}),
    ):
        expected = getattr(hooks.relay, name)(**arguments)
        assert getattr(hooks, name)(**arguments) == expected
        assert getattr(hooks, name) is not getattr(hooks.relay, name)
    assert hooks.on_epoch_begin(context=CONTEXT, epoch=3) == [("a", 3, CONTEXT), ("c", 3, CONTEXT)]


def test_who_fails_is_named_and_nobody_comes_after() -> None:
    hooks = _hooks((Answering, "a"), (Silent, "b"), (Answering, "c"))
    with pytest.raises(
        PluginError, match="plugin 'b' failed in hook 'on_step_end': ValueError: no"
    ):
        hooks.on_step_end(context=CONTEXT)


def test_methods_without_an_instance_are_called_and_named() -> None:
    hooks = _hooks((Unbound, "u"))
    assert hooks.on_step_begin(context=CONTEXT, step=4) == [4]
    with pytest.raises(PluginError, match="'u' failed in hook 'on_step_end': ValueError: Unbound"):
        hooks.on_step_end(context=CONTEXT)


def test_wrappers_and_first_answers_stay_with_pluggy() -> None:
    hooks = _hooks((Answering, "a"), (Wrapping, "w"))
    assert hooks.on_epoch_begin(context=CONTEXT, epoch=1) == [("a", 1, CONTEXT), "wrapped"]
    assert hooks.on_epoch_begin is hooks.relay.on_epoch_begin
    assert hooks.make_observer is hooks.relay.make_observer
