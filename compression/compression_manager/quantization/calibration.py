"""How ranges are found: options that make observers, for plugins and for `Quantizer` alike."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

from compression_manager.errors import ConfigError, suggest
from compression_manager.plugin import option
from compression_manager.quantization.observer import Observer
from compression_manager.quantization.observers import (
    FixedRangeObserver,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageObserver,
    PercentileObserver,
)
from compression_manager.quantization.observers.binned import MIN_BINS
from compression_manager.quantization.observers.histogram import OBJECTIVES
from compression_manager.quantization.scheme import QuantizationScheme
from compression_manager.quantization.site import QuantizationSite

_BINS_HELP = f"Bins of the histogram of each scale, at least {MIN_BINS}."


@dataclass(frozen=True)
class Calibration(ABC):
    """Base of all calibrations: an immutable recipe for observers; it holds no ranges."""

    @abstractmethod
    def make_observer(self, scheme: QuantizationScheme, site: QuantizationSite) -> Observer:
        """Return a new observer for `site`.

        Raises:
            QuantizationError: the observer does not fit the scheme or the site.
        """


@dataclass(frozen=True)
class MinMaxCalibration(Calibration):
    """The smallest and largest value of all batches; nothing is clipped."""

    def make_observer(self, scheme: QuantizationScheme, site: QuantizationSite) -> MinMaxObserver:
        """Return a new `MinMaxObserver`."""
        return MinMaxObserver(scheme, site)


@dataclass(frozen=True)
class MovingAverageCalibration(Calibration):
    """A moving average of every batch's smallest and largest value.

    Raises:
        ConfigError: a constant outside of (0, 1].
    """

    averaging_constant: float = field(
        default=0.01,
        metadata=option("Share of a new batch in a moving average, above 0 and at most 1."),
    )

    def __post_init__(self) -> None:
        check_averaging_constant(self.averaging_constant, "MovingAverageCalibration")

    def make_observer(
        self, scheme: QuantizationScheme, site: QuantizationSite
    ) -> MovingAverageObserver:
        """Return a new `MovingAverageObserver`."""
        return MovingAverageObserver(scheme, site, self.averaging_constant)


@dataclass(frozen=True)
class PercentileCalibration(Calibration):
    """The range that contains a percentage of all values.

    Raises:
        ConfigError: a percentile outside of (0, 100], or too few bins.
    """

    percentile: float = field(
        default=99.99,
        metadata=option("Percentage of the values in the range, above 0 and at most 100."),
    )
    bins: int = field(default=2048, metadata=option(_BINS_HELP))

    def __post_init__(self) -> None:
        where = "PercentileCalibration"
        _check_number(self.percentile, where, "percentile")
        if not 0.0 < self.percentile <= 100.0:
            raise ConfigError(
                f"{where}: percentile is above 0 and at most 100, got {self.percentile}."
            )
        _check_bins(self.bins, where)

    def make_observer(
        self, scheme: QuantizationScheme, site: QuantizationSite
    ) -> PercentileObserver:
        """Return a new `PercentileObserver`."""
        return PercentileObserver(scheme, site, self.percentile, self.bins)


@dataclass(frozen=True)
class HistogramCalibration(Calibration):
    """The range that is best for the scheme, by one of two objectives.

    Raises:
        ConfigError: an unknown objective, or too few bins.
    """

    objective: str = field(
        default="squared_error",
        metadata=option(
            "What is least: 'squared_error' of quantization, or 'kl_divergence' of the "
            "distributions before and after it (TensorRT's; activations only)."
        ),
    )
    bins: int = field(
        default=2048,
        metadata=option(
            f"Bins of the histogram of each scale, at least {MIN_BINS}; activations need "
            "8 * 2^bits."
        ),
    )

    def __post_init__(self) -> None:
        where = "HistogramCalibration"
        if self.objective not in OBJECTIVES:
            raise ConfigError(
                f"{where}: objective {self.objective!r} does not exist; "
                f"{suggest(str(self.objective), OBJECTIVES)}"
            )
        _check_bins(self.bins, where)

    def make_observer(
        self, scheme: QuantizationScheme, site: QuantizationSite
    ) -> HistogramObserver:
        """Return a new `HistogramObserver`."""
        return HistogramObserver(scheme, site, self.objective, self.bins)


@dataclass(frozen=True)
class FixedRangeCalibration(Calibration):
    """A range that is known beforehand, for example of normalized inputs or of a sigmoid.

    Raises:
        ConfigError: an end that is not finite, or a minimum that is not below the maximum.
    """

    minimum: float = field(default=-1.0, metadata=option("Smallest value that is represented."))
    maximum: float = field(default=1.0, metadata=option("Largest value that is represented."))

    def __post_init__(self) -> None:
        where = "FixedRangeCalibration"
        low = _check_number(self.minimum, where, "minimum")
        high = _check_number(self.maximum, where, "maximum")
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ConfigError(
                f"{where}: minimum is below maximum and both are finite, got {low} and {high}."
            )

    def make_observer(
        self, scheme: QuantizationScheme, site: QuantizationSite
    ) -> FixedRangeObserver:
        """Return a new `FixedRangeObserver`."""
        return FixedRangeObserver(scheme, site, self.minimum, self.maximum)


CALIBRATIONS: Mapping[str, type[Calibration]] = {
    "min_max": MinMaxCalibration,
    "moving_average": MovingAverageCalibration,
    "percentile": PercentileCalibration,
    "histogram": HistogramCalibration,
    "fixed_range": FixedRangeCalibration,
}
"""The names by which recipes choose a calibration."""


def check_averaging_constant(value: object, where: str) -> None:
    """Raise ConfigError unless `value` is a number above 0 and at most 1."""
    number = _check_number(value, where, "averaging_constant")
    if not 0.0 < number <= 1.0:
        raise ConfigError(f"{where}: averaging_constant is above 0 and at most 1, got {value}.")


def _check_number(value: object, where: str, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{where}: {name} is a number, got {value!r}.")
    return value


def _check_bins(value: object, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < MIN_BINS:
        raise ConfigError(f"{where}: bins is an integer of at least {MIN_BINS}, got {value!r}.")
