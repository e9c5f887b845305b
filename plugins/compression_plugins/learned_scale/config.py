"""Options of the learned-scale plugin."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from compression_manager.configuration.checks import (
    require_not_negative,
    require_positive,
    require_type,
)
from compression_manager.errors import ConfigError
from compression_manager.plugin import PluginConfig, option
from compression_manager.quantization.arithmetic.parameters import MIN_SCALE


@dataclass(frozen=True)
class LearnedScaleConfig(PluginConfig):
    """Quantization with learned scales (LSQ), and learned zero points of affine schemes (LSQ+).

    Listed beside `QATConfig`, which says what is quantized, with which scheme and from when on.

    Raises:
        ConfigError: an option of a wrong type or out of range, or nothing to learn.
    """

    plugin: ClassVar[str] = "learned_scale"

    weights: bool = field(default=True, metadata=option("Learn the scales of weights."))
    activations: bool = field(
        default=True, metadata=option("Learn the scales and zero points of layer inputs.")
    )
    gradient_scaling: bool = field(
        default=True,
        metadata=option("Multiply the scales' gradients by LSQ's 1 / sqrt(N * Q)."),
    )
    learning_rate_factor: float = field(
        default=1.0,
        metadata=option("Learning rate of the scales, as a factor of the first group's."),
    )
    minimum_scale: float = field(
        default=MIN_SCALE, metadata=option("No scale falls below this value.")
    )

    def __post_init__(self) -> None:
        for name in ("weights", "activations", "gradient_scaling"):
            require_type(self, name, getattr(self, name), bool)
        if not (self.weights or self.activations):
            raise ConfigError(
                "LearnedScaleConfig learns nothing with weights=False and activations=False; "
                "leave it out of the list."
            )
        require_not_negative(self, "learning_rate_factor", self.learning_rate_factor)
        require_positive(self, "minimum_scale", self.minimum_scale)
