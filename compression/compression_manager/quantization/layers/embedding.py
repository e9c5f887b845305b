"""Quantization-aware lookup tables."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compression_manager.quantization.arithmetic.parameters import compute_qparams
from compression_manager.quantization.arithmetic.ranges import tensor_range
from compression_manager.quantization.arithmetic.rounding import fake_quantize
from compression_manager.quantization.exporting import is_exporting
from compression_manager.quantization.layers.base import Operand, SinglePartLayer, has_hooks
from compression_manager.quantization.observers.extremes import gives_own_range
from compression_manager.quantization.quantizers.quantizer_module import (
    FakeQuantizer,
    ObservedFakeQuantizer,
)


class _QuantizedTable(SinglePartLayer):
    quantizes_input = False  # its input is indices

    @staticmethod
    def operands_of(layer: nn.Module) -> dict[str, Operand]:
        """Return the table: (num_embeddings, embedding_dim), one row a channel."""
        return {"": Operand(cast(Tensor, layer.weight), None)}


class QuantizedEmbedding(_QuantizedTable, nn.Embedding):
    """`nn.Embedding` with a fake-quantized table; input: integer indices of any shape.

    Where each row has a range of its own, only the rows that are looked up are quantized, unless
    these are more than the table has: values and gradients are equal, to the last bit.
    """

    float_class = nn.Embedding

    def forward(self, input: Tensor) -> Tensor:
        """Return (*, embedding_dim)."""
        quantizer = self.weight_quantizer
        if not _has_ranges_of_rows(quantizer) or input.numel() >= self.num_embeddings:
            return self._rows(input, self.quantized_weight())
        rows = self._rows(input, self.weight)
        return _quantized_rows(quantizer, rows) if quantizer.phase.quantizing else rows

    def _rows(self, input: Tensor, table: Tensor) -> Tensor:
        return F.embedding(
            input, table, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq
        )


def _has_ranges_of_rows(quantizer: FakeQuantizer) -> bool:
    """Return whether the integers of a row follow from the row alone, and nobody looks on.

    A graph for any batch must not depend on how many rows are looked up.
    """
    return (
        not is_exporting()
        and not has_hooks(quantizer)
        and type(quantizer) is ObservedFakeQuantizer
        and gives_own_range(quantizer.observer)
        and quantizer.scheme.granularity in ("channel", "group")
        and quantizer.scheme.axis in (None, 0)
    )


def _quantized_rows(quantizer: FakeQuantizer, rows: Tensor) -> Tensor:
    """Return rows (*, embedding_dim), each fake-quantized as it is in the table."""
    scheme, flat = quantizer.scheme, rows.reshape(-1, rows.shape[-1])
    scale, zero_point = compute_qparams(*tensor_range(flat, scheme), scheme)
    limits = scheme.quant_min, scheme.quant_max, scheme.axis
    values = fake_quantize(flat, scale, zero_point, *limits, group_size=scheme.group_size)
    return values.reshape(rows.shape)


class QuantizedEmbeddingBag(_QuantizedTable, nn.EmbeddingBag):
    """`nn.EmbeddingBag` with a fake-quantized table; modes sum, mean and max.

    Quantizes the rows that are looked up, or the table, as `QuantizedEmbedding` does; with
    `scale_grad_by_freq`, which counts a row's indices, the table. Gradients of a row that several
    indices look up are summed in another order.
    """

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
        quantizer = self.weight_quantizer
        if (
            _has_ranges_of_rows(quantizer)
            and input.numel() < self.num_embeddings
            and not self.scale_grad_by_freq
        ):
            rows = F.embedding(input.reshape(-1), self.weight)
            if quantizer.phase.quantizing:
                rows = _quantized_rows(quantizer, rows)
            return pool_rows(self, rows, input, offsets, per_sample_weights)
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


def pool_rows(
    layer: Any,
    rows: Tensor,
    input: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
) -> Tensor:
    """Return the bags, (bags, embedding_dim), of rows that were looked up already.

    Args:
        layer: has mode, padding_idx and include_last_offset of `nn.EmbeddingBag`.
        rows: (N, embedding_dim), row i that of index i of the N in `input`.
        input: as the layer's.
        offsets: as the layer's.
        per_sample_weights: as the layer's.
    """
    count, padding = input.numel(), None
    positions = torch.arange(count, device=input.device, dtype=input.dtype)
    if layer.padding_idx is not None:
        # One more row, after them, stands for all that is padding.
        rows, padding = F.pad(rows, (0, 0, 0, 1)), count
        positions = positions.masked_fill(input.reshape(-1) == layer.padding_idx, padding)
    return F.embedding_bag(
        positions.reshape(input.shape),
        rows,
        offsets,
        mode=layer.mode,
        per_sample_weights=per_sample_weights,
        include_last_offset=layer.include_last_offset,
        padding_idx=padding,
    )
