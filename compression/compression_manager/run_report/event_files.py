"""The one module that reads TensorBoard's event files."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compression_manager.run_report.curve import Curve

# Per curve; of longer ones TensorBoard's reader keeps a random sample and the last point.
MAX_POINTS = 20_000
_EVENT_FILE = "*.tfevents.*"


@dataclass(frozen=True)
class Events:
    """What a folder of event files holds.

    Attributes:
        curves: tag -> scalars.
        recipe: dotted key -> number or text, as the TensorBoard plugin writes them when training
            ends; empty before.
        seconds: time from the first to the last point, or None without points.
    """

    curves: dict[str, Curve]
    recipe: dict[str, Any]
    seconds: float | None


def holds_events(folder: Path) -> bool:
    """Return whether event files lie in `folder` itself."""
    return any(folder.glob(_EVENT_FILE))


def read_events(folder: Path) -> Events:
    """Return the scalars of all event files in `folder`, and the recipe.

    Points that a resumed run superseded are left out. A file that a killed process left is read
    as far as it goes.
    """
    # The import takes a second, which other commands should not pay.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sizes = {"scalars": MAX_POINTS, "tensors": 1, "images": 1, "histograms": 1}
    with _quiet():
        accumulator = EventAccumulator(
            str(folder), {**sizes, "compressedHistograms": 1, "audio": 1}
        ).Reload()
    curves, times = {}, []
    for tag in accumulator.Tags()["scalars"]:
        events = sorted(accumulator.Scalars(tag), key=lambda event: event.step)
        curves[tag] = Curve(
            tuple(event.step for event in events), tuple(event.value for event in events)
        )
        times += [event.wall_time for event in events]
    seconds = max(times) - min(times) if times else None
    return Events(curves, _recipe(accumulator), seconds)


def _recipe(accumulator: Any) -> dict[str, Any]:
    from tensorboard.plugins.hparams import metadata

    try:
        content = accumulator.PluginTagToContent(metadata.PLUGIN_NAME)
    except KeyError:
        return {}
    if metadata.SESSION_START_INFO_TAG not in content:
        return {}
    start = metadata.parse_session_start_info_plugin_data(content[metadata.SESSION_START_INFO_TAG])
    return {
        key: getattr(value, value.WhichOneof("kind"))
        for key, value in sorted(start.hparams.items())
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the reader from reporting superseded points, which every resumed run has."""
    logger = logging.getLogger("tensorboard")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
