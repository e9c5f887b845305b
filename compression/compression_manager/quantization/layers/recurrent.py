"""Quantization-aware recurrent layers, weight-only: torch's kernels keep their inner values."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from compression_manager.quantization.layers.base import Operand, QuantizedLayer
from compression_manager.quantization.quantizers.quantizer_module import FakeQuantizer


class _QuantizedRecurrent(QuantizedLayer):
    """Every matrix is a part: `ih_l0` and `hh_l0` of layer 0, `ih_l0_reverse`, `hr_l0` and so on.

    The rows of all gates are its output channels.
    """

    quantizes_input = False

    @staticmethod
    def operands_of(layer: nn.Module) -> dict[str, Operand]:
        """Return each matrix with its bias; projections (`hr`) have none."""
        parameters = dict(layer.named_parameters(recurse=False))
        return {
            (part := name.removeprefix("weight_")): Operand(weight, parameters.get(f"bias_{part}"))
            for name, weight in parameters.items()
            if name.startswith("weight_")
        }

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Return what the float layer does, computed with fake-quantized weights.

        Args:
            input: (length, N, input_size), (N, length, input_size) with batch_first, unbatched,
                or a PackedSequence.
            hx: initial state, as the float layer's; zeros if left out.
        """
        layer = cast(nn.RNNBase, self)
        # Brings the list of weights up to date now; done in forward it would replace ours.
        layer._update_flat_weights()
        weights = [
            self._quantized(name, cast(Tensor, weight)) if name.startswith("weight_") else weight
            for name, weight in zip(layer._flat_weights_names, layer._flat_weights, strict=True)
        ]
        if torch.compiler.is_compiling():
            return self._forward_in_place(weights, input, hx)
        return self.float_class.forward(with_weights(layer, weights), input, hx)

    def _forward_in_place(self, weights: list[Any], input: Any, hx: Any) -> Any:
        # A compiler cannot trace how another object of the class is made.
        layer = cast(nn.RNNBase, self)
        float_weights = layer._flat_weights
        layer._flat_weights = weights
        try:
            return self.float_class.forward(self, input, hx)
        finally:
            layer._flat_weights = float_weights

    def _quantized(self, name: str, weight: Tensor) -> Tensor:
        quantizer = cast(FakeQuantizer, self._quantizers_of(name.removeprefix("weight_")).weight)
        return cast(Tensor, quantizer(weight))


def with_weights(layer: nn.RNNBase, weights: list[Any]) -> nn.RNNBase:
    """Return a layer for one call that is `layer`, but for its weights.

    Threads call one layer at the same time, so that the weights cannot be exchanged in it.
    """
    changed = object.__new__(type(layer))
    vars(changed).update(vars(layer), _flat_weights=weights)
    return changed


class QuantizedLSTM(_QuantizedRecurrent, nn.LSTM):
    """`nn.LSTM` with fake-quantized weights."""

    float_class = nn.LSTM


class QuantizedGRU(_QuantizedRecurrent, nn.GRU):
    """`nn.GRU` with fake-quantized weights."""

    float_class = nn.GRU


class QuantizedRNN(_QuantizedRecurrent, nn.RNN):
    """`nn.RNN` with fake-quantized weights."""

    float_class = nn.RNN
