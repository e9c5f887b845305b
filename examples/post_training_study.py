"""Quantize the demo's trained students without training, in every way, and compare them.

    make demo SEEDS=3 && make tables

Reads the students that the demo trained alone; takes less than a minute. Results:
runs/tables/summary.json, from which the tables of docs/how-to are written.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import fashion_mnist
import models
from compression_manager import CompressionError, prepare_compression
from compression_manager.quantization import HistogramCalibration, QuantizationScheme, Quantizer
from compression_plugins import PTQConfig
from fashion_mnist import Splits

PER_TOKEN = QuantizationScheme(symmetric=False, signed=False, granularity="token", dynamic=True)
SCHEMES = (
    QuantizationScheme(8),
    QuantizationScheme(8, symmetric=False),
    QuantizationScheme(8, granularity="channel"),
    QuantizationScheme(4),
    QuantizationScheme(4, granularity="channel"),
    QuantizationScheme(4, granularity="group"),
    QuantizationScheme(3, granularity="group"),
    QuantizationScheme(2, symmetric=False, granularity="group"),
)
CLIPPED = (QuantizationScheme(4), QuantizationScheme(4, granularity="channel"))

Deploy = Callable[[nn.Module, list[Tensor]], nn.Module]


def ptq(**options: Any) -> Deploy:
    """Return a function that quantizes and converts a network with PTQConfig."""

    def deploy(network: nn.Module, batches: list[Tensor]) -> nn.Module:
        needs_data = options.get("mode", "static") == "static" or options.get("bias_correction")
        config = PTQConfig(calibration_data=batches if needs_data else None, **options)
        with prepare_compression(network, [config], example_inputs=batches[0]) as manager:
            return manager.convert()

    return deploy


def stored(scheme: QuantizationScheme, **options: Any) -> Deploy:
    """Return a function that stores the weights of a network as integers."""
    return lambda network, batches: Quantizer(scheme, **options).quantize_weights(network)


def weights(bits: int) -> QuantizationScheme:
    """Return a scheme of one scale per channel."""
    return QuantizationScheme(bits, granularity="channel")


MODES: dict[str, Deploy] = {
    "static, weights per channel": ptq(),
    "static, weights per tensor": ptq(weight=QuantizationScheme()),
    "dynamic per tensor": ptq(mode="dynamic"),
    "dynamic per token": ptq(mode="dynamic", activation=PER_TOKEN),
    "weight-only": ptq(mode="weight_only"),
}
CORRECTED: dict[str, dict[str, Any]] = {
    "4 bits, static int8 inputs": {"weight": weights(4)},
    "4 bits, float inputs": {"weight": weights(4), "mode": "weight_only"},
    "3 bits, float inputs": {"weight": weights(3), "mode": "weight_only"},
}


@torch.no_grad()
def accuracy(network: nn.Module, splits: Splits) -> float:
    """Return the fraction of right predictions on the test images."""
    predictions = torch.cat([network(batch).argmax(1) for batch in splits.test.images.split(400)])
    return (predictions == splits.test.labels).double().mean().item()


def run_seed(state: dict[str, Tensor], splits: Splits) -> dict[str, Any]:
    """Return every accuracy, and the sizes of stored weights, for one trained student."""
    batches = list(splits.train.images[torch.arange(0, len(splits.train), 5)][:1024].split(128))

    def network() -> nn.Module:
        fresh = models.student()
        fresh.load_state_dict(state)
        return fresh.eval()

    def judged(deploy: Deploy) -> float:
        return accuracy(deploy(network(), batches), splits)

    return {
        "float32": accuracy(network(), splits),
        "float32 kilobytes": _kilobytes(network()),
        "modes": {title: judged(deploy) for title, deploy in MODES.items()},
        "without correction": {t: judged(ptq(**options)) for t, options in CORRECTED.items()},
        "with correction": {
            title: judged(ptq(bias_correction=True, **options))
            for title, options in CORRECTED.items()
        },
        "storage": {str(scheme): judged(stored(scheme)) for scheme in SCHEMES},
        "kilobytes": {
            str(scheme): _kilobytes(stored(scheme)(network(), batches)) for scheme in SCHEMES
        },
        "least squared error": {
            str(scheme): judged(stored(scheme, calibration=HistogramCalibration()))
            for scheme in CLIPPED
        },
    }


def _kilobytes(network: nn.Module) -> float:
    return sum(value.nbytes for value in network.state_dict().values()) / 1000


def modes_table(runs: Sequence[dict[str, Any]]) -> str:
    """Return the accuracy of each mode of post-training quantization."""
    rows = [["", "accuracy", "each seed"], ["float32", *_accuracies(runs, "float32")]]
    return _table(rows + [[mode, *_accuracies(runs, "modes", mode)] for mode in MODES])


def correction_table(runs: Sequence[dict[str, Any]]) -> str:
    """Return the accuracy with and without bias correction."""
    rows = [["weights", "without", "each seed", "with bias correction", "each seed"]]
    for title in CORRECTED:
        without = _accuracies(runs, "without correction", title)
        rows.append([title, *without, *_accuracies(runs, "with correction", title)])
    return _table(rows)


def storage_table(runs: Sequence[dict[str, Any]]) -> str:
    """Return size and accuracy of each scheme of stored weights."""
    rows = [["scheme", "kB", "accuracy", "each seed"]]
    rows.append(["float32", f"{runs[0]['float32 kilobytes']:.1f}", *_accuracies(runs, "float32")])
    for scheme in map(str, SCHEMES):
        kilobytes = f"{runs[0]['kilobytes'][scheme]:.1f}"
        rows.append([scheme, kilobytes, *_accuracies(runs, "storage", scheme)])
    for scheme in map(str, CLIPPED):
        kilobytes = f"{runs[0]['kilobytes'][scheme]:.1f}"
        accuracies = _accuracies(runs, "least squared error", scheme)
        rows.append([f"{scheme}, least squared error", kilobytes, *accuracies])
    return _table(rows)


TABLES = {"modes": modes_table, "correction": correction_table, "storage": storage_table}


def _accuracies(runs: Sequence[dict[str, Any]], *keys: str) -> list[str]:
    """Return the mean over the seeds, and each of them."""
    values = []
    for run in runs:
        value: Any = run
        for key in keys:
            value = value[key]
        values.append(float(value))
    mean = sum(values) / len(values)
    return [f"{mean:.2%}", " / ".join(f"{100 * value:.2f}" for value in values)]


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"))
    parser.add_argument("--output", type=Path, default=Path("runs/tables"))
    options = parser.parse_args(arguments)

    students = sorted(options.demo.glob("seed-*/student/model.safetensors"))
    if not students:
        raise SystemExit(
            f"error: {options.demo} holds no trained student; run `make demo SEEDS=3` first."
        )
    splits = fashion_mnist.load()
    runs = [run_seed(load_file(path), splits) for path in students]
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "summary.json").write_text(json.dumps(runs, indent=2))
    for title, table in TABLES.items():
        print(f"\n{title}\n{table(runs)}")


if __name__ == "__main__":
    try:
        main()
    except CompressionError as error:
        raise SystemExit(f"error: {error}") from error
