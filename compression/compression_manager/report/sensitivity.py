"""How much each layer's quantization alone disturbs the model's output."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compression_manager.configuration.checks import write_text
from compression_manager.errors import ConfigError
from compression_manager.json_values import json_values
from compression_manager.models.calling import call_with_examples, quiet_evaluation, tensors_in
from compression_manager.quantization.layers import QuantizedLayer
from compression_manager.quantization.noise import decibels
from compression_manager.quantization.quantizers.quantizer_module import FakeQuantizer


@dataclass(frozen=True)
class LayerSensitivity:
    """The model's output with one layer quantized, against the output with none.

    Attributes:
        name: qualified name of the layer.
        output_sqnr_db: signal-to-quantization-noise ratio of the model's outputs in decibels;
            infinite without noise.
        output_kl: mean over all but the last dimension of KL(softmax(float) || softmax(quantized))
            of the first output, in nats; None if that is no tensor of (*, classes).
    """

    name: str
    output_sqnr_db: float
    output_kl: float | None


@dataclass(frozen=True)
class Sensitivity:
    """All quantized layers, the most sensitive first; `print` shows a table.

    The analysis by single layers is AIMET's ("per-layer sensitivity").
    """

    layers: tuple[LayerSensitivity, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, which has no infinity: that becomes the string 'inf'."""
        return {"layers": [json_values(asdict(layer)) for layer in self.layers]}

    def __str__(self) -> str:
        width = max([len("layer"), *(len(layer.name) for layer in self.layers)])
        lines = [f"{'layer':<{width}}  output SQNR dB  output KL"]
        for layer in self.layers:
            kl = "-" if layer.output_kl is None else f"{layer.output_kl:.2e}"
            lines.append(f"{layer.name:<{width}}  {layer.output_sqnr_db:>14.1f}  {kl:>9}")
        return "\n".join(lines)

    def to_svg(self) -> str:
        """Return a bar chart, the most sensitive layer on top: the longer, the more noise."""
        names = 8 + 7 * max([5, *(len(layer.name) for layer in self.layers)])
        rows = [
            _bar(layer, 40 + 22 * row, names, self._noise_share(layer))
            for row, layer in enumerate(self.layers)
        ]
        width, height = names + 420, 52 + 22 * len(self.layers)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'font-family="sans-serif" font-size="12">'
            f'<rect width="100%" height="100%" fill="white"/>'
            f'<text x="{names}" y="22" font-weight="bold">Noise in the output when only this layer '
            f"is quantized</text>{''.join(rows)}</svg>"
        )

    def save_chart(self, path: str | Path) -> Path:
        """Write the bar chart as SVG, which every browser shows.

        Raises:
            ConfigError: the name does not end in .svg, or the file cannot be written.
        """
        target = Path(path)
        if target.suffix != ".svg":
            raise ConfigError(f"the chart is an SVG file; name it *.svg, got {str(path)!r}.")
        return write_text("save_chart", target, self.to_svg())

    def _noise_share(self, layer: LayerSensitivity) -> float:
        """Return the length of a layer's bar, 0 to 1: linear in decibels."""
        finite = [x.output_sqnr_db for x in self.layers if math.isfinite(x.output_sqnr_db)]
        if not math.isfinite(layer.output_sqnr_db):
            return 0.0 if layer.output_sqnr_db > 0 else 1.0
        # Ten decibels beyond the best layer, so that its bar can be seen.
        return (max(finite) + 10 - layer.output_sqnr_db) / (max(finite) + 10 - min(finite))


def measure_sensitivity(model: nn.Module, example_inputs: Any) -> Sensitivity:
    """Run `model` once in floating point and once with each layer alone quantized.

    Args:
        model: a prepared model; modes, phases and random state are left as they are.
        example_inputs: what to call the model with.

    Raises:
        ConfigError: no layer has a range to quantize with yet, or the model does not take
            `example_inputs`, or returns nothing finite for them.
    """
    layers = {
        name: [quantizer for quantizer in module.quantizers() if quantizer.is_calibrated()]
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLayer)
    }
    quantizers = [quantizer for own in layers.values() for quantizer in own]
    if not quantizers:
        raise ConfigError(
            "no layer of the model is quantized with a known range; prepare it with QATConfig or "
            "PTQConfig and train or calibrate it first."
        )
    results = []
    with quiet_evaluation(model, restore_buffers=True), _phases_restored(quantizers):
        _switch(quantizers, quantizing=False)
        expected = _outputs(model, example_inputs)
        _check_measurable(expected)
        for name, own in layers.items():
            _switch(own, quantizing=True)
            actual = _outputs(model, example_inputs)
            _switch(own, quantizing=False)
            results.append(LayerSensitivity(name, _sqnr(expected, actual), _kl(expected, actual)))
    return Sensitivity(tuple(sorted(results, key=lambda layer: layer.output_sqnr_db)))


@contextmanager
def _phases_restored(quantizers: list[FakeQuantizer]) -> Iterator[None]:
    before = [quantizer.phase for quantizer in quantizers]
    try:
        yield
    finally:
        for quantizer, phase in zip(quantizers, before, strict=True):
            quantizer.set_phase(observing=phase.observing, quantizing=phase.quantizing)


def _switch(quantizers: list[FakeQuantizer], *, quantizing: bool) -> None:
    """Leave observing as it is: nothing observes in eval mode, and where it ends ranges freeze."""
    for quantizer in quantizers:
        quantizer.set_phase(observing=quantizer.phase.observing, quantizing=quantizing)


def _outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    outputs = tensors_in(call_with_examples(model, inputs))
    return [tensor.double() for tensor in outputs if tensor.is_floating_point()]


def _check_measurable(outputs: list[Tensor]) -> None:
    if not any(tensor.numel() for tensor in outputs):
        problem = "no floating-point value"
    elif not all(bool(tensor.isfinite().all()) for tensor in outputs):
        problem = "NaN or infinity"
    else:
        return
    raise ConfigError(
        f"sensitivity() compares the model's outputs, but for the example inputs the unquantized "
        f"model returns {problem}; pass a batch for which it returns finite numbers."
    )


def _sqnr(expected: list[Tensor], actual: list[Tensor]) -> float:
    signal = sum(float(tensor.square().sum()) for tensor in expected)
    noise = sum(float((a - b).square().sum()) for a, b in zip(expected, actual, strict=True))
    return decibels(signal, noise)


def _kl(expected: list[Tensor], actual: list[Tensor]) -> float | None:
    if not expected or expected[0].dim() < 2 or expected[0].shape[-1] < 2:
        return None
    divergence = F.kl_div(
        torch.log_softmax(actual[0], -1),
        torch.log_softmax(expected[0], -1),
        reduction="none",
        log_target=True,
    )
    return float(divergence.sum(-1).mean().clamp(min=0.0))


def _bar(layer: LayerSensitivity, y: int, names: int, share: float) -> str:
    length = round(260 * share)
    value = f"{layer.output_sqnr_db:.1f} dB"
    if layer.output_kl is not None:
        value += f", KL {layer.output_kl:.1e}"
    return (
        f'<text x="{names - 8}" y="{y + 13}" text-anchor="end">{escape(layer.name)}</text>'
        f'<rect x="{names}" y="{y}" width="{length}" height="17" fill="#c44e52"/>'
        f'<text x="{names + length + 6}" y="{y + 13}">{value}</text>'
    )
