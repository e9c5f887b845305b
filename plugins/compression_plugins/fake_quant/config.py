"""Options of the quantization-aware training plugin."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from compression_manager.configuration.checks import require_choice, require_type
from compression_manager.errors import ConfigError
from compression_manager.plugin import PluginConfig, option
from compression_manager.quantization import QuantizationScheme
from compression_manager.quantization.integer.options import (
    BACKWARD,
    FORWARD,
    Backward,
    Forward,
    ProductOptions,
)
from compression_manager.training.schedule import StartAt

DEFAULT_WEIGHT = QuantizationScheme(bits=8, symmetric=True, granularity="channel", axis=0)
DEFAULT_ACTIVATION = QuantizationScheme(bits=8, symmetric=False, signed=False)


@dataclass(frozen=True)
class LayerRule:
    """An exception for some layers; of several rules that match, the last one applies.

    Exactly one of `layer` and `module_class` is set.
    """

    layer: str | None = field(
        default=None,
        metadata=option("Qualified layer name, or a glob such as 'encoder.*.linear?'."),
    )
    module_class: str | None = field(
        default=None, metadata=option("Class name of the layers, for example 'Embedding'.")
    )
    skip: bool = field(default=False, metadata=option("Leave the layers in floating point."))
    weight_only: bool = field(
        default=False, metadata=option("Quantize the weight and leave the input in float.")
    )
    weight: QuantizationScheme | None = field(
        default=None, metadata=option("Scheme of the weight; default: that of all weights.")
    )
    activation: QuantizationScheme | None = field(
        default=None, metadata=option("Scheme of the input; default: that of all inputs.")
    )

    def __post_init__(self) -> None:
        if (self.layer is None) == (self.module_class is None):
            raise ConfigError(
                "a LayerRule takes either layer or module_class, "
                f"got layer={self.layer!r}, module_class={self.module_class!r}."
            )
        for selector, value in (("layer", self.layer), ("module_class", self.module_class)):
            if value is not None and not isinstance(value, str):
                name = value.__name__ if isinstance(value, type) else str(value)
                raise ConfigError(
                    f"LayerRule.{selector} takes a name, got {value!r}; write {selector}={name!r}."
                )
        if self.skip and (self.weight or self.activation or self.weight_only):
            raise ConfigError(f"{self}: skip=True leaves nothing to choose a scheme for.")
        if self.weight_only and self.activation is not None:
            raise ConfigError(f"{self}: weight_only=True contradicts an activation scheme.")
        require_type(self, "weight", self.weight, (QuantizationScheme, type(None)))
        if self.weight is not None:
            check_weight("LayerRule.weight", self.weight)
        check_activation("LayerRule.activation", self.activation)

    def __str__(self) -> str:
        if self.layer is not None:
            return f"LayerRule(layer={self.layer!r})"
        return f"LayerRule(module_class={self.module_class!r})"


class SchemeOptions(Protocol):
    """The options that say what is quantized, and how."""

    @property
    def weight(self) -> QuantizationScheme:
        """Scheme of all weights."""

    @property
    def activation(self) -> QuantizationScheme | None:
        """Scheme of all layer inputs."""

    @property
    def overrides(self) -> tuple[LayerRule, ...]:
        """Exceptions per layer."""


@dataclass(frozen=True)
class QATConfig(PluginConfig):
    """Quantization-aware training: int8 weights per channel, int8 activations per tensor.

    The default observes ranges in the first training step and fake-quantizes from the second.
    """

    plugin: ClassVar[str] = "qat"

    weight: QuantizationScheme = field(
        default=DEFAULT_WEIGHT, metadata=option("Scheme of all weights.")
    )
    activation: QuantizationScheme | None = field(
        default=DEFAULT_ACTIVATION,
        metadata=option("Scheme of all layer inputs; null quantizes weights only."),
    )
    overrides: tuple[LayerRule, ...] = field(
        default=(), metadata=option("Exceptions per layer; the last rule that matches applies.")
    )
    observe_at: StartAt = field(
        default=StartAt(step=0), metadata=option("When observers start to follow the ranges.")
    )
    fake_quantize_at: StartAt = field(
        default=StartAt(step=1),
        metadata=option("When fake quantization starts; of inputs, once a range was observed."),
    )
    freeze_observers_at: StartAt | None = field(
        default=None, metadata=option("When activation ranges stop changing; null: never.")
    )
    freeze_batch_norm_at: StartAt | None = field(
        default=None, metadata=option("When BatchNorm statistics stop changing; null: never.")
    )

    forward: Forward = field(
        default="auto",
        metadata=option(
            "Arithmetic of the products in forward: 'auto' (integers in evaluation, and in "
            "training where the machine multiplies them fast), 'integer' (wherever they are "
            "exact) or 'fake' (fake quantization, which can be differentiated twice)."
        ),
    )
    backward: Backward = field(
        default="float32",
        metadata=option(
            "Arithmetic of the products in backward: 'float32', 'bfloat16x3' (float32's accuracy "
            "from three bfloat16 products; on CPUs with AMX) or 'bfloat16' (with AMX or AVX-512 "
            "BF16)."
        ),
    )

    def __post_init__(self) -> None:
        check_schemes(self)
        self._check_phases()
        require_choice(self, "forward", self.forward, FORWARD)
        require_choice(self, "backward", self.backward, BACKWARD)

    @property
    def products(self) -> ProductOptions:
        """How the layers multiply."""
        return ProductOptions(self.forward, self.backward)

    def _check_phases(self) -> None:
        for name in ("observe_at", "fake_quantize_at"):
            require_type(self, name, getattr(self, name), StartAt)
        for name in ("freeze_observers_at", "freeze_batch_norm_at"):
            require_type(self, name, getattr(self, name), (StartAt, type(None)))
        frozen, observe = self.freeze_observers_at, self.observe_at
        if frozen is None:
            return
        for end, start in ((frozen.step, observe.step), (frozen.epoch, observe.epoch)):
            if end is not None and start is not None and end <= start:
                raise ConfigError(
                    f"QATConfig.freeze_observers_at ({frozen}) must come after observe_at "
                    f"({observe}), or no range is ever observed."
                )


def check_schemes(config: SchemeOptions) -> None:
    """Check the options weight, activation and overrides, and make the last one a tuple.

    Raises:
        ConfigError: a wrong type, or a scheme that does not fit weights or inputs.
    """
    owner = type(config).__name__
    require_type(config, "weight", config.weight, QuantizationScheme)
    check_weight(f"{owner}.weight", config.weight)
    check_activation(f"{owner}.activation", config.activation)
    require_type(config, "overrides", config.overrides, (tuple, list))
    for rule in config.overrides:
        if not isinstance(rule, LayerRule):
            raise ConfigError(f"{owner}.overrides takes LayerRule objects, got {rule!r}.")
    object.__setattr__(config, "overrides", tuple(config.overrides))


def check_weight(where: str, scheme: QuantizationScheme) -> None:
    """Raise ConfigError unless `scheme` fits a weight, whose range always is its own."""
    if scheme.dynamic:
        raise ConfigError(
            f"{where}: dynamic=True is for inputs; a weight's range follows its values anyway."
        )


def check_activation(where: str, scheme: QuantizationScheme | None) -> None:
    """Raise ConfigError unless `scheme` fits an activation: None, per tensor or per token."""
    if scheme is None:
        return
    if not isinstance(scheme, QuantizationScheme):
        raise ConfigError(f"{where} takes a QuantizationScheme, got {type(scheme).__name__}.")
    if scheme.granularity not in ("tensor", "token"):
        raise ConfigError(
            f"{where}: inputs have one range per 'tensor', or per 'token' with dynamic=True, got "
            f"granularity '{scheme.granularity}'."
        )
