"""Questions that one plugin asks and another answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import pluggy
from torch import Tensor

from compression_manager.errors import ConfigError, suggest
from compression_manager.quantization.observer import Observer
from compression_manager.quantization.quantizers.quantizer_module import FakeQuantizer
from compression_manager.quantization.scheme import QuantizationScheme
from compression_manager.quantization.site import QuantizationSite

ANSWER_TYPES: dict[str, Any] = {
    "make_observer": Observer,
    "make_fake_quantizer": FakeQuantizer,
    "make_distillation_loss": Callable,
}
"""Service hook -> what it answers, besides None."""


class Services:
    """Typed access to the service hooks; the first plugin with an answer decides."""

    def __init__(self, hooks: pluggy.PluginManager) -> None:
        self._hook = hooks.hook

    def make_observer(self, scheme: QuantizationScheme, site: QuantizationSite) -> Observer:
        """Return a new observer for `site`.

        Raises:
            ConfigError: no plugin answers.
            PluginError: the answer is no `Observer`.
        """
        answer = self._hook.make_observer(scheme=scheme, site=site)
        return cast(Observer, _answered("make_observer", answer, f"the {site}"))

    def make_fake_quantizer(
        self, scheme: QuantizationScheme, site: QuantizationSite
    ) -> FakeQuantizer:
        """Return a new fake quantizer for `site`.

        Raises:
            ConfigError: no plugin answers.
            PluginError: the answer is no `FakeQuantizer`.
        """
        answer = self._hook.make_fake_quantizer(scheme=scheme, site=site)
        return cast(FakeQuantizer, _answered("make_fake_quantizer", answer, f"the {site}"))

    def make_distillation_loss(
        self, name: str, options: Mapping[str, Any], *, known: Iterable[str] = ()
    ) -> Callable[..., Tensor]:
        """Return `loss(student, teacher) -> scalar` for `name`; the hook says what it is given.

        Args:
            name: of the loss.
            options: the user's.
            known: names that are offered here, for the error.

        Raises:
            ConfigError: no plugin offers a loss of that name.
            PluginError: the answer cannot be called.
        """
        answer = self._hook.make_distillation_loss(name=name, options=options)
        names = list(known)
        if answer is None and names:
            raise ConfigError(
                f"no plugin offers the distillation loss '{name}'; "
                f"{suggest(name, names, limit=len(names))}"
            )
        answered = _answered("make_distillation_loss", answer, f"the loss '{name}'")
        return cast(Callable[..., Tensor], answered)


def _answered(service: str, answer: object, purpose: str) -> object:
    if answer is None:
        raise ConfigError(
            f"no plugin answers {service} for {purpose}; list a plugin that implements the hook."
        )
    return answer
