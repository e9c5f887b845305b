"""What became of every layer: quantized how or why not, bytes, and noise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from compression_manager.deploy.layers import CONVERTED_CLASSES, LayerSpec
from compression_manager.deploy.parity import Parity
from compression_manager.model_call import call_with_examples, quiet_evaluation
from compression_manager.quantization import FakeQuantizer
from compression_manager.quantization.layers import QuantizedLayer


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
    """All layers that hold parameters; `print(report)` shows a table.

    Attributes:
        layers: in the model's order.
        parity: how close the last `convert` came to the trained model; None before it.
    """

    layers: tuple[LayerReport, ...]
    parity: Parity | None = None

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
            "layers": [
                {**asdict(layer), "sqnr_db": _json_number(layer.sqnr_db)} for layer in self.layers
            ],
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "parity": None if self.parity is None else asdict(self.parity),
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
        if self.parity is not None:
            lines.append(str(self.parity))
        return "\n".join(lines)


def build_report(
    model: nn.Module,
    skipped: Mapping[str, str],
    folded: Mapping[str, str],
    example_inputs: Any = None,
    parity: Parity | None = None,
) -> Report:
    """Describe `model`.

    Args:
        model: a prepared model.
        skipped: layer name -> why it is not quantized.
        folded: layer name -> layer that does its work after conversion.
        example_inputs: what to call the model with to measure noise; None leaves it out.
        parity: of the last conversion, if there was one.
    """
    noise = {} if example_inputs is None else _measure_noise(model, example_inputs)
    inside_quantizers = {
        id(child)
        for module in model.modules()
        if isinstance(module, FakeQuantizer)
        for child in module.modules()
    }
    sizes = _Sizes()
    layers = []
    for name, module in model.named_modules():
        if id(module) in inside_quantizers:
            continue
        if isinstance(module, QuantizedLayer):
            gains_bias = name in folded.values()
            layers.append(_quantized(name, module, noise.get(name), gains_bias, sizes))
        elif any(True for _ in _saved_tensors(module)):
            reason = skipped.get(name, "not a layer with a weight")
            size = sizes.take(_saved_tensors(module))
            after = 0 if name in folded else size
            kind = type(module).__name__
            layers.append(LayerReport(name, kind, False, reason, size, after, None))
    return Report(tuple(layers), parity)


class _Sizes:
    """Counts the bytes of each tensor once, however many layers share it."""

    def __init__(self) -> None:
        self._counted: set[int] = set()
        self._integers: dict[tuple[int, object], str] = {}

    def take(self, tensors: Iterable[Tensor]) -> int:
        total = 0
        for tensor in tensors:
            if id(tensor) not in self._counted:
                self._counted.add(id(tensor))
                total += _bytes(tensor)
        return total

    def shares_integers(self, name: str, weight: Tensor, scheme: object) -> str | None:
        """Return the earlier layer whose integers are those of `weight` as well."""
        first = self._integers.setdefault((id(weight), scheme), name)
        return None if first == name else first


def _quantized(
    name: str, layer: QuantizedLayer, sqnr_db: float | None, gains_bias: bool, sizes: _Sizes
) -> LayerReport:
    scheme = layer.weight_quantizer.scheme
    quantizer = layer.input_quantizer
    detail = f"weight {scheme}, input {'float' if quantizer is None else quantizer.scheme}"
    if quantizer is not None and quantizer.phase.quantizing and not quantizer.is_calibrated():
        quantizer = None
        detail = f"weight {scheme}, input float: training never used the layer"
    spec = LayerSpec(
        kind=layer.float_class.__name__,
        weight=scheme,
        input=None if quantizer is None else quantizer.scheme,
        bias=gains_bias or getattr(layer, "bias", None) is not None,
    )
    converted = dict(CONVERTED_CLASSES[spec.kind](layer, spec).named_buffers())
    # Folding gives a layer integers of its own.
    other = None if gains_bias else sizes.shares_integers(name, layer.weight, scheme)
    if other is not None:
        detail += f", integers shared with '{other}'"
        for shared in ("weight", "weight_scale", "weight_zero_point"):
            del converted[shared]
    before = sizes.take(layer.parameters(recurse=False))
    after = sum(_bytes(tensor) for tensor in converted.values())
    return LayerReport(name, spec.kind, True, detail, before, after, sqnr_db)


def _saved_tensors(module: nn.Module) -> list[Tensor]:
    """Return the module's own tensors that a state_dict holds."""
    saved = [
        buffer
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    ]
    return [*module.parameters(recurse=False), *saved]


def _bytes(tensor: Tensor) -> int:
    return 0 if is_lazy(tensor) else tensor.numel() * tensor.element_size()


def _json_number(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)


def _measure_noise(model: nn.Module, example_inputs: Any) -> dict[str, float]:
    """Return layer -> SQNR in dB, comparing each layer with its float class on equal input."""
    energies: dict[str, Tensor] = {}

    def measure(name: str) -> Any:
        def hook(
            layer: QuantizedLayer, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor
        ) -> None:
            exact = layer.float_class.forward(layer, *args, **kwargs).double()
            energy = torch.stack([exact.square().sum(), (exact - output).square().sum()])
            energies[name] = energies[name] + energy if name in energies else energy

        return hook

    with ExitStack() as stack:
        stack.enter_context(quiet_evaluation(model))
        for name, module in model.named_modules():
            if isinstance(module, QuantizedLayer) and module.weight_quantizer.phase.quantizing:
                handle = module.register_forward_hook(measure(name), with_kwargs=True, prepend=True)
                stack.callback(handle.remove)
        call_with_examples(model, example_inputs)
    return {name: _decibels(*energy.tolist()) for name, energy in energies.items()}


def _decibels(signal: float, noise: float) -> float:
    """Return 10 log10(signal / noise); infinite without noise."""
    if noise == 0.0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal else -math.inf
