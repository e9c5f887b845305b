"""Quantization-aware multi-head attention."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from compression_manager.quantization.attention import ProjectedAttention
from compression_manager.quantization.layers.base import Operand, Part, QuantizedLayer
from compression_manager.quantization.layers.products import linear, project

PROJECTIONS = ("query", "key", "value")


class QuantizedMultiheadAttention(ProjectedAttention, QuantizedLayer, nn.MultiheadAttention):
    """`nn.MultiheadAttention` whose projections have fake-quantized operands.

    Its parts are the projections of query, key and value; the output projection is the child
    `out_proj`, which is called like any other layer. The products of attention itself stay in
    floating point.
    """

    float_class = nn.MultiheadAttention

    @staticmethod
    def operands_of(layer: nn.Module) -> dict[str, Operand]:
        """Return the three input projections, as views where one Parameter holds them all."""
        attention = cast(nn.MultiheadAttention, layer)
        if attention._qkv_same_embed_dim:
            weights = cast(Tensor, attention.in_proj_weight).chunk(3)
        else:
            weights = (
                cast(Tensor, attention.q_proj_weight),
                cast(Tensor, attention.k_proj_weight),
                cast(Tensor, attention.v_proj_weight),
            )
        bias = cast(Tensor | None, attention.in_proj_bias)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        return {
            name: Operand(*operand)
            for name, operand in zip(PROJECTIONS, zip(weights, biases, strict=True), strict=True)
        }

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the projections of query, key and value on fake-quantized operands."""
        parts, options = self.parts(), self.product_options
        if query is key and key is value and self._qkv_same_embed_dim:
            quantizers = self._quantizers_of(PROJECTIONS[0])
            joint = Part(self.in_proj_weight, self.in_proj_bias, *quantizers)
            q, k, v = project(joint, list(parts.values()), options, query)
        else:
            q, k, v = (
                linear(parts[name], options, input)
                for name, input in zip(PROJECTIONS, (query, key, value), strict=True)
            )
        return q, k, v
