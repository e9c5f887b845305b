"""Products and sums of two activations as modules, so that their operands can be quantized.

A model that adds, or calls `torch.matmul` or `scaled_dot_product_attention`, has no layer there
that could change its class; it calls one of these instead. In a float model they only forward.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compression_manager.quantization.layers.base import Operand, QuantizedLayer
from compression_manager.quantization.layers.sums import add


class QuantizableMatmul(nn.Module):
    """`torch.matmul` of two activations, each of which can be quantized."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Return left @ right: (..., n, m) of (..., n, k) and (..., k, m)."""
        return torch.matmul(left, right)


class QuantizableAdd(nn.Module):
    """The sum at the end of a residual block, whose residual can be quantized.

    The residual is a tensor that outlives the block, in most cases the block's input. The other
    operand is what the block's last layer has just computed; it stays in floating point, so that
    runtimes add the residual to it before they write it. Each sum has a module of its own, because
    each residual has a range of its own.
    """

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:
        """Return input + residual.

        Args:
            input: what the block computed.
            residual: what it is added to; the same shape, or one that broadcasts.
        """
        return input + residual


class QuantizableAttention(nn.Module):
    """`scaled_dot_product_attention` whose query, key and value can be quantized.

    The attention weights stay inside of torch's kernel and in floating point.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Return (N, heads, L, value width); arguments as torch's function.

        Args:
            query: (N, heads, L, width).
            key: (N, heads, S, width).
            value: (N, heads, S, value width).
            attn_mask: bool (True takes part) or float (is added), broadcastable to
                (N, heads, L, S).
            dropout_p: applied whenever it is not zero, in eval mode as well.
            is_causal: query i attends to keys 0 to i.
            scale: factor of the scores; 1 / sqrt(width) if left out.
            enable_gqa: whether several query heads share one head of key and value.
        """
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )


class _QuantizedInputs(QuantizedLayer):
    """A layer without weights; its parts are the inputs that are quantized."""

    def quantized_input(self, name: str, input: Tensor) -> Tensor:
        """Return the input `name`, fake-quantized."""
        quantizer = self._quantizers_of(name).input
        return input if quantizer is None else cast(Tensor, quantizer(input))


class QuantizedMatmul(_QuantizedInputs, QuantizableMatmul):
    """`QuantizableMatmul` of fake-quantized operands."""

    float_class = QuantizableMatmul

    @staticmethod
    def operands_of(layer: nn.Module) -> dict[str, Operand]:
        """Return the two inputs, which have no weight."""
        return dict.fromkeys(("left", "right"), Operand(None, None))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Return left @ right."""
        return super().forward(
            self.quantized_input("left", left), self.quantized_input("right", right)
        )


class QuantizedAdd(_QuantizedInputs, QuantizableAdd):
    """`QuantizableAdd` of a fake-quantized residual."""

    float_class = QuantizableAdd

    @staticmethod
    def operands_of(layer: nn.Module) -> dict[str, Operand]:
        """Return the residual, which has no weight."""
        return {"residual": Operand(None, None)}

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:
        """Return input + residual."""
        return add(self.parts()["residual"], self.product_options, input, residual)


class QuantizedAttention(_QuantizedInputs, QuantizableAttention):
    """`QuantizableAttention` of fake-quantized query, key and value."""

    float_class = QuantizableAttention

    @staticmethod
    def operands_of(layer: nn.Module) -> dict[str, Operand]:
        """Return the three inputs, which have no weight."""
        return dict.fromkeys(("query", "key", "value"), Operand(None, None))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Return the attention; arguments as `QuantizableAttention`'s."""
        return super().forward(
            self.quantized_input("query", query),
            self.quantized_input("key", key),
            self.quantized_input("value", value),
            attn_mask,
            dropout_p,
            is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )
