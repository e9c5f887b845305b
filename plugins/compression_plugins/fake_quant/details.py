"""Metrics of one quantization-aware layer."""

from __future__ import annotations

from compression_manager.metrics import MetricBoard, quantizer_tag
from compression_manager.quantization import QuantizationParameters
from compression_manager.quantization.layers import QuantizedLayer


def publish_layer(metrics: MetricBoard, name: str, layer: QuantizedLayer) -> None:
    """Publish `quantization/<layer>/...`: scales, zero points, ranges and a weight histogram.

    A layer of several parts publishes `quantization/<layer>/<part>/...`.
    """
    for part_name, part in layer.parts().items():
        if part.weight is not None and part.weight_quantizer is not None:
            weight = part.weight.detach()
            prefix = quantizer_tag(name, part_name, "weight")
            metrics.histogram(prefix, weight)
            _publish(metrics, prefix, part.weight_quantizer.quantization_parameters(weight))
        quantizer = part.input_quantizer
        if quantizer is not None and not quantizer.scheme.dynamic and quantizer.is_calibrated():
            prefix = quantizer_tag(name, part_name, "input")
            _publish(metrics, prefix, quantizer.quantization_parameters())


def _publish(metrics: MetricBoard, prefix: str, parameters: QuantizationParameters) -> None:
    """Publish means over channels; the range is what the integers can represent."""
    scale = parameters.scale.detach().double()
    metrics.scalar(f"{prefix}/scale", scale.mean())
    low, high = parameters.real_range()
    metrics.scalar(f"{prefix}/range_min", low)
    metrics.scalar(f"{prefix}/range_max", high)
    if scale.dim():
        metrics.histogram(f"{prefix}/scales", scale)
    else:
        metrics.scalar(f"{prefix}/zero_point", parameters.zero_point.double())
