"""Failures: each is named, and none keeps the plugin from leaving."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from compression_manager.context import Context
from compression_manager.errors import ConfigError, PluginError
from compression_manager.plugin import PROJECT_NAME, Plugin, hookimpl
from compression_manager.plugin_host.loading import implemented_hooks
from compression_manager.quantization.scheme import QuantizationScheme
from compression_manager.quantization.site import QuantizationSite
from compression_manager.testing.contract.base import ContractRuns, Parts, require, require_none
from compression_manager.testing.contract.leaving import Before
from compression_manager.testing.failing import InjectedError, fail, failing
from compression_manager.testing.recording import RecordingConfig

_SITE = QuantizationSite("layer", "activation")


class FailureContract(ContractRuns):
    """Tests of plugins whose hooks raise."""

    def test_failure_in_every_hook(self) -> None:
        """Whichever hook raises, before its work or after it: it is named, and all is undone."""
        config = self._build("hooks").config
        plugin_class = self._plugin_class(config)
        for attribute, hook in _hooks(plugin_class(config)).items():
            for after in (False, True):
                self._check(plugin_class, attribute, hook, after=after)

    def _check(
        self, plugin_class: type[Plugin[Any]], attribute: str, hook: str, *, after: bool
    ) -> None:
        when = f"'{hook}' raises {'after' if after else 'before'} its work"
        parts = self._build(f"{attribute} {'after' if after else 'before'}")
        before = Before.of(parts)
        plugin = failing(plugin_class, attribute, after=after)(parts.config)
        errors = self._use_everything(parts, [plugin, *parts.companions, _Asking(hook)])
        require(
            errors,
            f"the tests do not reach the hook '{hook}' of {plugin_class.__name__}, or what it "
            "raises is caught; let make_config, make_companions or make_model bring about that "
            "it is called.",
        )
        error = errors[0]
        require(
            isinstance(error, PluginError)
            and (error.plugin, error.hook) == (plugin.name, hook)
            and isinstance(error.__cause__, InjectedError),
            f"when {when}, the error does not name plugin '{plugin.name}' and that hook; do not "
            f"catch what hooks and services raise: {error!r}",
        )
        closing = [*map(str, errors[1:]), *getattr(error, "__notes__", ())]
        require_none(
            closing,
            f"when {when}, closing fails; callbacks of add_cleanup and on_exception must work "
            "however far the plugin came:",
        )
        require_none(
            before.changes(),
            f"when {when}, closing leaves traces; register each undo with context.add_cleanup "
            "right where the change is made:",
        )

    def _use_everything(self, parts: Parts, plugins: Sequence[Any]) -> list[Exception]:
        """Reach every hook and close; return what plugins raised."""
        errors: list[Exception] = []
        try:
            run = self._prepare(parts, plugins)
        except Exception as error:
            return [error]
        try:
            run.train(epochs=1)
            with suppress(ConfigError):  # nothing quantizes
                run.manager.convert()
            with suppress(InjectedError):
                run.train(epochs=2, after_step=fail)
        except Exception as error:
            errors.append(error)
        try:
            run.manager.close()
        except Exception as error:
            errors.append(error)
        return errors


class _Asking(Plugin[RecordingConfig]):
    """Asks for details at every step, and for the service under test."""

    config_class = RecordingConfig

    def __init__(self, service: str) -> None:
        super().__init__(RecordingConfig())
        self._service = service

    @hookimpl
    def on_train_begin(self, context: Context) -> None:
        """Ask for the service; nobody needs to answer."""
        services, scheme = context.services, QuantizationScheme()
        with suppress(ConfigError):
            if self._service == "make_observer":
                services.make_observer(scheme, _SITE)
            elif self._service == "make_fake_quantizer":
                services.make_fake_quantizer(scheme, _SITE)
            elif self._service == "make_distillation_loss":
                services.make_distillation_loss("KL", {"temperature": 1.0})

    @hookimpl
    def on_step_begin(self, context: Context) -> None:
        """Ask for details."""
        context.request_details()


def _hooks(plugin: Plugin[Any]) -> dict[str, str]:
    """Return name of the method -> hook."""
    return {
        attribute: getattr(method, f"{PROJECT_NAME}_impl").get("specname") or attribute
        for attribute, method in implemented_hooks(plugin).items()
    }
