"""The built-in observers; `compression_manager.quantization.calibration` chooses among them."""

from compression_manager.quantization.observers.base import RangeObserver
from compression_manager.quantization.observers.binned import BinnedObserver
from compression_manager.quantization.observers.extremes import (
    MinMaxObserver,
    MovingAverageObserver,
)
from compression_manager.quantization.observers.fixed import FixedRangeObserver
from compression_manager.quantization.observers.histogram import HistogramObserver
from compression_manager.quantization.observers.percentile import PercentileObserver

__all__ = [
    "RangeObserver",
    "MinMaxObserver",
    "MovingAverageObserver",
    "BinnedObserver",
    "PercentileObserver",
    "HistogramObserver",
    "FixedRangeObserver",
]
