"""The passes over memory around an integer product, as one interface for two implementations."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from compression_manager.quantization.scheme import QuantizationScheme

# What `quantize_rows` quantizes to: -127 to 127, one scale for each row.
ROWS = QuantizationScheme(bits=8, symmetric=True, granularity="channel", axis=0)


class Passes(ABC):
    """Element-wise passes, and products in bfloat16.

    All floating-point tensors are float32. What is called dense is contiguous or channels_last;
    results have the memory format of the input. Bits are those of `pack_mask`, of the elements
    in the order of memory.

    Attributes:
        name: for reports, and to tell the results of one implementation from another's.
    """

    name: str

    @abstractmethod
    def quantize(
        self,
        input: Tensor,
        inverse_scale: float | Tensor,
        zero_point: int | Tensor,
        quant_min: int,
        quant_max: int,
        clips: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the integers of `arithmetic.quantize`, and which elements were clipped.

        Args:
            input: dense.
            inverse_scale: 1 / scale, rounded to float32.
            zero_point: integer of real zero.
            quant_min: smallest integer.
            quant_max: largest integer.
            clips: False if the caller knows that nothing is clipped or not a number.

        Returns:
            codes: uint8 if there are no negative ones, else int8; NaN becomes the zero point.
            clipped: bits of what lay outside of the range, NaN included; None if nothing did (on
                an accelerator: only if `clips` is False).
        """

    @abstractmethod
    def quantize_rows(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the integers of each row with its largest magnitude as the end of the range.

        Args:
            weight: (rows, columns), contiguous, with at least one column.

        Returns:
            codes: int8 (rows, columns), of the scheme `ROWS`.
            scale: float32 (rows,), as `compute_qparams` gives it; NaN in rows that are not finite,
                whose codes mean nothing.
        """

    @abstractmethod
    def dequantize(
        self, codes: Tensor, scale: float | Tensor, zero_point: int | Tensor
    ) -> Tensor:
        """Return (codes - zero_point) * scale of dense uint8 or int8 codes."""

    @abstractmethod
    def dequantize_rows(self, codes: Tensor, scale: Tensor) -> Tensor:
        """Return codes * scale[row] of dense int8 codes (rows, ...) and scales (rows,)."""

    @abstractmethod
    def clear_clipped(self, gradient: Tensor, clipped: Tensor) -> Tensor:
        """Return the dense gradient, in place of which zeros stand where a bit is set."""

    @abstractmethod
    def relu(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Return max(input, 0), where NaN stays NaN, and bits of what is not at most zero."""

    @abstractmethod
    def relu_gradient(self, gradient: Tensor, positive: Tensor) -> Tensor:
        """Return the dense gradient where a bit is set, else exactly zero."""

    @abstractmethod
    def supports_pieces(self, pieces: int) -> bool:
        """Return whether this machine multiplies `pieces` (1 or 3) bfloat16 parts of a float32."""

    @abstractmethod
    def multiply(self, left: Tensor, right: Tensor, zero_point: int, pieces: int) -> Tensor:
        """Return left @ (right - zero_point) with bfloat16 factors and float32 sums.

        Args:
            left: (M, K); split into as many bfloat16 numbers as there are pieces.
            right: int8 or uint8 (K, N), whose differences from the zero point bfloat16 holds.
            zero_point: from -128 to 255.
            pieces: 1: each factor rounded to bfloat16. 3: with float32's own error.

        Returns:
            float32 (M, N).
        """

    @abstractmethod
    def multiply_transposed(
        self, left: Tensor, right: Tensor, zero_point: int, pieces: int
    ) -> Tensor:
        """Return left.T @ (right - zero_point): (M, N) of (K, M) and (K, N); as `multiply`."""


def in_memory_order(tensor: Tensor) -> Tensor:
    """Return all elements of a dense tensor in one dimension, as a view."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())
