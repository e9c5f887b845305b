"""Options of the calibration plugin."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from compression_manager.errors import ConfigError, suggest
from compression_manager.plugin import PluginConfig, option

OBSERVERS = ("min_max", "moving_average")


@dataclass(frozen=True)
class CalibrationConfig(PluginConfig):
    """Which observers watch the ranges.

    Raises:
        ConfigError: an unknown observer, or a constant outside of (0, 1].
    """

    plugin: ClassVar[str] = "calibration"

    observer: str = field(
        default="moving_average",
        metadata=option("Observer of activations: 'min_max' or 'moving_average'."),
    )
    weight_observer: str = field(
        default="min_max",
        metadata=option("Observer of weights: 'min_max' or 'moving_average'."),
    )
    averaging_constant: float = field(
        default=0.01,
        metadata=option("Share of a new batch in a moving average, above 0 and at most 1."),
    )

    def __post_init__(self) -> None:
        for name in ("observer", "weight_observer"):
            value = getattr(self, name)
            if value not in OBSERVERS:
                raise ConfigError(
                    f"calibration: {name} {value!r} does not exist; "
                    f"{suggest(str(value), OBSERVERS)}"
                )
        constant = self.averaging_constant
        if isinstance(constant, bool) or not isinstance(constant, int | float):
            raise ConfigError(f"calibration: averaging_constant is a number, got {constant!r}.")
        if not 0.0 < constant <= 1.0:
            raise ConfigError(
                f"calibration: averaging_constant is above 0 and at most 1, got {constant}."
            )
