"""Deployed `nn.MultiheadAttention`."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from compression_manager.deploy.layers.composite import ConvertedComposite
from compression_manager.deploy.layers.layer_spec import LayerSpec
from compression_manager.quantization.attention import ProjectedAttention
from compression_manager.quantization.layers.attention import (
    PROJECTIONS,
    QuantizedMultiheadAttention,
)


class ConvertedMultiheadAttention(ProjectedAttention, ConvertedComposite):
    """Deployed `nn.MultiheadAttention`: its projections compute with integer weights.

    The children `query`, `key` and `value` are the projections of the inputs; `out_proj` is
    whatever the model has under that name.
    """

    # torch's encoder layers ask for these before they choose a path.
    in_proj_bias = None
    in_proj_weight = None

    def __init__(self, float_layer: nn.Module, spec: LayerSpec) -> None:
        attention = cast(nn.MultiheadAttention, float_layer)
        ConvertedComposite.__init__(self, spec, QuantizedMultiheadAttention.operands_of(attention))
        for name in ("embed_dim", "kdim", "vdim", "num_heads", "head_dim", "batch_first"):
            setattr(self, name, getattr(attention, name))
        self._qkv_same_embed_dim = attention._qkv_same_embed_dim
        self.add_zero_attn = attention.add_zero_attn
        self.dropout = attention.dropout
        for name in ("bias_k", "bias_v"):
            value = cast(Tensor | None, getattr(attention, name))
            self.register_buffer(name, None if value is None else value.detach().clone())
        self.out_proj = attention.out_proj

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the projections of query, key and value."""
        q, k, v = (
            cast(Tensor, self.get_submodule(name)(input))
            for name, input in zip(PROJECTIONS, (query, key, value), strict=True)
        )
        return q, k, v
