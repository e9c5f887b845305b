"""The line of a fake quantization."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from compression_manager.errors import QuantizationError
from compression_manager.quantization.arithmetic.parameters import choose_qparams
from compression_manager.quantization.arithmetic.ranges import tensor_range
from compression_manager.quantization.graph.operations import Operation, Shape, as_shape
from compression_manager.quantization.scheme import MAX_BITS, MIN_BITS, QuantizationScheme


@dataclass(frozen=True, eq=False)
class FakeQuantizeOp(Operation):
    """A tensor rounded to the grid of its integers; `str()` is its line in a graph.

    `t1 = FakeQuantize(t0, bits=8, scale=0.0157, zero_point=0, symmetric=True) : Float32 [2, 3]`.
    Several scales are printed as their range, `scale=0.0011..0.0157`, and an absent one as
    `auto`: it is known once `with_range` or `with_range_of` is called, or, if `dynamic`, anew for
    every input.

    Nothing is checked before `validate`. The fields after `symmetric` are those of
    `QuantizationScheme`.

    Attributes:
        input_id: number of the tensor that is quantized.
        output_id: number of the result.
        shape: of both; None or -1 is an unknown dimension, None alone an unknown rank.
        num_bits: 1 to 32.
        scale: step between neighbouring values: a number, or one for each channel, group or
            token; None if unknown.
        zero_point: the integer of real zero, or one for each scale.
        symmetric: whether the zero point is the middle of a narrow range.
        dtype: element type of both tensors.
    """

    input_id: int
    output_id: int
    shape: Shape | None
    num_bits: int = 8
    scale: float | Sequence[float] | Tensor | None = None
    zero_point: int | Sequence[int] | Tensor = 0
    symmetric: bool = True
    _: KW_ONLY
    granularity: str = "tensor"
    axis: int | None = None
    group_size: int | None = None
    dynamic: bool = False
    signed: bool = True
    narrow_range: bool | None = None
    dtype: str = "Float32"
    kind: str = field(default="FakeQuantize", init=False, repr=False)
    input_ids: tuple[int, ...] = field(default=(), init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "input_ids", (self.input_id,))
        object.__setattr__(self, "shape", as_shape(self.shape))

    @property
    def scheme(self) -> QuantizationScheme:
        """How the tensor is quantized.

        Raises:
            QuantizationError: the numbers make no scheme, for example 33 bits.
        """
        return QuantizationScheme(
            bits=self.num_bits,
            symmetric=self.symmetric,
            granularity=self.granularity,
            axis=self.axis,
            group_size=self.group_size,
            dynamic=self.dynamic,
            signed=self.signed,
            narrow_range=self.narrow_range,
        )

    @classmethod
    def of_scheme(
        cls,
        input_id: int,
        output_id: int,
        shape: Sequence[int | None] | None,
        scheme: QuantizationScheme,
        scale: float | Sequence[float] | Tensor | None = None,
        zero_point: int | Sequence[int] | Tensor | None = None,
        *,
        dtype: str = "Float32",
    ) -> FakeQuantizeOp:
        """Return the operation that quantizes as `scheme` says.

        Args:
            zero_point: if left out, the middle of a symmetric range, else 0.
        """
        if zero_point is None:
            zero_point = scheme.symmetric_zero_point if scheme.symmetric else 0
        return cls(
            input_id,
            output_id,
            as_shape(shape),
            scheme.bits,
            scale,
            zero_point,
            scheme.symmetric,
            granularity=scheme.granularity,
            axis=scheme.axis,
            group_size=scheme.group_size,
            dynamic=scheme.dynamic,
            signed=scheme.signed,
            narrow_range=scheme.narrow_range,
            dtype=dtype,
        )

    def with_range(self, minimum: float | Tensor, maximum: float | Tensor) -> FakeQuantizeOp:
        """Return the operation with the scale and zero point of a range (`choose_qparams`).

        Args:
            minimum: smallest value, or one for each scale.
            maximum: largest value, same shape.

        Returns:
            A new operation; the operation itself if it has a scale already.

        Raises:
            QuantizationError: names the line; its scheme or the range is invalid.
        """
        if self.scale is not None:
            return self
        try:
            scale, zero_point = choose_qparams(
                _range_end(minimum), _range_end(maximum), self.scheme
            )
        except QuantizationError as error:
            raise self.error(str(error)) from error
        return replace(self, scale=_plain(scale), zero_point=_plain(zero_point))

    def with_range_of(self, input: Tensor) -> FakeQuantizeOp:
        """Return the operation with the scale and zero point of the range of `input`.

        Args:
            input: floating point, in the operation's shape.

        Returns:
            A new operation; the operation itself if it has a scale already.

        Raises:
            QuantizationError: names the line; its scheme is invalid, or `input` is not finite.
        """
        if self.scale is not None:
            return self
        try:
            minimum, maximum = tensor_range(input, self.scheme)
        except QuantizationError as error:
            raise self.error(str(error)) from error
        return self.with_range(minimum, maximum)

    def validate(self) -> None:
        """Check bits, scale and zero point, besides ids and shape.

        Raises:
            QuantizationError: bits outside of 1 to 32, a scale that is not finite and positive, a
                zero point outside of the range of the integers; names the line.
        """
        super().validate()
        if self.input_id == self.output_id:
            raise self.error("it reads its own result.")
        if isinstance(self.num_bits, bool) or not isinstance(self.num_bits, int):
            raise self.error(f"bits={self.num_bits!r} is not an integer.")
        if not MIN_BITS <= self.num_bits <= MAX_BITS:
            raise self.error(f"bits={self.num_bits}; valid are {MIN_BITS} to {MAX_BITS}.")
        try:
            scheme = self.scheme
        except QuantizationError as error:
            raise self.error(str(error)) from error
        self._check_scale()
        self._check_zero_point(scheme)

    def arguments(self) -> str:
        """Return the input id and the numbers of the quantization."""
        parts = [
            f"t{self.input_id}",
            f"bits={self.num_bits}",
            f"scale={format_scale(self.scale)}",
            f"zero_point={format_zero_point(self.zero_point)}",
            f"symmetric={self.symmetric}",
        ]
        if self.granularity == "token":
            parts.append("granularity=token")
        for name, usual in (
            ("axis", None),
            ("group_size", None),
            ("dynamic", False),
            ("signed", True),
            ("narrow_range", None),
        ):
            if getattr(self, name) != usual:
                parts.append(f"{name}={getattr(self, name)}")
        return ", ".join(parts)

    def _check_scale(self) -> None:
        if self.scale is None:
            return
        for value in _extremes(self.scale):
            if not math.isfinite(value) or value <= 0:
                shown = repr(self.scale) if math.isnan(value) else value
                raise self.error(f"the scale {shown} is not finite and positive.")

    def _check_zero_point(self, scheme: QuantizationScheme) -> None:
        for value in _extremes(self.zero_point):
            if not math.isfinite(value) or value != int(value):
                shown = repr(self.zero_point) if math.isnan(value) else value
                raise self.error(f"the zero point {shown} is not an integer.")
            if not scheme.quant_min <= value <= scheme.quant_max:
                raise self.error(
                    f"the zero point {int(value)} lies outside of the integers, "
                    f"{scheme.quant_min} to {scheme.quant_max}."
                )


def format_scale(scale: float | Sequence[float] | Tensor | None) -> str:
    """Return `auto` for None, else the scale, or the range of several: `0.0011..0.0157`.

    Four decimals, but at least three digits that are not leading zeros.
    """
    if scale is None:
        return "auto"
    shown = [_short(value) for value in _extremes(scale)]
    return shown[0] if shown[0] == shown[-1] else f"{shown[0]}..{shown[-1]}"


def format_zero_point(zero_point: int | Sequence[int] | Tensor) -> str:
    """Return the zero point, or the range of several: `-3..4`."""
    low, high = (
        f"{value:g}" if value != value // 1 else str(int(value)) for value in _extremes(zero_point)
    )
    return low if low == high else f"{low}..{high}"


def _short(value: float) -> str:
    rounded = round(value, 4)
    if abs(value) < 0.01:
        rounded = float(f"{value:.3g}")
    return repr(rounded)


def _extremes(value: float | Sequence[float] | Tensor) -> tuple[float, float]:
    """Return the smallest and the largest number; NaN if there is any, or no number."""
    if isinstance(value, (int, float)):
        return value, value
    try:
        numbers = torch.as_tensor(value).detach().double()
    except (TypeError, ValueError, RuntimeError):
        return math.nan, math.nan
    if numbers.numel() == 0:
        return math.nan, math.nan
    return numbers.min().item(), numbers.max().item()


def _range_end(value: float | Tensor) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise QuantizationError(f"a range ends at numbers, got {value!r}.") from error


def _plain(value: Tensor) -> Any:
    """Return a single number as Python's own."""
    return value.item() if value.dim() == 0 else value
