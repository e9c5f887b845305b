"""One weight as integers: what is stored for it, and the way there and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compression_manager.errors import QuantizationError
from compression_manager.quantization.arithmetic import dequantize, quantize
from compression_manager.quantization.ranges import range_shape
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
        """Return suffix of the name -> tensor; `weight` is finite, of this shape."""
        scheme = self.scheme
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
        scale = torch.ones(range_shape(scheme, self.shape), device=device)
        return self._tensors(integers, scale, torch.zeros_like(scale))

    def decode(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Return (integers - zero point) * scale in `dtype`, in the shape of the weight."""
        scheme = self.scheme
        integers = tensors[INTEGERS]
        zero_point: Tensor | int = scheme.symmetric_zero_point
        if not scheme.symmetric:
            zero_point = tensors[ZERO_POINT]
        if self.is_packed:
            count = math.prod(self.shape)
            integers = unpack_bits(integers, scheme.bits, count).reshape(self.shape)
            # The integers are small, so that moving the zero point instead of them is exact.
            if isinstance(zero_point, Tensor):
                zero_point = zero_point.to(torch.int32)
            zero_point = zero_point - scheme.quant_min
        return dequantize(
            integers,
            tensors[SCALE],
            zero_point,
            scheme.axis,
            dtype,
            group_size=scheme.group_size,
        )

    def suffixes(self) -> tuple[str, ...]:
        """Return the suffixes of the names of the stored tensors."""
        if self.scheme.symmetric:
            return (INTEGERS, SCALE, SCHEME)
        return (INTEGERS, SCALE, ZERO_POINT, SCHEME)

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
