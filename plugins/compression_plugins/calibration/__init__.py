"""Calibration: chooses the observers that watch a tensor's range.

Other plugins ask through the service `make_observer`; this one answers with an observer of
`compression_manager.quantization`: min-max, moving average, percentile or histogram. It reports
the batches that they left out because of NaN or infinity as a warning at the end of the epoch.
"""

from compression_manager.quantization import MinMaxObserver, MovingAverageObserver
from compression_plugins.calibration.config import CalibrationConfig
from compression_plugins.calibration.plugin import CalibrationPlugin

__all__ = ["CalibrationConfig", "CalibrationPlugin", "MinMaxObserver", "MovingAverageObserver"]
