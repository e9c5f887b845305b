"""Options of the calibration plugin."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from compression_manager.configuration.checks import require_type
from compression_manager.errors import ConfigError, suggest
from compression_manager.plugin import PluginConfig, option
from compression_manager.quantization import Calibration, MovingAverageCalibration
from compression_manager.quantization.calibration import CALIBRATIONS, check_averaging_constant

_CHOICES = (
    "'min_max', 'moving_average', 'percentile', 'histogram' or 'fixed_range', or a calibration "
    "with options"
)


@dataclass(frozen=True)
class CalibrationConfig(PluginConfig):
    """Which observers watch the ranges.

    In a recipe, a calibration with options is a mapping with its name as `type`:
    `observer: {type: histogram, objective: kl_divergence}`.

    Raises:
        ConfigError: an unknown observer, a constant outside of (0, 1], or an option of a wrong
            type.
    """

    plugin: ClassVar[str] = "calibration"

    observer: str | Calibration = field(
        default="moving_average",
        metadata={**option(f"Observer of activations: {_CHOICES}."), "registry": CALIBRATIONS},
    )
    weight_observer: str | Calibration = field(
        default="min_max",
        metadata={**option(f"Observer of weights: {_CHOICES}."), "registry": CALIBRATIONS},
    )
    averaging_constant: float = field(
        default=0.01,
        metadata=option(
            "Share of a new batch in a moving average chosen by name, above 0 and at most 1."
        ),
    )
    synchronize: bool = field(
        default=True,
        metadata=option(
            "Where torch.distributed is initialized, ranges are those of all ranks' batches; "
            "false for a rank that trains or calibrates a model of its own."
        ),
    )

    def __post_init__(self) -> None:
        for name in ("observer", "weight_observer"):
            value = getattr(self, name)
            known = isinstance(value, str) and value in CALIBRATIONS
            if not known and not isinstance(value, Calibration):
                raise ConfigError(
                    f"calibration: {name} {value!r} does not exist; "
                    f"{suggest(str(value), CALIBRATIONS)}"
                )
        check_averaging_constant(self.averaging_constant, "calibration")
        require_type(self, "synchronize", self.synchronize, bool)

    def calibration(self, option: str) -> Calibration:
        """Return what `observer` or `weight_observer` stands for."""
        value: str | Calibration = getattr(self, option)
        if isinstance(value, Calibration):
            return value
        if value == "moving_average":
            return MovingAverageCalibration(self.averaging_constant)
        return CALIBRATIONS[value]()
