"""Metrics of one quantization-aware layer."""

from __future__ import annotations

from compression_manager.metrics import MetricBoard
from compression_manager.quantization import FakeQuantizer, QuantizationParameters
from compression_manager.quantization.layers import QuantizedLayer


def publish_layer(metrics: MetricBoard, name: str, layer: QuantizedLayer) -> None:
    """Publish `quantization/<layer>/...`: scales, zero points, ranges and a weight histogram."""
    prefix = f"quantization/{name}" if name else "quantization"
    weight = layer.weight.detach()
    metrics.histogram(f"{prefix}/weight", weight)
    _publish(metrics, f"{prefix}/weight", layer.weight_quantizer.quantization_parameters(weight))
    quantizer: FakeQuantizer | None = layer.input_quantizer
    if quantizer is None or quantizer.scheme.dynamic:
        return
    if quantizer.is_calibrated():
        _publish(metrics, f"{prefix}/input", quantizer.quantization_parameters())


def _publish(metrics: MetricBoard, prefix: str, parameters: QuantizationParameters) -> None:
    """Publish means over channels; the range is what the integers can represent."""
    scale = parameters.scale.detach().double()
    zero_point = parameters.zero_point.double()
    metrics.scalar(f"{prefix}/scale", scale.mean())
    metrics.scalar(f"{prefix}/range_min", ((parameters.quant_min - zero_point) * scale).min())
    metrics.scalar(f"{prefix}/range_max", ((parameters.quant_max - zero_point) * scale).max())
    if scale.dim():
        metrics.histogram(f"{prefix}/scales", scale)
    else:
        metrics.scalar(f"{prefix}/zero_point", zero_point)
