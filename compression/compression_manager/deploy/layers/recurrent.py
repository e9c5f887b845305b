"""Deployed recurrent layers: integer weights, torch's float kernels."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from compression_manager.deploy.layers.base import ConvertedLayer
from compression_manager.deploy.layers.composite import ConvertedComposite
from compression_manager.deploy.layers.layer_spec import LayerSpec
from compression_manager.quantization.layers.recurrent import QuantizedLSTM, with_weights


class ConvertedRecurrent(ConvertedComposite):
    """Deployed `nn.LSTM`, `nn.GRU` or `nn.RNN`; arguments and results as the float layer's.

    Each matrix is a child with its bias: `ih_l0`, `hh_l0` and so on.
    """

    def __init__(self, float_layer: nn.Module, spec: LayerSpec) -> None:
        super().__init__(spec, QuantizedLSTM.operands_of(float_layer))
        for name in cast(list[str], float_layer.__constants__):
            setattr(self, name, getattr(float_layer, name))
        # In a tuple it is no child, which would put it into the state_dict.
        self._kernel = (_without_storage(cast(nn.RNNBase, float_layer)),)

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Return the outputs and the last state."""
        data = input.data if isinstance(input, PackedSequence) else cast(Tensor, input)
        (kernel,) = self._kernel
        weights = [self._float_tensor(name, data.dtype) for name in kernel._flat_weights_names]
        return with_weights(kernel, weights).forward(input, hx)

    def flatten_parameters(self) -> None:
        """Do nothing; models call this for the sake of cuDNN."""

    def _float_tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        kind, _, part_name = name.partition("_")
        part = cast(ConvertedLayer, self.get_submodule(part_name))
        return part.float_weight(dtype) if kind == "weight" else cast(Tensor, part.bias)


def _without_storage(layer: nn.RNNBase) -> nn.RNNBase:
    """Return an eval-mode layer of the same shape whose parameters hold no values."""
    options: dict[str, Any] = {
        "bias": layer.bias,
        "batch_first": layer.batch_first,
        "bidirectional": layer.bidirectional,
        "device": "meta",
    }
    sizes = layer.input_size, layer.hidden_size, layer.num_layers
    if layer.mode == "LSTM":
        return nn.LSTM(*sizes, proj_size=layer.proj_size, **options).eval()
    if layer.mode == "GRU":
        return nn.GRU(*sizes, **options).eval()
    nonlinearity = layer.mode.removeprefix("RNN_").lower()
    return nn.RNN(*sizes, nonlinearity=nonlinearity, **options).eval()
