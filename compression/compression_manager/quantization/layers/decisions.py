"""How each layer computed last, which reports and the parity check ask for."""

from __future__ import annotations

from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from torch import nn

from compression_manager.quantization.integer.products import convolution_kernel, linear_kernel
from compression_manager.quantization.integer.rule import Decision
from compression_manager.quantization.integer.selection import passes_for
from compression_manager.quantization.layers.base import Part, QuantizedLayer
from compression_manager.quantization.quantizers.quantizer_module import FakeQuantizer

# By the part's first quantizer, which no other part has.
_Decisions = WeakKeyDictionary[FakeQuantizer, Decision]

# Those of the last forward pass in each mode.
_in_training: _Decisions = WeakKeyDictionary()
_in_evaluation: _Decisions = WeakKeyDictionary()

_PRODUCTS = {
    "integer": "products of integers with 32-bit sums",
    "codes": "float32 products, integers kept for the backward pass",
    "fake": "float32 products of fake-quantized operands",
}
_SUMS = {
    "codes": "sums with the real numbers of integers",
    "fake": "sums with fake-quantized numbers",
}


def remember(part: Part, decision: Decision) -> None:
    """Keep how `part` computes now, in its mode."""
    quantizer = _quantizer_of(part)
    if quantizer is not None:
        (_in_training if quantizer.training else _in_evaluation)[quantizer] = decision


def last_decision(part: Part) -> Decision | None:
    """Return how `part` was computed last in its mode, or in the other if in none.

    None before its first call.
    """
    quantizer = _quantizer_of(part)
    if quantizer is None:
        return None
    ordered = (_in_training, _in_evaluation)
    first, second = ordered if quantizer.training else reversed(ordered)
    return first.get(quantizer) or second.get(quantizer)


@dataclass(frozen=True)
class LayerArithmetic:
    """How one layer was computed last.

    Attributes:
        training: what it computed in training; "" if it was not called there.
        evaluation: the same in evaluation.
        reasons: why not on integers, where it did not.
        kernel: what multiplies its integers; "" if nothing does.
    """

    training: str
    evaluation: str
    reasons: list[str] = field(default_factory=list)
    kernel: str = ""

    def __str__(self) -> str:
        """Return what both modes compute, in one clause if they agree."""
        if not self.training or not self.evaluation or self.training == self.evaluation:
            return self.training or self.evaluation
        return f"{self.training}; in evaluation {self.evaluation}"


def arithmetic_of(layer: QuantizedLayer) -> LayerArithmetic | None:
    """Return how `layer` was computed last, or None if it was not called yet."""
    trained, evaluated = (_decided(layer, known) for known in (_in_training, _in_evaluation))
    decisions = [decision for _, decision in trained + evaluated]
    if not decisions:
        return None
    multiplies = any(
        part.weight is not None and item.path == "integer" for part, item in trained + evaluated
    )
    return LayerArithmetic(
        _in_words(trained),
        _in_words(evaluated),
        list(dict.fromkeys(item.reason for item in decisions if item.reason)),
        _kernels(layer) if multiplies else "",
    )


def computes_integers(layer: QuantizedLayer) -> bool:
    """Return whether all products of `layer` were computed on integers last."""
    decisions = [last_decision(part) for part in layer.parts().values()]
    return bool(decisions) and all(
        decision is not None and decision.path == "integer" for decision in decisions
    )


def _quantizer_of(part: Part) -> FakeQuantizer | None:
    return part.weight_quantizer or part.input_quantizer


def _decided(layer: QuantizedLayer, known: _Decisions) -> list[tuple[Part, Decision]]:
    """Return the parts of `layer` that were computed in one mode, and how."""
    found = []
    for part in layer.parts().values():
        quantizer = _quantizer_of(part)
        decision = None if quantizer is None else known.get(quantizer)
        if decision is not None:
            found.append((part, decision))
    return found


def _in_words(decided: list[tuple[Part, Decision]]) -> str:
    words = ((_SUMS if part.weight is None else _PRODUCTS)[item.path] for part, item in decided)
    return "; ".join(dict.fromkeys(words))


def _kernels(layer: QuantizedLayer) -> str:
    """Return which kernel multiplies in training, and which where the weight stays as it is."""
    device = next(layer.parameters()).device
    passes = passes_for(device)
    training, stays = (
        convolution_kernel(passes, layer.groups, packs=packs)
        if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        else linear_kernel(device, passes, packs=packs)
        for packs in (False, True)
    )
    return training if training == stays else f"{training}, once converted by {stays}"
