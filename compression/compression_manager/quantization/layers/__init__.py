"""Quantization-aware layers: subclasses that a supported layer turns into, in place.

Changing the class keeps the module object, its Parameters, names, hooks and `isinstance`
relations, so that optimizers, taps and the model's own control flow stay valid.
"""

from compression_manager.quantization.layers.attention import QuantizedMultiheadAttention
from compression_manager.quantization.layers.base import (
    Operand,
    Part,
    QuantizedLayer,
    Quantizers,
    SinglePartLayer,
    restore_layer,
    weight_identity,
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
    QuantizableAdd,
    QuantizableAttention,
    QuantizableMatmul,
    QuantizedAdd,
    QuantizedAttention,
    QuantizedMatmul,
)
from compression_manager.quantization.layers.linear import QuantizedConv1D, QuantizedLinear
from compression_manager.quantization.layers.recurrent import (
    QuantizedGRU,
    QuantizedLSTM,
    QuantizedRNN,
)
from compression_manager.quantization.layers.registry import (
    QUANTIZED_CLASSES,
    quantize_layer,
    quantize_parts,
    quantized_class,
)

__all__ = [
    "QUANTIZED_CLASSES",
    "quantized_class",
    "quantize_layer",
    "quantize_parts",
    "restore_layer",
    "weight_identity",
    "Operand",
    "Part",
    "Quantizers",
    "QuantizedLayer",
    "SinglePartLayer",
    "QuantizedLinear",
    "QuantizedConv1D",
    "QuantizedConv1d",
    "QuantizedConv2d",
    "QuantizedConv3d",
    "QuantizedConvTranspose1d",
    "QuantizedConvTranspose2d",
    "QuantizedConvTranspose3d",
    "QuantizedEmbedding",
    "QuantizedEmbeddingBag",
    "QuantizedMultiheadAttention",
    "QuantizedLSTM",
    "QuantizedGRU",
    "QuantizedRNN",
    "QuantizableMatmul",
    "QuantizableAdd",
    "QuantizableAttention",
    "QuantizedMatmul",
    "QuantizedAdd",
    "QuantizedAttention",
]
