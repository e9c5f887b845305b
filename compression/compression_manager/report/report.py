"""What became of every layer: quantized how or why not, bytes, and noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from compression_manager.deploy.layers.layer_spec import LayerSpec
from compression_manager.deploy.parity import Parity
from compression_manager.json_values import json_values
from compression_manager.quantization import FakeQuantizer
from compression_manager.quantization.graph import QuantizationGraph
from compression_manager.quantization.layers import QuantizedLayer, quantized_class
from compression_manager.quantization.layers.decisions import LayerArithmetic, arithmetic_of
from compression_manager.report.arithmetic_lines import arithmetic_lines, in_short
from compression_manager.report.layer_measurements import LayerMeasurement, measure_layers
from compression_manager.report.sensitivity import Sensitivity
from compression_manager.report.stored_bytes import StoredBytes, saved_tensors

__all__ = ["LayerArithmetic", "LayerReport", "Report"]

# Times that are closer say nothing of two kernels.
_SLOWER = 1.1


@dataclass(frozen=True)
class LayerReport:
    """One layer.

    Attributes:
        name: qualified name.
        kind: class name of the float layer.
        quantized: whether conversion stores integers for it.
        detail: the schemes, or why the layer is not quantized.
        bytes_before: bytes of its saved tensors in the float model; a tensor that several
            layers share counts for the first.
        bytes_after: the same in the converted model: integers, scales, zero points and bias.
        sqnr_db: signal-to-quantization-noise ratio of its output against the float layer on
            the same input, in decibels, infinite without noise; None if the layer was not
            reached, is not quantized, or fake quantization has not begun.
        arithmetic: how its products were computed last, why not on integers, and by which
            kernel; None if it has none, or was not called yet.
        time_ratio: time of its integer kernel to that of float32 on this machine; None if it
            was not measured or does not compute on integers.
    """

    name: str
    kind: str
    quantized: bool
    detail: str
    bytes_before: int
    bytes_after: int
    sqnr_db: float | None
    arithmetic: LayerArithmetic | None = None
    time_ratio: float | None = None


@dataclass(frozen=True)
class Report:
    """All layers that hold parameters or could be quantized; `print(report)` shows a table.

    Attributes:
        layers: in the model's order.
        parity: how close the last `convert` came to the trained model; None before it.
        sensitivity: what each layer's quantization does to the output, if it was asked for.
        graph: the operations of the model, if they were asked for.
        notes: plugin -> what it has to say.
    """

    layers: tuple[LayerReport, ...]
    parity: Parity | None = None
    sensitivity: Sensitivity | None = None
    graph: QuantizationGraph | None = None
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def bytes_before(self) -> int:
        """Bytes of all parameters and buffers as floats."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Bytes of all tensors after conversion."""
        return sum(layer.bytes_after for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, which has no infinity: that becomes the string 'inf'."""
        return {
            "layers": [json_values(asdict(layer)) for layer in self.layers],
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "parity": None if self.parity is None else asdict(self.parity),
            "sensitivity": None if self.sensitivity is None else self.sensitivity.to_dict(),
            "graph": None if self.graph is None else str(self.graph).splitlines(),
            "notes": dict(self.notes),
        }

    def __str__(self) -> str:
        rows = [("layer", "kind", "bytes", "after", "output SQNR dB", "quantized how, or why not")]
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
        lines = [
            "  ".join(
                [
                    cell.rjust(width) if column in numeric else cell.ljust(width)
                    for column, (cell, width) in enumerate(zip(row, widths, strict=False))
                ]
                + [row[5]]
            ).rstrip()
            for row in rows
        ]
        lines += self._arithmetic_lines()
        if self.parity is not None:
            lines.append(str(self.parity))
        lines += [f"{plugin}: {note}" for plugin, note in self.notes.items()]
        lines += [str(part) for part in (self.sensitivity, self.graph) if part is not None]
        return "\n".join(lines)

    def _arithmetic_lines(self) -> list[str]:
        """Return who computes on what, and who gains nothing by integers."""
        lines = arithmetic_lines(
            {
                layer.name or "(the model)": layer.arithmetic
                for layer in self.layers
                if layer.arithmetic is not None
            }
        )
        slower = {
            layer.name or "(the model)": layer.time_ratio
            for layer in self.layers
            if layer.time_ratio is not None and layer.time_ratio > _SLOWER
        }
        if slower:
            lines.append(
                "slower on integers than in float32 here, at most "
                f"{max(slower.values()):.1f} times its time: {in_short(list(slower))}"
            )
        return lines


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
    measured = {} if example_inputs is None else measure_layers(model, example_inputs)
    inside_quantizers = {
        id(child)
        for module in model.modules()
        if isinstance(module, FakeQuantizer)
        for child in module.modules()
    }
    stored = StoredBytes()
    layers = []
    for name, module in model.named_modules():
        if id(module) in inside_quantizers:
            continue
        if isinstance(module, QuantizedLayer):
            gains_bias = name in folded.values()
            layers.append(_quantized(name, module, measured.get(name), gains_bias, stored))
        elif name in skipped or saved_tensors(module):
            reason = skipped.get(name) or _reason_against(module)
            size = stored.take(saved_tensors(module))
            after = 0 if name in folded else size
            kind = type(module).__name__
            layers.append(LayerReport(name, kind, False, reason, size, after, None))
    return Report(tuple(layers))


def _reason_against(module: nn.Module) -> str:
    """Return why nobody planned what to do with `module`."""
    if quantized_class(type(module)) is None:
        return "not a layer with a weight"
    return "no plugin quantizes, or the layer came after the model was prepared"


def _quantized(
    name: str,
    layer: QuantizedLayer,
    measured: LayerMeasurement | None,
    gains_bias: bool,
    stored: StoredBytes,
) -> LayerReport:
    weight, input, note = layer.weight_scheme, layer.input_scheme, ""
    quantizers = layer.input_quantizers()
    if any(item.phase.quantizing and not item.is_calibrated() for item in quantizers):
        input, note = None, ": it met no value in train mode"
    has_bias = any(part.bias is not None for part in layer.parts().values())
    spec = LayerSpec(layer.float_class.__name__, weight, input, gains_bias or has_bias)
    before = stored.take(layer.parameters(recurse=False))
    after, others = stored.take_converted(name, layer, spec, gains_bias=gains_bias)
    notes = (f", integers shared with '{other}'" for other in others)
    return LayerReport(
        name,
        spec.kind,
        True,
        "".join([f"weight {weight or 'none'}, input {input or 'float'}{note}", *notes]),
        before,
        after,
        None if measured is None else measured.sqnr_db,
        arithmetic_of(layer),
        None if measured is None else measured.time_ratio,
    )
