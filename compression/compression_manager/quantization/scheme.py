"""How a tensor is quantized: independent axes that combine freely."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

import torch

from compression_manager.errors import QuantizationError, suggest
from compression_manager.plugin import option

GRANULARITIES = ("tensor", "channel")
MIN_BITS = 2
MAX_BITS = 32

# A float32 holds every integer of a range this wide; wider schemes are computed in float64.
MAX_FLOAT32_BITS = 24


@dataclass(frozen=True)
class QuantizationScheme:
    """An immutable description; it holds no ranges.

    Raises:
        QuantizationError: a value out of range or a combination without meaning.
    """

    # A recipe that changes a default's granularity must not keep its axis.
    depends_on: ClassVar[dict[str, str]] = {"axis": "granularity"}

    bits: int = field(default=8, metadata=option(f"Bits per value, {MIN_BITS} to {MAX_BITS}."))
    symmetric: bool = field(
        default=True, metadata=option("Fixed zero point in the middle of a narrow range.")
    )
    granularity: str = field(
        default="tensor", metadata=option("One scale per 'tensor' or per 'channel'.")
    )
    axis: int | None = field(
        default=None,
        metadata=option("Channel axis, only with granularity 'channel'; 0 if left out."),
    )
    signed: bool = field(
        default=True,
        kw_only=True,
        metadata=option("Integers around 0 rather than from 0 to 2^bits - 1."),
    )

    def __post_init__(self) -> None:
        _check_int("bits", self.bits)
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise QuantizationError(
                f"a quantization scheme takes {MIN_BITS} to {MAX_BITS} bits, got bits={self.bits}."
            )
        for name in ("symmetric", "signed"):
            if not isinstance(getattr(self, name), bool):
                raise QuantizationError(
                    f"{name} of a quantization scheme is true or false, "
                    f"got {getattr(self, name)!r}."
                )
        if self.granularity not in GRANULARITIES:
            raise QuantizationError(
                f"unknown granularity {self.granularity!r} of a quantization scheme; "
                f"{suggest(str(self.granularity), GRANULARITIES)}"
            )
        self._settle_axis()

    def _settle_axis(self) -> None:
        if self.granularity == "channel":
            if self.axis is None:
                object.__setattr__(self, "axis", 0)
            _check_int("axis", self.axis)
        elif self.axis is not None:
            raise QuantizationError(
                f"axis={self.axis} has no meaning with granularity '{self.granularity}'; "
                "leave it out or use granularity 'channel'."
            )

    @property
    def quant_min(self) -> int:
        """Smallest integer. Symmetric ranges leave out the one value without a counterpart."""
        if self.signed:
            return -(1 << (self.bits - 1)) + int(self.symmetric)
        return int(self.symmetric)

    @property
    def quant_max(self) -> int:
        """Largest integer: 2^(bits - 1) - 1 if signed, else 2^bits - 1."""
        return (1 << (self.bits - int(self.signed))) - 1

    @property
    def symmetric_zero_point(self) -> int:
        """The zero point of a symmetric scheme: the middle of its range."""
        return 0 if self.signed else 1 << (self.bits - 1)

    @property
    def storage_dtype(self) -> torch.dtype:
        """The smallest of int8, uint8, int16, int32 and int64 that holds every value."""
        return storage_dtype(self.quant_min, self.quant_max)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as numbers, booleans, strings and None."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantizationScheme:
        """Return the scheme that `to_dict` described; fields left out take their defaults.

        Raises:
            QuantizationError: an unknown field or an invalid value.
        """
        valid = [item.name for item in fields(cls)]
        for name in data:
            if name not in valid:
                raise QuantizationError(
                    f"unknown field {name!r} of a quantization scheme; {suggest(str(name), valid)}"
                )
        return cls(**data)

    def __str__(self) -> str:
        sign = "" if self.signed else "u"
        mode = "symmetric" if self.symmetric else "affine"
        where = "" if self.axis is None else f" (axis {self.axis})"
        return f"{sign}int{self.bits} {mode} per {self.granularity}{where}"


def storage_dtype(quant_min: int, quant_max: int) -> torch.dtype:
    """Return the smallest integer dtype that holds `quant_min` to `quant_max`.

    Ranges without negative numbers up to 255 take uint8; torch's wider unsigned types lack
    most operations, so that longer unsigned ranges take the next signed type.
    """
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        limits = torch.iinfo(dtype)
        if limits.min <= quant_min and quant_max <= limits.max:
            return dtype
    raise QuantizationError(f"no integer type holds the range {quant_min} to {quant_max}.")


def _check_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise QuantizationError(f"{name} of a quantization scheme is an integer, got {value!r}.")
