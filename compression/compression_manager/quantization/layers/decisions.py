"""How each layer computed last, which reports and the parity check ask for."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from torch import nn

from compression_manager.quantization.integer.products import convolution_kernel, linear_kernel
from compression_manager.quantization.integer.rule import Decision
from compression_manager.quantization.integer.selection import passes_for
from compression_manager.quantization.layers.base import Part, QuantizedLayer
from compression_manager.quantization.quantizer_module import FakeQuantizer

# By the part's first quantizer, which no other part has.
_Decisions = WeakKeyDictionary[FakeQuantizer, Decision]

# Those of the last forward pass in each mode.
_in_training: _Decisions = WeakKeyDictionary()
_in_evaluation: _Decisions = WeakKeyDictionary()

_PRODUCTS = {
    "integer": "products of integers with 32-bit sums",
    "codes": "float32 products, integers kept for backward",
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


def describe_arithmetic(layer: QuantizedLayer) -> str:
    """Return how `layer` was computed last: by which kernel, or why by none.

    That of evaluation is told where training computes otherwise.
    """
    trained, evaluated = (_described(layer, known) for known in (_in_training, _in_evaluation))
    if not trained or not evaluated or trained == evaluated:
        return trained or evaluated
    return f"{trained}; in evaluation {evaluated}"


def computes_integers(layer: QuantizedLayer) -> bool:
    """Return whether all products of `layer` were computed on integers last."""
    decisions = [last_decision(part) for part in layer.parts().values()]
    return bool(decisions) and all(
        decision is not None and decision.path == "integer" for decision in decisions
    )


def _quantizer_of(part: Part) -> FakeQuantizer | None:
    return part.weight_quantizer or part.input_quantizer


def _described(layer: QuantizedLayer, known: _Decisions) -> str:
    lines = []
    for part in layer.parts().values():
        quantizer = _quantizer_of(part)
        decision = None if quantizer is None else known.get(quantizer)
        if decision is not None:
            words = (_SUMS if part.weight is None else _PRODUCTS)[decision.path]
            more = decision.reason or (_kernels(layer) if decision.path == "integer" else "")
            lines.append(f"{words} ({more})" if more else words)
    return "; ".join(dict.fromkeys(lines))


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
    return training if training == stays else f"{training}; once converted {stays}"
