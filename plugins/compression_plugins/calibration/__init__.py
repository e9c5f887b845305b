"""Calibration: the observers that watch a tensor's range.

Other plugins ask through the service `make_observer`; this one answers with a min-max or a
moving-average observer. It owns the policy for NaN and infinity: a batch that holds any is
left out as a whole, counted, and reported as a warning at the end of the epoch.
"""

from compression_plugins.calibration.config import CalibrationConfig
from compression_plugins.calibration.observers import MinMaxObserver, MovingAverageObserver
from compression_plugins.calibration.plugin import CalibrationPlugin

__all__ = ["CalibrationConfig", "CalibrationPlugin", "MinMaxObserver", "MovingAverageObserver"]
