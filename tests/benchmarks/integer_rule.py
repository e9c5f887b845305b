"""Whether the rule for integer products is right: both paths of a layer, over a grid of shapes.

    make bench-rule

Every shape is trained on both paths in turns: products of integers, and float32 products of the
real numbers that the integers stand for. One turn is the forward and the backward pass of a layer
whose weight is quantized anew. The rule is wrong where the path that it chooses takes over 5%
longer than the other, and by more than both quartiles.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from compression_manager import prepare_compression
from compression_manager.quantization import FakeQuantizer
from compression_manager.quantization.integer import rule
from compression_manager.quantization.integer.geometry import Size
from compression_manager.quantization.integer.options import ProductOptions
from compression_manager.quantization.integer.selection import active_passes
from compression_manager.quantization.integer.weights import forget_weights
from compression_plugins import QATConfig
from measuring import machine
from measuring.report import RESULTS, row, write_json
from measuring.timing import Spread, interleaved, milliseconds, ratios

Kind = Literal["linear", "convolution"]

TOLERANCE = 1.05
ROWS = (32, 64, 128, 256, 512, 2048)
SIDES = ((64, 64), (256, 256), (1024, 256), (256, 1024), (512, 8))
# Channels in and out, and the side of square images, of which there are four.
CONVOLUTIONS = ((4, 64, 32), (16, 16, 16), (64, 64, 8), (64, 64, 32), (128, 256, 16))

WIDTHS = (11, 6, 7, 8, 22, 8, 12)
HEADINGS = ("layer", "rows", "summed", "columns", "integer to float32", "rule", "verdict")


@dataclass(frozen=True)
class Result:
    """Both paths of one layer.

    Attributes:
        kind: of the layer.
        size: of its product: rows, products in a sum, columns, groups.
        ratio: median over the rounds of the time on integers to that in float32.
        quartiles: first and third quartile of the same.
        milliseconds: of float32.
        chosen: path that the rule takes.
        reason: why it is not "integer".
        is_right: whether the chosen path takes at most `TOLERANCE` times as long as the other, or
            the quartiles lie on both sides of 1.
    """

    kind: Kind
    size: tuple[int, int, int, int]
    ratio: float
    quartiles: tuple[float, float]
    milliseconds: float
    chosen: str
    reason: str
    is_right: bool

    def __str__(self) -> str:
        verdict = "right" if self.is_right else "wrong"
        spread = Spread(self.ratio, *self.quartiles)
        return row([self.kind, *self.size[:3], spread, self.chosen, verdict], WIDTHS)


@contextmanager
def _in_float32() -> Iterator[None]:
    """Let the rule believe that integers never pay."""
    real = rule.why_no_integers
    rule.why_no_integers = lambda *arguments: "its float32 products are measured"
    try:
        yield
    finally:
        rule.why_no_integers = real


def _turn(layer: nn.Module, input: torch.Tensor, forward: str) -> Callable[[], None]:
    """Return what trains `layer` once, without the optimizer."""
    model = nn.Sequential(layer)
    manager = prepare_compression(model, [QATConfig(forward=forward)])
    leaf = input.clone(memory_format=torch.preserve_format).requires_grad_()
    manager.on_train_begin()
    manager.on_epoch_begin(0)
    for step in range(2):  # in the first one the range of the input is unknown
        manager.on_step_begin(step)
        output = model(leaf)
        manager.on_after_compute_loss(leaf, output, output.square().mean()).backward()
        manager.on_before_optimizer_step()
        manager.on_after_optimizer_step()
        manager.on_step_end()
    gradient = torch.randn_like(output)

    quantizers = [item for item in model.modules() if isinstance(item, FakeQuantizer)]

    def run() -> None:
        model(leaf).backward(gradient)
        forget_weights(quantizers)  # as after every optimizer step

    return run


def measure(kind: Kind, shape: Sequence[int], rounds: int, seconds: float) -> Result:
    """Time both paths of one layer.

    Args:
        kind: of the layer.
        shape: (rows, summed, columns), or (channels in, channels out, side) of a convolution.
        rounds: at most.
        seconds: at most.
    """
    torch.manual_seed(0)
    build, input, size = _layer(kind, shape)
    on_integers = _turn(build(), input, "integer")
    with _in_float32():
        in_float32 = _turn(build(), input, "auto")

    def without(number: int) -> None:
        with _in_float32():
            in_float32()

    arms = {"integer": lambda number: on_integers(), "float32": without}
    durations = interleaved(arms, rounds, warm_up=3, seconds=seconds)
    spread = Spread.of(ratios(durations["integer"], durations["float32"]))
    reason = rule.why_no_integers(
        ProductOptions("auto"), input.device, size, active_passes(), training=True
    )
    lost = spread.median if reason is None else 1 / spread.median
    cannot_tell = spread.low <= 1.0 <= spread.high
    return Result(
        kind,
        tuple(size),
        spread.median,
        (spread.low, spread.high),
        milliseconds(durations["float32"]),
        "integer" if reason is None else "float32",
        reason or "",
        lost <= TOLERANCE or cannot_tell,
    )


def _layer(kind: Kind, shape: Sequence[int]) -> tuple[Callable[[], nn.Module], torch.Tensor, Size]:
    if kind == "linear":
        rows, summed, columns = shape
        size = Size(rows, summed, columns)
        return lambda: nn.Linear(summed, columns), torch.randn(rows, summed), size
    channels, columns, side = shape
    images = torch.randn(4, channels, side, side).to(memory_format=torch.channels_last)
    return (
        lambda: nn.Conv2d(channels, columns, 3, padding=1).to(memory_format=torch.channels_last),
        images,
        Size(4 * side * side, 9 * channels, columns),
    )


def summary(results: Sequence[Result]) -> str:
    """Return how often the rule is right, and what it loses at worst."""
    right = sum(item.is_right for item in results)
    losses = [item.ratio if item.chosen == "integer" else 1 / item.ratio for item in results]
    worst = max(range(len(results)), key=losses.__getitem__)
    size = "x".join(str(number) for number in results[worst].size[:3])
    return (
        f"The rule is right for {right} of {len(results)} shapes; at worst, for {size}, its path "
        f"takes {losses[worst]:.2f} times as long as the other."
    )


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run from the command line; return what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=3.0, help="at most, for each shape")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, default=RESULTS / "integer_rule.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    described = machine.describe_machine()
    print(f"{machine.in_words(described)}\n{row(HEADINGS, WIDTHS)}", flush=True)
    shapes: list[tuple[Kind, Sequence[int]]] = [
        ("linear", (rows, *sides)) for sides in SIDES for rows in options.rows
    ]
    shapes += [("convolution", shape) for shape in CONVOLUTIONS]
    results = []
    for kind, shape in shapes:
        results.append(measure(kind, shape, options.rounds, options.seconds))
        print(results[-1], flush=True)
    print(f"\n{summary(results)}")
    document: dict[str, Any] = {
        "benchmark": "integer_rule",
        "machine": described,
        "summary": summary(results),
        "results": [asdict(item) for item in results],
    }
    write_json(options.json, document)
    return document


if __name__ == "__main__":
    main()
