"""What a checkpoint says about its run, for people and tools that have no model at hand."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from compression_manager.context import Context
from compression_manager.errors import QuantizationError
from compression_manager.json_values import json_values
from compression_manager.quantization import (
    FakeQuantizer,
    QuantizationParameters,
    fake_quantize,
)
from compression_manager.quantization.layers import QuantizedLayer
from compression_manager.quantization.noise import sqnr_db
from compression_manager.report.report import build_report
from compression_manager.run_report.environment import describe_environment


@torch.no_grad()
def describe_run(context: Context) -> dict[str, Any]:
    """Return the run's environment, layers and notes as JSON values, changing nothing.

    Costs about what quantizing every weight once does; the model is not called.

    Returns:
        environment: versions and hardware.
        layers: a dict for each `LayerReport` of `manager.report()`, without its SQNR, which
            would need an input; plus `quantizers`, one dict for each fake quantizer of the
            layer: `part`, `role` ("weight" or "input"), `scheme`, `bits`, `observing`,
            `quantizing`, `shape` of the weight, and, where they are known, the smallest and
            largest `scale`, `zero_point` and real number of the `range`; for a weight also its
            `sqnr_db`. `problem` says why numbers are missing.
        notes: plugin -> what it has to say.
    """
    report = build_report(context.model, context.skipped_layers, context.folded_layers)
    modules = dict(context.model.named_modules())
    layers = []
    for layer in report.layers:
        described = asdict(layer)
        del described["sqnr_db"]
        layers.append({**described, "quantizers": _quantizers(modules[layer.name])})
    return {
        "environment": describe_environment(context.model),
        "layers": layers,
        "notes": dict(context.notes),
    }


def _quantizers(layer: torch.nn.Module) -> list[dict[str, Any]]:
    if not isinstance(layer, QuantizedLayer):
        return []
    found = []
    for name, part in layer.parts().items():
        if part.weight_quantizer is not None:
            described = _quantizer(part.weight_quantizer, part.weight)
            found.append({"part": name, "role": "weight", **described})
        if part.input_quantizer is not None:
            found.append({"part": name, "role": "input", **_quantizer(part.input_quantizer, None)})
    return found


def _quantizer(quantizer: FakeQuantizer, weight: Tensor | None) -> dict[str, Any]:
    described: dict[str, Any] = {
        "scheme": str(quantizer.scheme),
        "bits": quantizer.scheme.bits,
        "observing": quantizer.phase.observing,
        "quantizing": quantizer.phase.quantizing,
        "shape": None if weight is None else list(weight.shape),
        "scale": None,
        "zero_point": None,
        "range": None,
        "sqnr_db": None,
        "problem": _why_unknown(quantizer, weight),
    }
    if described["problem"] is not None:
        return described
    try:
        # A weight that is not finite must not keep its checkpoint from being written.
        parameters = quantizer.quantization_parameters(None if weight is None else weight.detach())
    except QuantizationError as error:
        return {**described, "problem": str(error)}
    return {
        **described,
        "scale": _extremes(parameters.scale),
        "zero_point": _extremes(parameters.zero_point),
        "range": json_values([float(limit) for limit in parameters.real_range()]),
        "sqnr_db": None if weight is None else json_values(_sqnr(weight.detach(), parameters)),
    }


def _why_unknown(quantizer: FakeQuantizer, weight: Tensor | None) -> str | None:
    if weight is not None:
        return None if weight.numel() else "the weight has no values"
    if quantizer.scheme.dynamic:
        return "every input brings its own range"
    # Asking an observer earlier would already bring the quantizer's buffers up to date.
    if not quantizer.phase.quantizing:
        return "fake quantization has not begun"
    return None if quantizer.is_calibrated() else "no training step called the layer in train mode"


def _extremes(values: Tensor) -> list[float | str | int]:
    low, high = values.min().item(), values.max().item()
    if values.is_floating_point():
        return [json_values(float(low)), json_values(float(high))]
    return [int(low), int(high)]


def _sqnr(weight: Tensor, parameters: QuantizationParameters) -> float:
    quantized = fake_quantize(
        weight,
        parameters.scale,
        parameters.zero_point,
        parameters.quant_min,
        parameters.quant_max,
        parameters.axis,
        group_size=parameters.group_size,
    )
    return sqnr_db(weight, quantized)
