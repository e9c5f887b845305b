"""The plugin that gives fake quantizers learned scales."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

from torch import Tensor, nn

from compression_manager import Plugin, hookimpl
from compression_manager.context import Context
from compression_manager.errors import ConfigError
from compression_manager.quantization import (
    FakeQuantizer,
    ObservedFakeQuantizer,
    QuantizationScheme,
    QuantizationSite,
)
from compression_manager.quantization.layers import (
    QuantizedLayer,
    quantized_class,
    weight_identity,
)
from compression_plugins.learned_scale.config import LearnedScaleConfig
from compression_plugins.learned_scale.quantizer import LearnedScaleQuantizer


class LearnedScalePlugin(Plugin[LearnedScaleConfig]):
    """Puts a learned scale in place of one that follows an observer.

    It replaces what is exactly an `ObservedFakeQuantizer` and takes its observer over. Whatever
    else another plugin answers to `make_fake_quantizer` stays, so that third parties' quantizers
    win wherever they are listed. Layers that share a weight share its quantizer.
    """

    config_class = LearnedScaleConfig
    roles = frozenset({"learned_scale"})

    def __init__(self, config: LearnedScaleConfig) -> None:
        super().__init__(config)
        self._context: Context | None = None
        self._quantizers: list[LearnedScaleQuantizer] = []
        # The weight is kept as well, so that its identity stays its own.
        self._of_weights: dict[object, tuple[Tensor, LearnedScaleQuantizer]] = {}

    @hookimpl
    def validate_composition(self, context: Context, plugins: Sequence[Plugin[Any]]) -> None:
        """Refuse a list in which nothing is fake-quantized."""
        self._context = context
        if not any("fake_quant" in plugin.roles for plugin in plugins):
            raise ConfigError(
                f"plugin '{self.name}' learns the scales of fake quantizers, but no plugin places "
                "any; list QATConfig() as well."
            )

    @hookimpl(wrapper=True)
    def make_fake_quantizer(
        self, scheme: QuantizationScheme, site: QuantizationSite
    ) -> Generator[None, FakeQuantizer | None, FakeQuantizer | None]:
        """Replace the default answer where scales are to be learned."""
        answer = yield
        wanted = self.config.weights if site.role == "weight" else self.config.activations
        if type(answer) is not ObservedFakeQuantizer or not wanted:
            return answer
        weight = self._weight_of(site)
        if weight is None:
            return self._learned(answer)
        key = (weight_identity(weight), scheme)
        if key not in self._of_weights:
            self._of_weights[key] = (weight, self._learned(answer))
        return self._of_weights[key][1]

    @hookimpl(trylast=True)
    def prepare_model(self, context: Context) -> None:
        """Hand over the parameters of all quantizers that other plugins asked for by now."""
        parameters = {
            name: parameter
            for quantizer in self._quantizers
            for name, parameter in quantizer.trained_parameters().items()
        }
        if not parameters:
            raise ConfigError(
                f"plugin '{self.name}' found no scale to learn: other plugins answer every "
                "make_fake_quantizer, the schemes are dynamic, or the sites that "
                f"weights={self.config.weights} and activations={self.config.activations} leave "
                "do not exist."
            )
        context.add_parameters(
            parameters,
            owner=self.name,
            learning_rate_factor=self.config.learning_rate_factor,
        )

    @hookimpl(trylast=True)
    def on_step_begin(self) -> None:
        """Set the parameters of all that begins to be quantized, once phases are switched.

        Here and not in forward, so that a compiled one finds them set.
        """
        for quantizer in self._quantizers:
            if not quantizer.phase.quantizing or quantizer.has_started:
                continue
            weight = self._weight_of(quantizer.site)
            if weight is not None or quantizer.site.role == "activation":
                quantizer.start(weight)

    @hookimpl
    def on_before_optimizer_step(self) -> None:
        """Keep the optimizer away from parameters that have no part in training now."""
        for quantizer in self._quantizers:
            quantizer.drop_idle_gradients()

    # Internals -------------------------------------------------------------------------------

    def _learned(self, answer: ObservedFakeQuantizer) -> LearnedScaleQuantizer:
        quantizer = LearnedScaleQuantizer(
            answer.scheme,
            answer.site,
            answer.observer,
            gradient_scaling=self.config.gradient_scaling,
            minimum_scale=self.config.minimum_scale,
        )
        self._quantizers.append(quantizer)
        return quantizer

    def _weight_of(self, site: QuantizationSite) -> Tensor | None:
        """Return the weight that `site` is; None for an activation, or if it is not found."""
        if site.role != "weight" or self._context is None:
            return None
        owner, _, part = site.layer.rpartition(".")
        for name, key in ((site.layer, ""), (owner, part)):
            try:
                layer = self._context.model.get_submodule(name)
            except AttributeError:  # the name of a part
                continue
            kind = _quantized_class(layer)
            operand = None if kind is None else kind.operands_of(layer).get(key)
            if operand is not None:
                return operand.weight
        return None


def _quantized_class(layer: nn.Module) -> type[QuantizedLayer] | None:
    """Return the class that `layer` has, or is to have, in training; None for other modules."""
    return type(layer) if isinstance(layer, QuantizedLayer) else quantized_class(type(layer))
