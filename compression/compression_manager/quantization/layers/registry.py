"""Which classes have a quantization-aware form, and the class change itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, SupportsIndex, cast

from torch import nn

from compression_manager.quantization.layers.attention import QuantizedMultiheadAttention
from compression_manager.quantization.layers.base import (
    QuantizedLayer,
    Quantizers,
    place_quantizers,
)
from compression_manager.quantization.layers.convolution import (
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedConv3d,
    QuantizedConvTranspose1d,
    QuantizedConvTranspose2d,
    QuantizedConvTranspose3d,
)
from compression_manager.quantization.layers.embedding import (
    QuantizedEmbedding,
    QuantizedEmbeddingBag,
)
from compression_manager.quantization.layers.functional import (
    QuantizedAdd,
    QuantizedAttention,
    QuantizedMatmul,
)
from compression_manager.quantization.layers.linear import (
    QuantizedConv1D,
    QuantizedLinear,
    QuantizedOutputProjection,
)
from compression_manager.quantization.layers.recurrent import (
    QuantizedGRU,
    QuantizedLSTM,
    QuantizedRNN,
)
from compression_manager.quantization.quantizers.quantizer_module import FakeQuantizer

QUANTIZED_CLASSES: dict[type[nn.Module], type[QuantizedLayer]] = {
    quantized.float_class: quantized
    for quantized in (
        QuantizedLinear,
        QuantizedConv1d,
        QuantizedConv2d,
        QuantizedConv3d,
        QuantizedEmbedding,
        QuantizedConvTranspose1d,
        QuantizedConvTranspose2d,
        QuantizedConvTranspose3d,
        QuantizedEmbeddingBag,
        QuantizedMultiheadAttention,
        QuantizedLSTM,
        QuantizedGRU,
        QuantizedRNN,
        QuantizedMatmul,
        QuantizedAdd,
        QuantizedAttention,
        QuantizedOutputProjection,
    )
}

# Classes of libraries that need not be installed, by module and name.
_BY_NAME: dict[tuple[str, str], type[QuantizedLayer]] = {
    ("transformers.pytorch_utils", "Conv1D"): QuantizedConv1D,
}
_MADE: dict[type[nn.Module], type[QuantizedLayer]] = {}


def quantized_class(kind: type[nn.Module]) -> type[QuantizedLayer] | None:
    """Return the quantization-aware class that a layer of exactly the class `kind` turns into."""
    if kind not in QUANTIZED_CLASSES:
        base = _BY_NAME.get((kind.__module__, kind.__qualname__))
        if base is None:
            return None
        if kind not in _MADE:
            attributes = {
                "float_class": kind,
                "__module__": base.__module__,
                "__doc__": base.__doc__,
                "__reduce_ex__": _reduce,
            }
            made = type(base.__name__, (base, kind), attributes)
            _MADE[kind] = cast(type[QuantizedLayer], made)
        return _MADE[kind]
    return QUANTIZED_CLASSES[kind]


def _reduce(layer: QuantizedLayer, protocol: SupportsIndex) -> Any:
    # Under the name of a class that was made, pickle finds its base.
    reduced = cast(tuple[Any, ...], object.__reduce_ex__(layer, max(int(protocol), 2)))
    return (_new_layer, (layer.float_class,), *reduced[2:])


def _new_layer(float_class: type[nn.Module]) -> QuantizedLayer:
    """Return an instance without state, which pickle and deepcopy fill."""
    kind = cast(type[QuantizedLayer], quantized_class(float_class))
    return kind.__new__(kind)


def quantize_layer(
    layer: nn.Module, weight_quantizer: FakeQuantizer, input_quantizer: FakeQuantizer | None
) -> QuantizedLayer:
    """Turn a layer of one part, whose exact class is supported, into its quantized subclass."""
    return quantize_parts(layer, {"": Quantizers(weight_quantizer, input_quantizer)})


def quantize_parts(layer: nn.Module, quantizers: Mapping[str, Quantizers]) -> QuantizedLayer:
    """Turn a layer whose exact class is supported into its quantized subclass.

    Args:
        layer: changed in place.
        quantizers: part -> its quantizers, for each part of the layer.
    """
    layer.__class__ = cast(type[QuantizedLayer], quantized_class(type(layer)))
    changed = cast(QuantizedLayer, layer)
    for part, pair in quantizers.items():
        place_quantizers(changed, part, pair)
    return changed
