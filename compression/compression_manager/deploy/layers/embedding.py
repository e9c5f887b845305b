"""Deployed `nn.Embedding` and `nn.EmbeddingBag`: only rows that are looked up are dequantized."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from compression_manager.deploy.layers.base import ConvertedLayer


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
    embedding_dim: int

    def forward(
        self,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Return (bags, embedding_dim); arguments as the float layer's."""
        indices = input.reshape(-1)
        rows = super().forward(indices)
        # Row i is that of index i; one more, after them, stands for all that is padding.
        rows = torch.cat([rows, rows.new_zeros(1, self.embedding_dim)])
        positions = torch.arange(indices.numel(), device=input.device, dtype=input.dtype)
        if self.padding_idx is not None:
            positions = positions.masked_fill(indices == self.padding_idx, indices.numel())
        return F.embedding_bag(
            positions.reshape(input.shape),
            rows,
            offsets,
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=None if self.padding_idx is None else indices.numel(),
        )
