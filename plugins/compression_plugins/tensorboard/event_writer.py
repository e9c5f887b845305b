"""The one module that knows `torch.utils.tensorboard`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from compression_manager.configuration.recipe import flat_recipe
from compression_manager.metrics import Metric


class EventWriter:
    """An open event file.

    Args:
        directory: folder of the run; created if needed.
        first_step: points at this step and later, from earlier event files in the folder, are
            hidden by TensorBoard; None hides nothing.
    """

    def __init__(self, directory: str | Path, *, first_step: int | None) -> None:
        # The import takes a second, which only those who train with this plugin should pay.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory), purge_step=first_step)

    def scalar(self, name: str, value: float, step: int) -> None:
        """Write one point of a curve."""
        self._writer.add_scalar(name, value, step)

    def tensor(self, metric: Metric, step: int) -> None:
        """Write a histogram of the finite values, or an image."""
        values = torch.as_tensor(metric.value).float().cpu()
        if metric.kind == "image":
            self._writer.add_image(metric.name, values, step)
            return
        finite = values[torch.isfinite(values)]
        # TensorBoard raises on NaN, infinity and on no values at all.
        if finite.numel():
            self._writer.add_histogram(metric.name, finite, step)

    def hyperparameters(self, recipe: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Write the recipe with dotted keys, tied to the curves that `metrics` names."""
        from torch.utils.tensorboard.summary import hparams

        # SummaryWriter.add_hparams would write a run of its own, in a subfolder.
        summaries = hparams(flat_recipe(recipe), dict(metrics))
        writer = self._writer._get_file_writer()
        for summary in summaries:
            writer.add_summary(summary)

    def flush(self) -> None:
        """Make everything so far readable by TensorBoard."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the file."""
        self._writer.close()
