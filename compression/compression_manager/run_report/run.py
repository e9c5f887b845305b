"""A training run, read back from its folder."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compression_manager.configuration.recipe import flat_recipe
from compression_manager.errors import CheckpointError
from compression_manager.metrics import quantizer_tag
from compression_manager.run_report.curve import Curve
from compression_manager.run_report.event_files import Events, read_events
from compression_manager.run_report.find import choose_events, find_run
from compression_manager.state import Manifest, read_checkpoint
from compression_manager.training.state_checks import check_kinds

LOSS = "loss/"
EVALUATION = "eval/"
_RANGE = re.compile(r"(.+)/range_(min|max)")


@dataclass(frozen=True)
class Watched:
    """The metric that decides which evaluation is best."""

    name: str
    lower_is_better: bool


@dataclass(frozen=True)
class Range:
    """The range that a fake quantizer can represent, over the steps."""

    low: Curve
    high: Curve


@dataclass(frozen=True)
class Run:
    """What a training run left behind.

    Attributes:
        folder: what the user named.
        checkpoint: the newest checkpoint, or None.
        events: the folder of TensorBoard's event files, or None.
        global_step: optimizer steps, up to the newest checkpoint or point of a curve.
        checkpoint_step: optimizer steps of the newest checkpoint, or None.
        stop_reason: why a plugin asked to stop, or None.
        recipe: nested as a recipe is; from event files alone, a flat one with dotted keys.
        evaluations: dicts with `global_step`, `metrics` and, from a checkpoint, `epoch`.
        layers: dicts as in `describe_run`; empty if they were not recorded.
        environment: as in `describe_run`; empty if it was not recorded.
        notes: plugin -> what it has to say.
        curves: tag -> scalars of the event files, ranges left out.
        ranges: tag -> range over the steps, from event files, else from the checkpoints there.
        seconds: from the first to the last point of a curve, or None.
    """

    folder: Path
    checkpoint: Path | None
    events: Path | None
    global_step: int
    checkpoint_step: int | None
    stop_reason: str | None
    recipe: Mapping[str, Any]
    evaluations: Sequence[Mapping[str, Any]]
    layers: Sequence[Mapping[str, Any]]
    environment: Mapping[str, Any]
    notes: Mapping[str, str]
    curves: Mapping[str, Curve]
    ranges: Mapping[str, Range]
    seconds: float | None

    @property
    def losses(self) -> dict[str, Curve]:
        """Loss term -> its values; `total` is their weighted sum."""
        return _with_prefix(self.curves, LOSS)

    @property
    def metrics(self) -> dict[str, Curve]:
        """Metric -> its values in all evaluations."""
        names = dict.fromkeys(name for item in self.evaluations for name in item["metrics"])
        return {name: _metric_curve(self.evaluations, name) for name in names}

    @property
    def watched(self) -> Watched | None:
        """The metric that a plugin of the recipe watches; None if no plugin names one."""
        flat = flat_recipe(self.recipe)
        for key, value in flat.items():
            owner, _, option = key.rpartition(".")
            if option == "metric" and f"{owner}.lower_is_better" in flat and value in self.metrics:
                return Watched(value, bool(flat[f"{owner}.lower_is_better"]))
        return None

    @property
    def best(self) -> Mapping[str, Any] | None:
        """The evaluation with the best value of the watched metric, the first of equals."""
        watched = self.watched
        if watched is None:
            return None
        candidates = [item for item in self.evaluations if _is_number(item, watched.name)]
        sign = 1 if watched.lower_is_better else -1
        return min(
            candidates, key=lambda item: sign * float(item["metrics"][watched.name]), default=None
        )

    @property
    def bytes(self) -> tuple[int, int] | None:
        """Bytes of the float model and of the converted one; None if they were not recorded."""
        if not self.layers:
            return None
        before = sum(layer["bytes_before"] for layer in self.layers)
        return before, sum(layer["bytes_after"] for layer in self.layers)


def read_run(folder: Path) -> Run:
    """Read the newest checkpoint, the manifests of the others, and the event files.

    Raises:
        CheckpointError: no run is found, or several; or the newest checkpoint is damaged.
    """
    found = find_run(folder)
    newest = found.checkpoints[-1] if found.checkpoints else None
    state = None if newest is None else _state(newest)
    events_folder = choose_events(folder, found.events, None if state is None else state["recipe"])
    events = Events({}, {}, None) if events_folder is None else read_events(events_folder)
    ranges, curves = _split_ranges(events.curves)
    record = {} if newest is None else dict(newest.metadata.get("run", {}))
    step = None if state is None else int(state["global_step"])
    return Run(
        folder=folder,
        checkpoint=None if newest is None else newest.directory,
        events=events_folder,
        global_step=max(step or 0, *(curve.steps[-1] for curve in events.curves.values()), 0),
        checkpoint_step=step,
        stop_reason=state["stop"]["reason"] if state and state["stop"]["should_stop"] else None,
        recipe=events.recipe if state is None else state["recipe"],
        evaluations=_evaluations(curves) if state is None else state["evaluations"],
        layers=record.get("layers", []),
        environment=record.get("environment", {}),
        notes=record.get("notes", {}),
        curves=curves,
        ranges=ranges or _recorded_ranges(found.checkpoints),
        seconds=events.seconds,
    )


def _state(manifest: Manifest) -> dict[str, Any]:
    state = read_checkpoint(manifest.directory)
    try:
        check_kinds(state)
    except CheckpointError as error:
        raise CheckpointError(f"{manifest.directory}: {error}") from error
    return state


def _split_ranges(curves: Mapping[str, Curve]) -> tuple[dict[str, Range], dict[str, Curve]]:
    """Return the ranges by tag, and the other curves."""
    ranges = {}
    others = dict(curves)
    for tag in curves:
        match = _RANGE.fullmatch(tag)
        if match and all(f"{match[1]}/range_{end}" in others for end in ("min", "max")):
            low, high = (others.pop(f"{match[1]}/range_{end}") for end in ("min", "max"))
            ranges[match[1]] = Range(low, high)
    return ranges, others


def _recorded_ranges(checkpoints: Sequence[Manifest]) -> dict[str, Range]:
    points: dict[str, list[tuple[int, float, float]]] = {}
    for manifest in checkpoints:
        for layer in manifest.metadata.get("run", {}).get("layers", []):
            for item in layer["quantizers"]:
                if item["range"] is not None:
                    low, high = map(float, item["range"])
                    tag = quantizer_tag(layer["name"], item["part"], item["role"])
                    point = (manifest.metadata["global_step"], low, high)
                    points.setdefault(tag, []).append(point)
    ranges = {}
    for tag, found in points.items():
        steps, lows, highs = zip(*found, strict=True)
        ranges[tag] = Range(Curve(steps, lows), Curve(steps, highs))
    return ranges


def _evaluations(curves: Mapping[str, Curve]) -> list[dict[str, Any]]:
    """Return the evaluations that the event files know, oldest first."""
    found: dict[int, dict[str, float]] = {}
    for name, curve in _with_prefix(curves, EVALUATION).items():
        for step, value in zip(curve.steps, curve.values, strict=True):
            found.setdefault(step, {})[name] = value
    return [{"global_step": step, "metrics": found[step]} for step in sorted(found)]


def _metric_curve(evaluations: Sequence[Mapping[str, Any]], name: str) -> Curve:
    found = [item for item in evaluations if name in item["metrics"]]
    return Curve(
        tuple(item["global_step"] for item in found),
        tuple(float(item["metrics"][name]) for item in found),
    )


def _with_prefix(curves: Mapping[str, Curve], prefix: str) -> dict[str, Curve]:
    return {
        tag.removeprefix(prefix): curve for tag, curve in curves.items() if tag.startswith(prefix)
    }


def _is_number(evaluation: Mapping[str, Any], name: str) -> bool:
    value = float(evaluation["metrics"].get(name, "nan"))
    return value == value
