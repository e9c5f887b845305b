"""Which way to run a converted model is the fastest on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from compression_manager.configuration.checks import require_integer
from compression_manager.deploy.packages import install_command, missing_packages
from compression_manager.deploy.parity import MODEL_TOLERANCE
from compression_manager.deploy.progress import progress
from compression_manager.deploy.reference import Reference, require_converted
from compression_manager.deploy.routes import Route, Runner, Source, find_routes
from compression_manager.errors import CompressionError
from compression_manager.models.calling import (
    call_model,
    quiet_evaluation,
    tensors_in,
    without_labels,
)
from compression_manager.tracing.program import batch_size, brief

# A clock and a scheduler disturb shorter bursts by more than a percent.
_BURST_SECONDS = 0.05


@dataclass(frozen=True)
class RouteResult:
    """What was found out about one way to run a model.

    Attributes:
        route: its name.
        kernels: what it computes with.
        output_error: relative error (root mean square) of its outputs, compared with the
            converted model's; None if there is no output.
        ready_seconds: time from the converted model to its first output; None if there was none.
        milliseconds: median over the rounds of the time of a call; None if it was not measured.
        spread: distance of the quartiles of that time, in milliseconds.
        ratio: `milliseconds` divided by those of the route `eager`.
        left_out: why it was not measured, or None.
    """

    route: str
    kernels: str = ""
    output_error: float | None = None
    ready_seconds: float | None = None
    milliseconds: float | None = None
    spread: float | None = None
    ratio: float | None = None
    left_out: str | None = None


@dataclass(frozen=True)
class Fastest:
    """The fastest way to run a model, and the table; called as the model is.

    Attributes:
        best: of the fastest route; one of `results`.
        run: what is called: arguments and results as the converted model's.
        results: of every route, in the order of `ROUTES`.
        batch_size: of the inputs that were measured.
        threads: torch's number of threads, which all routes were given.
    """

    best: RouteResult
    run: Callable[..., Any]
    results: tuple[RouteResult, ...]
    batch_size: int
    threads: int

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the converted model returns, without gradients."""
        return self.run(*args, **kwargs)

    def __str__(self) -> str:
        """Return the table."""
        header = ("route", "kernels", "ms", "spread", "ratio", "error", "ready in s", "")
        rows = [header, *(_row(result, result is self.best) for result in self.results)]
        widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
        lines = ["  ".join([*map(str.ljust, row[:-1], widths), row[-1]]) for row in rows]
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return "\n".join(
            [f"batch size {self.batch_size}, {threads}", *(line.rstrip() for line in lines)]
        )


def fastest(
    model: nn.Module,
    inputs: Any,
    *,
    routes: Collection[str] | None = None,
    rounds: int = 20,
) -> Fastest:
    """Measure the ways to run a converted model on this machine, and return the fastest.

    Each route is built, its outputs are compared with the model's, and those that agree are timed
    in turn, `rounds` times, so that whatever else the machine does meets all of them. A route whose
    8-bit kernels give other outputs is listed and never chosen; onnxruntime and OpenVINO then get
    a second row, computing the same numbers in float32. Progress is shown on stderr. Compiling
    takes half a minute and more for each of `inductor` and `aot_inductor`.

    Args:
        model: what `convert` returned or `deploy.load` loaded; stays as it is.
        inputs: what it is called with, as for `export`; times hold for their batch size.
        routes: names out of `eager`, `channels_last` (`eager` with images in that memory format),
            `inductor`, `aot_inductor`, `onnxruntime`, `openvino` and `openvino_bfloat16` (with what
            is not quantized in bfloat16); None for all that make sense but the last one. `eager`,
            the model as it is, is always measured.
        rounds: how often each route is timed, for a twentieth of a second or one call.

    Raises:
        ConfigError: an unknown route, a model that was not converted, or inputs that it does not
            take.
    """
    require_converted(model, "fastest")
    require_integer("fastest", "rounds", rounds, minimum=1)
    inputs = without_labels(inputs)
    chosen = find_routes(routes, inputs)
    reference = Reference.of(model, inputs)
    results: list[RouteResult] = []
    runners: dict[int, Runner] = {}
    with (
        progress("finding the fastest route", total=len(chosen) + rounds) as begin,
        quiet_evaluation(model, restore_buffers=True),
    ):
        source = Source(model, reference)
        for route in chosen:
            begin(f"building {route.name}")
            for result, run in _try(route, source):
                if run is not None:
                    runners[len(results)] = run
                results.append(result)
        times = _measure(runners, inputs, rounds, begin)
    median = {index: statistics.median(values) for index, values in times.items()}
    best = min(median, key=median.__getitem__)
    for index, values in times.items():
        results[index] = _timed(results[index], values, median[0])
    return Fastest(
        results[best],
        runners[best],
        tuple(results),
        batch_size(inputs),
        torch.get_num_threads(),
    )


def _try(route: Route, source: Source) -> Iterator[tuple[RouteResult, Runner | None]]:
    """Yield what came of each setting of a route, up to the first that can be measured."""
    missing = missing_packages(route.packages)
    if missing:
        reason = f"{' and '.join(missing)} missing: {install_command(route.extra)}"
        yield RouteResult(route.name, left_out=reason), None
        return
    elsewhere = {str(item.device) for item in tensors_in(source.reference.output)} - {"cpu"}
    if route.cpu_only and elsewhere:
        yield RouteResult(route.name, left_out=f"runs on the CPU, not on {elsewhere.pop()}"), None
        return
    for int8 in route.int8_settings:
        result, run = _build(route, source, int8)
        yield result, run
        if run is not None or result.output_error is None:
            return


def _build(route: Route, source: Source, int8: bool) -> tuple[RouteResult, Runner | None]:
    """Build a route and compare its outputs."""
    # What routes share is counted for each of them.
    shared = source.onnx_seconds if route.from_onnx else 0.0
    begin, kernels = time.perf_counter(), ""
    try:
        run, kernels = route.build(source, int8=int8)
        error, allowed = source.reference.measure(run, MODEL_TOLERANCE, route.name)
    except Exception as failure:
        reason = str(failure) if isinstance(failure, CompressionError) else brief(failure)
        return RouteResult(route.name, kernels, left_out=reason), None
    ready = time.perf_counter() - begin + shared
    if not error <= allowed:
        reason = f"wrong outputs: relative error {error:.2g}, allowed {allowed:.2g}"
        return RouteResult(route.name, kernels, error, ready, left_out=reason), None
    return RouteResult(route.name, kernels, error, ready), run


def _measure(
    runners: Mapping[int, Runner], inputs: Any, rounds: int, begin: Callable[[str], None]
) -> dict[int, list[float]]:
    """Return the milliseconds of a call in each round, in turn over the runners."""
    calls = {
        index: max(1, round(_BURST_SECONDS / _burst(run, inputs, 1)))
        for index, run in runners.items()
    }
    times: dict[int, list[float]] = {index: [] for index in runners}
    for number in range(rounds):
        begin(f"round {number + 1} of {rounds}")
        for index, run in runners.items():
            times[index].append(1000 * _burst(run, inputs, calls[index]))
    return times


def _burst(run: Runner, inputs: Any, calls: int) -> float:
    """Return the seconds of a call, after one that is not counted.

    That one meets the caches, and the waiting threads, that another runtime left.
    """
    call_model(run, inputs)
    _wait_for_device()
    begin = time.perf_counter()
    for _ in range(calls):
        call_model(run, inputs)
    _wait_for_device()
    return max((time.perf_counter() - begin) / calls, 1e-9)


def _wait_for_device() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _timed(result: RouteResult, values: list[float], eager: float) -> RouteResult:
    median = statistics.median(values)
    spread = 0.0
    if len(values) > 1:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        spread = high - low
    return replace(result, milliseconds=median, spread=spread, ratio=median / eager)


def _row(result: RouteResult, best: bool) -> tuple[str, ...]:
    """Return the cells of the table."""
    return (
        result.route,
        result.kernels,
        _cell(result.milliseconds, ".3f"),
        _cell(result.spread, ".3f"),
        _cell(result.ratio, ".2f"),
        _cell(result.output_error, ".1e"),
        _cell(result.ready_seconds, ".1f"),
        result.left_out or ("fastest" if best else ""),
    )


def _cell(value: float | None, format: str) -> str:
    return "-" if value is None else f"{value:{format}}"
