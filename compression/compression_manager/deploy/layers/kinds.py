"""Which deployed class stands for which float layer, by the name of the float layer's class."""

from __future__ import annotations

from compression_manager.deploy.layers.attention import ConvertedMultiheadAttention
from compression_manager.deploy.layers.base import ConvertedLayer
from compression_manager.deploy.layers.convolution import ConvertedConv
from compression_manager.deploy.layers.embedding import ConvertedEmbedding, ConvertedEmbeddingBag
from compression_manager.deploy.layers.functional import (
    ConvertedAdd,
    ConvertedAttention,
    ConvertedMatmul,
)
from compression_manager.deploy.layers.linear import ConvertedLinear
from compression_manager.deploy.layers.recurrent import ConvertedRecurrent
from compression_manager.deploy.layers.transposed import ConvertedConv1D, ConvertedConvTranspose

CONVERTED_CLASSES: dict[str, type[ConvertedLayer]] = {
    "Linear": ConvertedLinear,
    "Conv1d": ConvertedConv,
    "Conv2d": ConvertedConv,
    "Conv3d": ConvertedConv,
    "ConvTranspose1d": ConvertedConvTranspose,
    "ConvTranspose2d": ConvertedConvTranspose,
    "ConvTranspose3d": ConvertedConvTranspose,
    "Embedding": ConvertedEmbedding,
    "EmbeddingBag": ConvertedEmbeddingBag,
    "MultiheadAttention": ConvertedMultiheadAttention,
    "NonDynamicallyQuantizableLinear": ConvertedLinear,
    "LSTM": ConvertedRecurrent,
    "GRU": ConvertedRecurrent,
    "RNN": ConvertedRecurrent,
    "Conv1D": ConvertedConv1D,
    "QuantizableMatmul": ConvertedMatmul,
    "QuantizableAdd": ConvertedAdd,
    "QuantizableAttention": ConvertedAttention,
}
