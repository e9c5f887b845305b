"""Hook implementations that pluggy would call wrongly, or never, are refused at load."""

from __future__ import annotations

from typing import Any

import pytest

import toys
from compression_manager import Plugin, PluginError, hookimpl, prepare_compression
from probes import ProbeConfig, begin_step, probe


class _Base(Plugin[ProbeConfig]):
    config_class = ProbeConfig


class MisspeltHook(_Base):
    @hookimpl
    def on_step_bgin(self) -> None: ...


class MisspeltSpecname(_Base):
    @hookimpl(specname="on_step_bgin")
    def whatever(self) -> None: ...


class MisspeltParameter(_Base):
    @hookimpl
    def on_step_begin(self, contxt: Any) -> None: ...


class ParameterOfAnotherHook(_Base):
    @hookimpl
    def on_step_begin(self, epoch: int) -> None: ...


class Defaulted(_Base):
    @hookimpl
    def on_step_begin(self, context: Any, step: int = 0) -> None: ...


class MisspeltAndDefaulted(_Base):
    @hookimpl
    def on_step_begin(self, stepp: int = 0) -> None: ...


class AnyArguments(_Base):
    @hookimpl
    def on_step_begin(self, **arguments: Any) -> None: ...


class KeywordOnly(_Base):
    @hookimpl
    def on_step_begin(self, *, context: Any) -> None: ...


class Undecorated(_Base):
    def on_step_begin(self, context: Any) -> None: ...


class _Parent(_Base):
    @hookimpl
    def on_step_begin(self, context: Any) -> None: ...


class UndecoratedOverride(_Parent):
    def on_step_begin(self, context: Any) -> None: ...


class WrappedException(_Base):
    @hookimpl(wrapper=True)
    def on_exception(self, error: BaseException) -> Any:
        return (yield)


class OldWrappedException(_Base):
    @hookimpl(hookwrapper=True, specname="on_exception")
    def whatever(self, error: BaseException) -> Any:
        yield


@pytest.mark.parametrize(
    ("plugin_class", "hook", "text"),
    [
        (MisspeltHook, "on_step_bgin", "is no hook; did you mean 'on_step_begin'"),
        (MisspeltSpecname, "on_step_bgin", "is no hook; did you mean 'on_step_begin'"),
        (MisspeltParameter, "on_step_begin", "no parameter 'contxt'; did you mean 'context'"),
        (ParameterOfAnotherHook, "on_step_begin", "no parameter 'epoch'; Valid: context, step."),
        (Defaulted, "on_step_begin", "parameter 'step' of hook 'on_step_begin' must not have a"),
        (MisspeltAndDefaulted, "on_step_begin", "no parameter 'stepp'; did you mean 'step'"),
        (AnyArguments, "on_step_begin", "no parameter 'arguments'"),
        (KeywordOnly, "on_step_begin", "must be an ordinary parameter, not keyword-only"),
        (Undecorated, "on_step_begin", "decorate it with @hookimpl"),
        (UndecoratedOverride, "on_step_begin", "decorate it with @hookimpl"),
        (WrappedException, "on_exception", "implement it without wrapper=True"),
        (OldWrappedException, "on_exception", "implement it without wrapper=True"),
    ],
)
def test_refused_at_load(plugin_class: type[Plugin[Any]], hook: str, text: str) -> None:
    with pytest.raises(PluginError) as error:
        prepare_compression(toys.mlp(), [plugin_class(ProbeConfig())])
    assert (error.value.plugin, error.value.hook) == ("probe", hook)
    assert text in str(error.value)
    assert plugin_class.__qualname__ in str(error.value)


def test_any_subset_of_parameters_by_name() -> None:
    seen: list[Any] = []

    class Chosen(_Base):
        @hookimpl
        def on_epoch_begin(self) -> None:
            seen.append("epoch")

        @hookimpl(specname="on_step_begin")
        def other_name(self, step: int, context: Any) -> None:
            seen.append((step, context.step))

    begin_step(prepare_compression(toys.mlp(), [Chosen(ProbeConfig())]))
    assert seen == ["epoch", (0, 0)]


def test_wrappers_work_and_are_not_blamed_for_others() -> None:
    seen: list[str] = []

    class Wrapping(_Base):
        @hookimpl(wrapper=True)
        def on_step_begin(self) -> Any:
            seen.append("before")
            try:
                return (yield)
            finally:
                seen.append("after")

    def fail(self: Any) -> None:
        raise KeyError("inner")

    plugins = [Wrapping(ProbeConfig(name="outer")), probe("inner", on_step_begin=fail)]
    with pytest.raises(PluginError) as error:
        begin_step(prepare_compression(toys.mlp(), plugins))
    assert seen == ["before", "after"]
    assert error.value.plugin == "inner"
    assert not hasattr(error.value, "__notes__")


def test_properties_are_not_evaluated_at_load() -> None:
    class WithProperty(_Base):
        @property
        def works_later(self) -> int:
            raise RuntimeError("too early")

    prepare_compression(toys.mlp(), [WithProperty(ProbeConfig())])
