"""The plugin that answers `make_observer`."""

from __future__ import annotations

import warnings

from compression_manager.errors import blame_option
from compression_manager.plugin import Plugin, hookimpl
from compression_manager.quantization import Observer, QuantizationScheme, QuantizationSite
from compression_manager.quantization.observers import RangeObserver
from compression_plugins.calibration.config import CalibrationConfig


class CalibrationPlugin(Plugin[CalibrationConfig]):
    """Builds observers, and warns where batches had to be left out.

    Warns once per layer, at the end of the epoch or of training.
    """

    config_class = CalibrationConfig
    roles = frozenset({"calibration"})

    def __init__(self, config: CalibrationConfig) -> None:
        super().__init__(config)
        # Watched until their first skipped batch is reported.
        self._watched: list[tuple[QuantizationSite, RangeObserver]] = []

    @hookimpl(trylast=True)
    def make_observer(self, scheme: QuantizationScheme, site: QuantizationSite) -> Observer:
        """Return a new observer of the configured kind."""
        option = "weight_observer" if site.role == "weight" else "observer"
        with blame_option(option):
            observer = self.config.calibration(option).make_observer(scheme, site)
        observer.synchronize = self.config.synchronize
        if isinstance(observer, RangeObserver):
            self._watched.append((site, observer))
        return observer

    @hookimpl
    def on_epoch_end(self) -> None:
        """Warn about batches that were left out."""
        self._report_skipped()

    @hookimpl
    def on_train_end(self) -> None:
        """Warn about batches that were left out."""
        self._report_skipped()

    def _report_skipped(self) -> None:
        skipped: list[str] = []
        clean: list[tuple[QuantizationSite, RangeObserver]] = []
        for site, observer in self._watched:
            count = int(observer.batches_skipped)
            if count:
                skipped.append(f"{site} ({count})")
            else:
                clean.append((site, observer))
        if not skipped:
            return
        self._watched = clean
        warnings.warn(
            f"{self.name}: batches with NaN or infinity were left out of the observed ranges: "
            f"{', '.join(skipped)}. Check the data and the learning rate.",
            stacklevel=2,
        )
