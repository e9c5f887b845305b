"""How fast the converted model runs, by every route, as a multiple of float32 eager's speed.

    make bench-inference
    python tests/benchmarks/inference.py --threads 2 --routes float32 int8-eager int8-openvino

The int8 model is the float model, quantized after training on one batch; all routes run that one,
but for the last two, whose model has no zero points and quantizes query, key and value of attention
as well, as OpenVINO's own quantization does. The very last computes what is not quantized in
bfloat16. They take turns in one process, on the same batch. Every speed-up is over the float32
model, called eagerly, of the same round. A route that returns something else than the converted
model is listed with its error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compression_manager import prepare_compression
from compression_manager.deploy import routes
from compression_manager.deploy.parity import MODEL_TOLERANCE
from compression_manager.deploy.reference import Reference
from compression_manager.deploy.routes import Source
from compression_manager.quantization import QuantizationScheme
from compression_plugins import PTQConfig
from measuring import machine
from measuring.command import model_parser
from measuring.models import WORKLOADS, Workload, let_attention_be_quantized
from measuring.outputs import relative_error
from measuring.report import bar_chart, row, write_json
from measuring.timing import Duration, Spread, interleaved, milliseconds, ratios

BASELINE = "float32"
BARS = {"encoder": 7.0, "resnet": 18.0}
"""Workload -> the smallest speed-up of the best route that is wanted, on a processor with AMX."""

SYMMETRIC = QuantizationScheme(8)
"""Of activations without zero points, which cost most where two activations are multiplied."""
WARM_UP = 3
WIDTHS = (26, 23, 9, 10, 6)
HEADINGS = ("route", "speed-up (quartiles)", "ms", "error", "runs")

Runner = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Subject:
    """What the routes run: models in eval mode, and the batch.

    Attributes:
        symmetric: converted as well, of activations without zero points, with query, key and value
            of attention in 8 bits where there is one.
    """

    float_model: nn.Module
    converted: nn.Module
    symmetric: nn.Module
    inputs: Tensor

    def model_of(self, route: Route) -> nn.Module:
        """Return the model that a route runs."""
        model: nn.Module = getattr(self, route.runs)
        return model


@dataclass(frozen=True)
class Route:
    """One way to run one of the models.

    Attributes:
        build: makes of the model what is called with the batch; whatever it raises is the reason
            for which the route is left out.
        runs: which model of the subject.
    """

    name: str
    title: str
    build: Callable[[nn.Module, Tensor], Runner]
    runs: str = "converted"

    def runner(self, subject: Subject) -> Runner:
        """Return what is called with the batch."""
        return self.build(subject.model_of(self), subject.inputs)


def _eager(model: nn.Module, inputs: Tensor) -> Runner:
    return model


def _float_inductor(model: nn.Module, inputs: Tensor) -> Runner:
    return torch.compile(model)


def _library(name: str) -> Callable[[nn.Module, Tensor], Runner]:
    """Return what builds one of the routes that `compression_manager.deploy.fastest` measures."""

    def build(model: nn.Module, inputs: Tensor) -> Runner:
        source = Source(model, Reference.of(model, inputs))
        run, kernels = routes.ROUTES[name].build(source, int8=True)
        print(f"  {name}: {kernels}", file=sys.stderr, flush=True)
        return run

    return build


ROUTES = (
    Route(BASELINE, "float32, eager", _eager, "float_model"),
    Route("float32-inductor", "float32, Inductor", _float_inductor, "float_model"),
    Route("int8-eager", "int8, eager", _eager),
    Route("int8-inductor", "int8, Inductor", _library("inductor")),
    Route("int8-aot-inductor", "int8, AOTInductor", _library("aot_inductor")),
    Route("int8-onnxruntime", "int8, onnxruntime", _library("onnxruntime")),
    Route("int8-openvino", "int8, OpenVINO", _library("openvino")),
    Route("int8-symmetric", "int8, OpenVINO, symmetric", _library("openvino"), "symmetric"),
    Route("int8-bfloat16", "int8, OpenVINO, bfloat16", _library("openvino_bfloat16"), "symmetric"),
)


@dataclass(frozen=True)
class Result:
    """What was measured of one route.

    Attributes:
        speed_up: median over the rounds, over float32 eager.
        quartiles: first and third quartile of the same.
        milliseconds: median of a batch.
        error: relative error of the output, compared with that of the model it runs.
        runs: timed rounds.
        skipped: why nothing was measured; the figures are None then.
    """

    model: str
    route: str
    title: str
    speed_up: float | None = None
    quartiles: tuple[float, float] | None = None
    milliseconds: float | None = None
    error: float | None = None
    runs: int = 0
    skipped: str | None = None

    @property
    def is_right(self) -> bool:
        """Whether the output is that of the model, as far as the library promises it."""
        return self.error is not None and self.error <= MODEL_TOLERANCE

    def __str__(self) -> str:
        if self.skipped is not None:
            return f"{self.title:<{WIDTHS[0]}}  skipped: {self.skipped}"
        spread = Spread(self.speed_up, *self.quartiles)
        cells = [self.title, spread, f"{self.milliseconds:.2f}", f"{self.error:.1e}", self.runs]
        return row(cells, WIDTHS) + ("" if self.is_right else "  wrong output")


def subject_of(workload: Workload) -> Subject:
    """Quantize the workload's model, calibrated on its first batch, and convert it."""
    changed = workload.build()
    let_attention_be_quantized(changed)
    symmetric = _converted(changed, workload, activation=SYMMETRIC)
    converted = _converted(workload.build(), workload)
    return Subject(workload.build().eval(), converted, symmetric, workload.inputs)


def _converted(model: nn.Module, workload: Workload, **schemes: QuantizationScheme) -> nn.Module:
    config = PTQConfig(calibration_data=[workload.inputs], **schemes)
    manager = prepare_compression(model, [config])
    converted = manager.convert(workload.inputs)
    manager.close()
    return converted.eval()


def measure(
    workload: Workload, routes: Sequence[Route], runs: int, seconds: float | None
) -> list[Result]:
    """Build the routes, compare their outputs, and time them in turns."""
    runners: dict[str, Runner] = {}
    errors: dict[str, float] = {}
    skipped: dict[str, str] = {}
    subject = subject_of(workload)
    inputs = subject.inputs.clone()
    with torch.no_grad():
        for route in routes:
            print(f"building {workload.name}, {route.title} ...", file=sys.stderr, flush=True)
            try:
                expected = subject.model_of(route)(subject.inputs)
                runners[route.name] = route.runner(subject)
                output = runners[route.name](subject.inputs)
                errors[route.name] = relative_error(output, expected)
            except Exception as error:
                runners.pop(route.name, None)
                skipped[route.name] = f"{type(error).__name__}: {str(error).strip()[:200]}"
        arms = {name: _arm(run, subject.inputs) for name, run in runners.items()}
        durations = interleaved(
            arms, runs, warm_up=WARM_UP, seconds=seconds, label=workload.name, settle=True
        )
        for route in routes:
            if route.name in runners:  # the last call has to be as right as the first
                expected = subject.model_of(route)(inputs)
                last = relative_error(runners[route.name](inputs.clone()), expected)
                errors[route.name] = max(errors[route.name], last)
    results = []
    for route in routes:
        if route.name in skipped:
            reason = skipped[route.name].splitlines()[0]
            results.append(Result(workload.name, route.name, route.title, skipped=reason))
        else:
            results.append(_result(workload.name, route, durations, errors[route.name]))
    return results


def _arm(run: Runner, inputs: Tensor) -> Callable[[int], object]:
    return lambda number: run(inputs)


def _result(model: str, route: Route, durations: dict[str, list[Duration]], error: float) -> Result:
    own = durations[route.name]
    spread = Spread.of(ratios(durations[BASELINE], own))
    return Result(
        model=model,
        route=route.name,
        title=route.title,
        speed_up=spread.median,
        quartiles=(spread.low, spread.high),
        milliseconds=milliseconds(own),
        error=error,
        runs=len(own),
    )


def best(results: Sequence[Result]) -> Result | None:
    """Return the fastest route that runs the int8 model and returns what it should."""
    names = {route.name for route in ROUTES if route.runs != "float_model"}
    usable = [item for item in results if item.route in names and item.is_right]
    return max(usable, key=lambda item: item.speed_up, default=None)


def verdict(model: str, results: Sequence[Result]) -> str:
    """Return one line on the best route of a model."""
    found = best(results)
    if found is None:
        return f"{model}: no route runs the int8 model"
    text = f"{model}: the best route is {found.title}, {found.speed_up:.2f} times float32's speed"
    bar = BARS.get(model)
    if bar is None:
        return text
    return f"{text}; {'meets' if found.speed_up >= bar else 'misses'} the bar of {bar:.0f}"


def chart(path: Path, results: Sequence[Result]) -> None:
    """Draw the speed-ups, a panel per model."""
    panels: dict[str, dict[str, tuple[float, float, float]]] = {}
    for item in results:
        if item.skipped is None:
            panels.setdefault(item.model, {})[item.title] = (item.speed_up, *item.quartiles)
    title = "Speed of inference, as a multiple of float32 eager's"
    bar_chart(path, panels, title=title, axis="times the speed of float32 eager")


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    """Run from the command line; return what was measured."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    described = machine.describe_machine()
    print(machine.in_words(described), flush=True)
    results: list[Result] = []
    document: dict[str, Any] = {"benchmark": "inference", "machine": described, "models": {}}
    for name in options.models:
        workload = WORKLOADS[name](options.shrink)
        document["models"][name] = workload.description
        measured = measure(workload, options.routes, options.runs, options.seconds_per_model)
        print(f"\n{name}: {workload.description}\n{row(HEADINGS, WIDTHS)}", flush=True)
        for item in measured:
            print(item, flush=True)
        print(verdict(name, measured), flush=True)
        results += measured
        document["results"] = [asdict(item) for item in results]
        write_json(options.json, document)
    if options.chart is not None:
        chart(options.chart, results)
    return results


def parse_with_routes(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, routes: Sequence[Route]
) -> argparse.Namespace:
    """Return the options, `routes` among them: those that were chosen, behind the baseline."""
    names = {route.name: route for route in routes}
    parser.add_argument("--routes", nargs="+", choices=list(names), default=list(names))
    options = parser.parse_args(arguments)
    options.routes = [names[name] for name in dict.fromkeys([BASELINE, *options.routes])]
    return options


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = model_parser(__doc__, "inference")
    parser.add_argument("--runs", type=int, default=60, help="timed rounds at most")
    return parse_with_routes(parser, arguments, ROUTES)


if __name__ == "__main__":
    main()
