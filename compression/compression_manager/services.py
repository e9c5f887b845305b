"""Questions that one plugin asks and another answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pluggy
from torch import Tensor

from compression_manager.errors import ConfigError, PluginError
from compression_manager.quantization.observer import Observer
from compression_manager.quantization.quantizer_module import FakeQuantizer
from compression_manager.quantization.scheme import QuantizationScheme
from compression_manager.quantization.site import QuantizationSite


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
        _check("make_observer", answer, Observer, f"the {site.role} of layer '{site.layer}'")
        return answer  # type: ignore[no-any-return]

    def make_fake_quantizer(
        self, scheme: QuantizationScheme, site: QuantizationSite
    ) -> FakeQuantizer:
        """Return a new fake quantizer for `site`.

        Raises:
            ConfigError: no plugin answers.
            PluginError: the answer is no `FakeQuantizer`.
        """
        answer = self._hook.make_fake_quantizer(scheme=scheme, site=site)
        _check(
            "make_fake_quantizer", answer, FakeQuantizer, f"the {site.role} of layer '{site.layer}'"
        )
        return answer  # type: ignore[no-any-return]

    def make_distillation_loss(
        self, name: str, options: Mapping[str, Any]
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """Return `loss(student_logits, teacher_logits) -> scalar` for `name`.

        Raises:
            ConfigError: no plugin offers a loss of that name.
        """
        answer = self._hook.make_distillation_loss(name=name, options=options)
        _check("make_distillation_loss", answer, Callable, f"the loss '{name}'")
        return answer  # type: ignore[no-any-return]


def _check(service: str, answer: object, expected: Any, purpose: str) -> None:
    if answer is None:
        raise ConfigError(
            f"no plugin answers {service} for {purpose}; list a plugin that implements the hook."
        )
    if not isinstance(answer, expected):
        raise PluginError(
            f"{service} for {purpose} must return {getattr(expected, '__name__', expected)}, "
            f"got {type(answer).__name__}.",
            plugin="unknown",
            hook=service,
        )
