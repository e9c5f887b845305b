"""Deployed `nn.Embedding` and `nn.EmbeddingBag`: only rows that are looked up are dequantized."""

from __future__ import annotations

from torch import Tensor

from compression_manager.deploy.layers.base import ConvertedLayer
from compression_manager.quantization.layers.embedding import pool_rows


class ConvertedEmbedding(ConvertedLayer):
    """Deployed `nn.Embedding`; dequantizes only the rows that are looked up."""

    def forward(self, input: Tensor) -> Tensor:
        """Return (*, embedding_dim) for integer indices of any shape."""
        tensors, rows = self.weight_tensors(), input.reshape(-1)
        values = self.weight_format.decode_rows(tensors, rows, self._dtype)
        return values.reshape(*input.shape, self.weight_format.shape[1])


class ConvertedEmbeddingBag(ConvertedEmbedding):
    """Deployed `nn.EmbeddingBag`; dequantizes only the rows that are looked up."""

    mode: str
    include_last_offset: bool
    padding_idx: int | None

    def forward(
        self,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Return (bags, embedding_dim); arguments as the float layer's."""
        rows = super().forward(input.reshape(-1))
        return pool_rows(self, rows, input, offsets, per_sample_weights)
