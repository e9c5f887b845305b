"""One weight as integers: what is stored for it, and the way there and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from compression_manager.errors import QuantizationError
from compression_manager.quantization.arithmetic.ranges import range_shape
from compression_manager.quantization.arithmetic.rounding import dequantize, quantize
from compression_manager.quantization.scheme import QuantizationScheme
from compression_manager.quantization.storage.packing import (
    pack_bits,
    packed_length,
    unpack_bits,
)

# What is appended to a weight's name gives the names of its tensors.
INTEGERS, SCALE, ZERO_POINT, SCHEME = "", "_scale", "_zero_point", "_scheme"


@dataclass(frozen=True)
class WeightFormat:
    """Which tensors stand for a weight of a given shape under a scheme.

    - integers: the scheme's `storage_dtype` in the shape of the weight; with less than 8 bits
      uint8 (bytes,), the values minus quant_min as `pack_bits` packs them.
    - scale: float32, in the shape of the ranges.
    - zero point: the scheme's `storage_dtype`, shape of the scale; of affine schemes only.
    - scheme: int32 (6 + dimensions,), bits, symmetric, signed, narrow range, axis (-1 without),
      group size (0 without), and the shape: a file then tells itself how it is to be read.
    """

    scheme: QuantizationScheme
    shape: tuple[int, ...]

    @property
    def is_packed(self) -> bool:
        """Whether several values share a byte."""
        return self.scheme.bits < 8

    def encode(self, weight: Tensor, scale: Tensor, zero_point: Tensor) -> dict[str, Tensor]:
        """Return suffix of the name -> tensor; `weight` is finite, of this shape.

        Raises:
            QuantizationError: a zero point is not the fixed one of a symmetric scheme, or lies
                outside of the range of integers.
        """
        scheme = self.scheme
        self._check_zero_point(zero_point)
        integers = quantize(
            weight,
            scale,
            zero_point,
            scheme.quant_min,
            scheme.quant_max,
            scheme.axis,
            group_size=scheme.group_size,
        ).contiguous()
        if self.is_packed:
            codes = (integers.to(torch.int16) - scheme.quant_min).to(torch.uint8)
            integers = pack_bits(codes, scheme.bits)
        return self._tensors(integers, scale, zero_point)

    def placeholders(self, device: torch.device) -> dict[str, Tensor]:
        """Return what `encode` does, with meaningless values that a state_dict replaces."""
        scheme = self.scheme
        packed = (packed_length(math.prod(self.shape), scheme.bits),)
        integers = torch.zeros(
            packed if self.is_packed else self.shape,
            dtype=torch.uint8 if self.is_packed else scheme.storage_dtype,
            device=device,
        )
        shape = range_shape(scheme, self.shape)
        scale = torch.ones(shape, dtype=torch.float32, device=device)
        return self._tensors(integers, scale, torch.zeros_like(scale))

    def decode(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Return (integers - zero point) * scale in `dtype`, in the shape of the weight."""
        return self._dequantize(self._codes(tensors[INTEGERS]), tensors, dtype)

    def decode_rows(
        self, tensors: Mapping[str, Tensor], rows: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """Return `decode(tensors, dtype)[rows]` of a matrix, dequantizing those rows alone.

        Args:
            tensors: suffix of the name -> tensor.
            rows: int32 or int64, (count,).
            dtype: floating-point type of the result.

        Raises:
            IndexError: a number of no row. As an index, a negative one would count from the end.
            RuntimeError: another dtype. As an index, uint8 would be a mask.
        """
        scheme, (height, width) = self.scheme, self.shape
        if self.is_packed and width * scheme.bits % 8 == 0:
            # Every row begins with a byte of its own.
            packed = tensors[INTEGERS].reshape(height, packed_length(width, scheme.bits))
            codes = unpack_bits(F.embedding(rows, packed), scheme.bits, width)
        else:
            codes = F.embedding(rows, self._codes(tensors[INTEGERS]))
        selected = dict(tensors)
        if scheme.group_size is not None or (scheme.axis is not None and scheme.axis % 2 == 0):
            selected |= {name: tensors[name][rows] for name in self.value_suffixes()[1:]}
        return self._dequantize(codes, selected, dtype)

    def integers(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the integers in the scheme's `storage_dtype`, in the shape of the weight."""
        codes = self._codes(tensors[INTEGERS])
        if not self.is_packed:
            return codes
        return (codes.to(torch.int16) + self.scheme.quant_min).to(self.scheme.storage_dtype)

    def value_suffixes(self) -> tuple[str, ...]:
        """Return the suffixes of the names of the tensors that `decode` reads."""
        return (INTEGERS, SCALE) if self.scheme.symmetric else (INTEGERS, SCALE, ZERO_POINT)

    def suffixes(self) -> tuple[str, ...]:
        """Return the suffixes of the names of the stored tensors."""
        return (*self.value_suffixes(), SCHEME)

    def find_mismatch(self, state: Mapping[str, Tensor], name: str) -> str | None:
        """Return why the tensors of `name` in a state_dict are not of this format, or None.

        Tensors that are missing, or have another shape, are left for torch to report.
        """
        integers, description = state.get(name), state.get(name + SCHEME)
        if integers is not None and integers.is_floating_point():
            return (
                f"'{name}' is {integers.dtype} there, and integers ({self.scheme}) here; load "
                "floating-point weights before quantizing the model."
            )
        if description is not None:
            expected = self._description(description.device)
            if not torch.equal(expected, description.to(torch.int32)):
                return (
                    f"'{name}' is {_describe(description)} there, and {self} here; use the "
                    "same architecture and scheme."
                )
        return None

    def __str__(self) -> str:
        return f"{self.scheme} of shape {self.shape}"

    def _codes(self, integers: Tensor) -> Tensor:
        """Return the integers in the weight's shape; packed ones count from quant_min."""
        if not self.is_packed:
            return integers
        count = math.prod(self.shape)
        return unpack_bits(integers, self.scheme.bits, count).reshape(self.shape)

    def _dequantize(
        self, codes: Tensor, tensors: Mapping[str, Tensor], dtype: torch.dtype
    ) -> Tensor:
        scheme = self.scheme
        zero_point: Tensor | int = scheme.symmetric_zero_point
        if not scheme.symmetric:
            zero_point = tensors[ZERO_POINT]
        if self.is_packed:
            # The integers are small, so that moving the zero point instead of them is exact.
            if isinstance(zero_point, Tensor):
                zero_point = zero_point.to(torch.int32)
            zero_point = zero_point - scheme.quant_min
        return dequantize(
            codes, tensors[SCALE], zero_point, scheme.axis, dtype, group_size=scheme.group_size
        )

    def _check_zero_point(self, zero_point: Tensor) -> None:
        scheme = self.scheme
        low, high = scheme.quant_min, scheme.quant_max
        if scheme.symmetric:
            low = high = scheme.symmetric_zero_point
        outside = (zero_point < low) | (zero_point > high)
        if bool(outside.any()):
            valid = str(low) if low == high else f"from {low} to {high}"
            raise QuantizationError(
                f"the zero point of a weight with the scheme {scheme} is {valid}, got "
                f"{int(zero_point[outside][0])}."
            )

    def _tensors(self, integers: Tensor, scale: Tensor, zero_point: Tensor) -> dict[str, Tensor]:
        every = {
            INTEGERS: integers,
            SCALE: scale,
            ZERO_POINT: zero_point.to(self.scheme.storage_dtype),
            SCHEME: self._description(scale.device),
        }
        return {suffix: every[suffix] for suffix in self.suffixes()}

    def _description(self, device: torch.device) -> Tensor:
        scheme = self.scheme
        # Counted from the front, so that equal meanings have equal descriptions.
        axis = -1 if scheme.axis is None else scheme.axis % len(self.shape)
        narrow = scheme.quant_max - scheme.quant_min + 2 == 1 << scheme.bits
        fields = (scheme.bits, scheme.symmetric, scheme.signed, narrow, axis, scheme.group_size)
        return torch.tensor(
            [int(field or 0) for field in fields] + list(self.shape),
            dtype=torch.int32,
            device=device,
        )


def _describe(description: Tensor) -> str:
    """Return scheme and shape of what `WeightFormat` described as a tensor."""
    try:
        bits, symmetric, signed, narrow, axis, group_size, *shape = description.tolist()
        granularity = "group" if group_size else "channel" if axis >= 0 else "tensor"
        scheme = QuantizationScheme(
            bits,
            bool(symmetric),
            granularity,
            axis if axis >= 0 else None,
            group_size or None,
            signed=bool(signed),
            narrow_range=bool(narrow),
        )
    except (ValueError, TypeError, QuantizationError):
        return "of an unknown format"
    return str(WeightFormat(scheme, tuple(shape)))
