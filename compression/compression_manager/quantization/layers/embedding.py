"""Quantization-aware lookup tables."""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from compression_manager.quantization.layers.base import Operand, SinglePartLayer


class _QuantizedTable(SinglePartLayer):
    quantizes_input = False  # its input is indices

    @staticmethod
    def operands_of(layer: nn.Module) -> dict[str, Operand]:
        """Return the table: (num_embeddings, embedding_dim), one row a channel."""
        return {"": Operand(cast(Tensor, layer.weight), None)}


class QuantizedEmbedding(_QuantizedTable, nn.Embedding):
    """`nn.Embedding` with a fake-quantized table; input: integer indices of any shape."""

    float_class = nn.Embedding

    def forward(self, input: Tensor) -> Tensor:
        """Return (*, embedding_dim)."""
        return F.embedding(
            input,
            self.quantized_weight(),
            self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
        )


class QuantizedEmbeddingBag(_QuantizedTable, nn.EmbeddingBag):
    """`nn.EmbeddingBag` with a fake-quantized table; modes sum, mean and max."""

    float_class = nn.EmbeddingBag

    def forward(
        self,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Return (bags, embedding_dim).

        Args:
            input: integer indices: (bags, length), or (N,) with offsets.
            offsets: (bags,), where each bag begins; one more with `include_last_offset`.
            per_sample_weights: factor of each index, shape of `input`; mode sum alone.
        """
        return F.embedding_bag(
            input,
            self.quantized_weight(),
            offsets,
            scale_grad_by_freq=self.scale_grad_by_freq,
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=self.padding_idx,
        )
