"""What became of every layer: quantized how or why not, bytes, and noise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compression_manager.model_call import call_model, quiet_evaluation
from compression_manager.quantization import FakeQuantizer
from compression_manager.quantization.layers import QuantizedLayer

# A float32 scale and an int32 zero point.
_QPARAMS_BYTES = 8


@dataclass(frozen=True)
class LayerReport:
    """One layer.

    Attributes:
        name: qualified name.
        kind: class name of the float layer.
        quantized: whether conversion stores integers for it.
        detail: the schemes, or why the layer is not quantized.
        bytes_before: bytes of its parameters and buffers as floats.
        bytes_after: bytes after conversion: integers, scales, zero points and bias.
        sqnr_db: signal-to-quantization-noise ratio of its output against the float layer on
            the same input, in decibels; None if the layer was not reached or is not quantized.
    """

    name: str
    kind: str
    quantized: bool
    detail: str
    bytes_before: int
    bytes_after: int
    sqnr_db: float | None


@dataclass(frozen=True)
class Report:
    """All layers that hold parameters; `print(report)` shows a table."""

    layers: tuple[LayerReport, ...]

    @property
    def bytes_before(self) -> int:
        """Bytes of all parameters and buffers as floats."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Bytes of all tensors after conversion."""
        return sum(layer.bytes_after for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "layers": [asdict(layer) for layer in self.layers],
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }

    def __str__(self) -> str:
        rows = [("layer", "kind", "bytes", "after", "SQNR dB", "quantized how, or why not")]
        for layer in self.layers:
            noise = "-" if layer.sqnr_db is None else f"{layer.sqnr_db:.1f}"
            rows.append(
                (
                    layer.name or "(the model)",
                    layer.kind,
                    f"{layer.bytes_before:,}",
                    f"{layer.bytes_after:,}",
                    noise,
                    layer.detail,
                )
            )
        rows.append(("total", "", f"{self.bytes_before:,}", f"{self.bytes_after:,}", "", ""))
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        numeric = {2, 3, 4}
        return "\n".join(
            "  ".join(
                [
                    cell.rjust(width) if column in numeric else cell.ljust(width)
                    for column, (cell, width) in enumerate(zip(row, widths, strict=False))
                ]
                + [row[5]]
            ).rstrip()
            for row in rows
        )


def build_report(
    model: nn.Module,
    skipped: Mapping[str, str],
    folded: Mapping[str, str],
    example_inputs: Any = None,
) -> Report:
    """Describe `model`.

    Args:
        model: a prepared model.
        skipped: layer name -> why it is not quantized.
        folded: layer name -> layer that does its work after conversion.
        example_inputs: what to call the model with to measure noise; None leaves it out.
    """
    noise = {} if example_inputs is None else _measure_noise(model, example_inputs)
    inside_quantizers = {
        id(child)
        for module in model.modules()
        if isinstance(module, FakeQuantizer)
        for child in module.modules()
    }
    layers = []
    for name, module in model.named_modules():
        if id(module) in inside_quantizers:
            continue
        if isinstance(module, QuantizedLayer):
            gains_bias = name in folded.values() and getattr(module, "bias", None) is None
            layers.append(_quantized(name, module, noise.get(name), gains_bias))
        elif _own_bytes(module):
            reason = skipped.get(name, "not a layer with a weight")
            layers.append(_float(name, module, reason, is_folded=name in folded))
    return Report(tuple(layers))


def _quantized(
    name: str, layer: QuantizedLayer, sqnr_db: float | None, gains_bias: bool
) -> LayerReport:
    scheme = layer.weight_quantizer.scheme
    channels = 1 if scheme.axis is None else layer.weight.shape[scheme.axis]
    after = layer.weight.numel() * scheme.storage_dtype.itemsize + channels * _QPARAMS_BYTES
    bias = getattr(layer, "bias", None)
    if bias is not None:
        after += _bytes(bias)
    elif gains_bias:
        after += layer.weight.shape[0] * layer.weight.element_size()
    detail = f"weight {scheme}"
    if layer.input_quantizer is not None:
        after += _QPARAMS_BYTES
        detail += f", input {layer.input_quantizer.scheme}"
    else:
        detail += ", input float"
    before = sum(_bytes(parameter) for parameter in layer.parameters(recurse=False))
    return LayerReport(name, layer.float_class.__name__, True, detail, before, after, sqnr_db)


def _float(name: str, module: nn.Module, reason: str, *, is_folded: bool) -> LayerReport:
    size = _own_bytes(module)
    after = 0 if is_folded else size
    return LayerReport(name, type(module).__name__, False, reason, size, after, None)


def _own_bytes(module: nn.Module) -> int:
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return sum(_bytes(tensor) for tensor in tensors)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _measure_noise(model: nn.Module, example_inputs: Any) -> dict[str, float]:
    """Return layer -> SQNR in dB, comparing each layer with its float class on equal input."""
    noise: dict[str, float] = {}

    def measure(name: str) -> Any:
        def hook(layer: QuantizedLayer, args: tuple[Any, ...], output: Tensor) -> None:
            exact = layer.float_class.forward(layer, *args)
            noise[name] = _sqnr_db(exact, output)

        return hook

    with ExitStack() as stack:
        stack.enter_context(quiet_evaluation(model))
        for name, module in model.named_modules():
            if isinstance(module, QuantizedLayer):
                stack.callback(module.register_forward_hook(measure(name)).remove)
        call_model(model, example_inputs)
    return noise


@torch.no_grad()
def _sqnr_db(exact: Tensor, actual: Tensor) -> float:
    """Return 10 log10(sum exact^2 / sum (exact - actual)^2); infinite without noise."""
    signal = float(exact.double().square().sum())
    noise = float((exact.double() - actual.double()).square().sum())
    if noise == 0.0:
        return math.inf
    return 10.0 * math.log10(max(signal, 1e-300) / noise)
