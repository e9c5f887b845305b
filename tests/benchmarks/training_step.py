"""What a quantization-aware training step costs, as a ratio to the float32 step of the same model.

    make bench-training
    python tests/benchmarks/training_step.py --threads 2 --seconds-per-model 120

A step is everything between two batches: hooks, forward, loss, backward and the optimizer's step,
with observers on and weights requantized every time. All variants take turns in one process, each
with its own copy of the model, in the same memory format. Every ratio is to the float32 step of the
same round. Also counts what the forward pass keeps for the backward pass.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from measuring import machine
from measuring.command import model_parser
from measuring.memory import MIB, saved_bytes
from measuring.models import WORKLOADS, Workload
from measuring.report import bar_chart, row, write_json
from measuring.timing import Duration, Spread, interleaved, milliseconds, ratios
from measuring.variants import (
    BASELINE,
    FLOAT,
    SAVED_BARS,
    VARIANTS,
    Unavailable,
    Variant,
    VariantTrainer,
    warm_cache,
)

WARM_UP = 5
WIDTHS = (38, 21, 6, 9, 9, 7, 7, 6)
HEADINGS = ("variant", "ratio (quartiles)", "bar", "ms", "by CPU", "MiB", "ratio", "steps")


@dataclass(frozen=True)
class Result:
    """What was measured of one variant; ratios are to the float32 step.

    Attributes:
        model: name of the workload.
        ratio: median over the rounds, of the time passed.
        quartiles: first and third quartile of the same.
        cpu_ratio: the same in time of the processor, which other processes disturb less.
        milliseconds: median of a step.
        bar: the largest ratio that is wanted, if there is an aim.
        saved_mib: what the forward pass keeps for the backward pass.
        saved_ratio: of that to float32's.
        steps: timed rounds.
        skipped: why nothing was measured; the figures are None then.
    """

    model: str
    variant: str
    title: str
    ratio: float | None = None
    quartiles: tuple[float, float] | None = None
    cpu_ratio: float | None = None
    milliseconds: float | None = None
    bar: float | None = None
    saved_mib: float | None = None
    saved_ratio: float | None = None
    steps: int = 0
    skipped: str | None = None

    def __str__(self) -> str:
        if self.skipped is not None:
            return f"{self.title:<{WIDTHS[0]}}  skipped: {self.skipped}"
        spread = Spread(self.ratio, *self.quartiles)
        cells = [self.title, spread, "" if self.bar is None else f"{self.bar:.2f}"]
        cells += [f"{self.milliseconds:.1f}", f"{self.cpu_ratio:.3f}", f"{self.saved_mib:.1f}"]
        cells += [f"{self.saved_ratio:.2f}", self.steps]
        return row(cells, WIDTHS)


def measure(
    workload: Workload, variants: Sequence[Variant], steps: int, seconds: float | None
) -> list[Result]:
    """Time all variants in turns; the float32 step is the first result."""
    skipped: dict[str, str] = {}
    trainers: dict[str, VariantTrainer] = {}
    with tempfile.TemporaryDirectory() as folder:
        cache = warm_cache(workload, Path(folder) / "cache")
        for variant in (FLOAT, *variants):
            try:
                trainers[variant.name] = VariantTrainer(variant, workload, cache)
            except Unavailable as error:
                skipped[variant.name] = str(error)
        durations = interleaved(
            {name: trainer.step for name, trainer in trainers.items()},
            steps,
            warm_up=WARM_UP,
            seconds=seconds,
            label=workload.name,
        )
        saved = {name: _saved(trainer, WARM_UP + steps) for name, trainer in trainers.items()}
    results = []
    for variant in (FLOAT, *variants):
        if variant.name in skipped:
            reason = skipped[variant.name]
            results.append(Result(workload.name, variant.name, variant.title, skipped=reason))
        else:
            results.append(_result(workload.name, variant, durations, saved))
    return results


def _saved(trainer: VariantTrainer, number: int) -> int:
    losses: list[torch.Tensor] = []

    def forward() -> torch.Tensor:
        losses.append(trainer.loss(number))
        return losses[0]

    count = saved_bytes(forward, trainer.trainer.model)
    trainer.update(losses[0])
    return count


def _result(
    model: str, variant: Variant, durations: dict[str, list[Duration]], saved: dict[str, int]
) -> Result:
    own, baseline = durations[variant.name], durations[BASELINE]
    spread = Spread.of(ratios(own, baseline))
    by_cpu = statistics.median(a.cpu / b.cpu for a, b in zip(own, baseline, strict=True))
    return Result(
        model=model,
        variant=variant.name,
        title=variant.title,
        ratio=spread.median,
        quartiles=(spread.low, spread.high),
        cpu_ratio=by_cpu,
        milliseconds=milliseconds(own),
        bar=variant.bar(model),
        saved_mib=saved[variant.name] / MIB,
        saved_ratio=saved[variant.name] / saved[BASELINE],
        steps=len(own),
    )


def verdicts(results: Sequence[Result]) -> list[str]:
    """Return one line per bar that was measured: met, or missed."""
    lines = []
    for item in results:
        if item.ratio is not None and item.bar is not None:
            lines.append(_verdict(item, "ratio", item.ratio, item.bar))
        if item.saved_ratio is not None and _has_saved_bar(item):
            lines.append(_verdict(item, "saved", item.saved_ratio, SAVED_BARS[item.model]))
    return lines


def _has_saved_bar(item: Result) -> bool:
    return item.model in SAVED_BARS and item.variant.startswith("auto-")


def _verdict(item: Result, what: str, value: float, bar: float) -> str:
    outcome = "meets" if value <= bar else "misses"
    return f"{item.model}, {item.title}: {what} {value:.3f} {outcome} the bar of {bar:.2f}"


def chart(path: Path, results: Sequence[Result]) -> None:
    """Draw the ratios, a panel per model."""
    panels: dict[str, dict[str, tuple[float, float, float]]] = {}
    bars: dict[tuple[str, str], float] = {}
    for item in results:
        if item.skipped is None:
            panels.setdefault(item.model, {})[item.title] = (item.ratio, *item.quartiles)
            if item.bar is not None:
                bars[item.model, item.title] = item.bar
    bar_chart(
        path,
        panels,
        title="Time of a training step, as a ratio to float32 (red: the bar)",
        axis="ratio to the float32 step",
        bars=bars,
    )


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    """Run from the command line; return what was measured."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    described = machine.describe_machine()
    print(machine.in_words(described), flush=True)
    results: list[Result] = []
    document: dict[str, Any] = {"benchmark": "training_step", "machine": described, "models": {}}
    for name in options.models:
        workload = WORKLOADS[name](options.shrink)
        document["models"][name] = workload.description
        print(f"\n{name}: {workload.description}\n{row(HEADINGS, WIDTHS)}", flush=True)
        began = time.perf_counter()
        measured = measure(workload, options.variants, options.steps, options.seconds_per_model)
        for item in measured:
            print(item, flush=True)
        print(f"({time.perf_counter() - began:.0f} s)", file=sys.stderr, flush=True)
        results += measured
        document["results"] = [asdict(item) for item in results]
        write_json(options.json, document)
    print()
    for line in verdicts(results):
        print(line, flush=True)
    if options.chart is not None:
        chart(options.chart, results)
    return results


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = {variant.name: variant for variant in VARIANTS}
    parser = model_parser(__doc__, "training_step")
    parser.add_argument("--variants", nargs="+", choices=list(names), default=list(names))
    parser.add_argument("--steps", type=int, default=40, help="timed rounds at most")
    options = parser.parse_args(arguments)
    options.variants = [names[name] for name in dict.fromkeys(options.variants)]
    return options


if __name__ == "__main__":
    main()
