"""How a tensor is quantized: independent axes that combine freely."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any, ClassVar

import torch

from compression_manager.errors import QuantizationError, suggest
from compression_manager.plugin import option

GRANULARITIES = ("tensor", "channel", "group", "token")
MIN_BITS = 1
MAX_BITS = 32

# A float32 holds every integer of a range this wide; wider schemes are computed in float64.
MAX_FLOAT32_BITS = 24


@dataclass(frozen=True)
class QuantizationScheme:
    """An immutable description; it holds no ranges.

    What shares a scale: with granularity `tensor` all values; with `channel` those of one index
    of `axis`; with `group` runs of `group_size` consecutive values within one index of dimension
    0, of which the last may be shorter; with `token` those along the last dimension. One bit
    gives two levels, zero and one other: of a symmetric scheme it is positive, of an affine one
    it lies at the farther end of the range.

    Raises:
        QuantizationError: a value out of range or a combination without meaning.
    """

    # A recipe that changes a default's granularity must not keep what belongs to the old one.
    depends_on: ClassVar[dict[str, str]] = {"axis": "granularity", "group_size": "granularity"}

    bits: int = field(default=8, metadata=option(f"Bits per value, {MIN_BITS} to {MAX_BITS}."))
    symmetric: bool = field(
        default=True, metadata=option("Fixed zero point in the middle of a narrow range.")
    )
    granularity: str = field(
        default="tensor",
        metadata=option(
            "One scale per 'tensor', 'channel', 'group' (weights) or 'token' (inputs)."
        ),
    )
    axis: int | None = field(
        default=None,
        metadata=option("Channel axis, only with granularity 'channel'; 0 if left out."),
    )
    group_size: int | None = field(
        default=None,
        metadata=option("Values per scale, only with granularity 'group'; 32 if left out."),
    )
    dynamic: bool = field(
        default=False,
        metadata=option("Take the range from each input itself rather than from observers."),
    )
    signed: bool = field(
        default=True,
        kw_only=True,
        metadata=option("Integers around 0 rather than from 0 to 2^bits - 1."),
    )
    narrow_range: bool | None = field(
        default=None,
        kw_only=True,
        metadata=option("Whether to leave out the lowest integer; null: exactly when symmetric."),
    )

    def __post_init__(self) -> None:
        _check_int("bits", self.bits)
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise QuantizationError(
                f"a quantization scheme takes {MIN_BITS} to {MAX_BITS} bits, got bits={self.bits}."
            )
        for name in ("symmetric", "dynamic", "signed", "narrow_range"):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (name == "narrow_range" and value is None):
                raise QuantizationError(
                    f"{name} of a quantization scheme is true or false, "
                    f"got {getattr(self, name)!r}."
                )
        if self.granularity not in GRANULARITIES:
            raise QuantizationError(
                f"unknown granularity {self.granularity!r} of a quantization scheme; "
                f"{suggest(str(self.granularity), GRANULARITIES)}"
            )
        if self.narrow_range and self.bits == 1:
            raise QuantizationError(
                "narrow_range=True leaves a 1-bit scheme a single integer; leave it out."
            )
        self._settle("axis", "channel", default=0)
        self._settle("group_size", "group", default=32)
        if self.group_size is not None and self.group_size < 1:
            raise QuantizationError(
                f"group_size of a quantization scheme is at least 1, got {self.group_size}."
            )
        if self.granularity == "token" and not self.dynamic:
            raise QuantizationError(
                "granularity 'token' needs dynamic=True: tokens come and go, so that no range can "
                "be kept for each."
            )
        # torch.compile takes what is cached already, and cannot trace the first look.
        _ = self.quant_min, self.quant_max

    def _settle(self, name: str, granularity: str, *, default: int) -> None:
        """Give an option of one granularity its default, and refuse it with all others."""
        value = getattr(self, name)
        if self.granularity == granularity:
            if value is None:
                object.__setattr__(self, name, default)
            _check_int(name, getattr(self, name))
        elif value is not None:
            raise QuantizationError(
                f"{name}={value} has no meaning with granularity '{self.granularity}'; "
                f"leave it out or use granularity '{granularity}'."
            )

    @cached_property
    def quant_min(self) -> int:
        """Smallest integer; a narrow range leaves out the one value without a counterpart."""
        if self.symmetric and self.bits == 1:
            return 0
        lowest = -(1 << (self.bits - 1)) if self.signed else 0
        return lowest + int(self._is_narrow)

    @cached_property
    def quant_max(self) -> int:
        """Largest integer: 2^(bits - 1) - 1 if signed, else 2^bits - 1."""
        if self.symmetric and self.bits == 1:
            return 1
        return (1 << (self.bits - int(self.signed))) - 1

    @property
    def symmetric_zero_point(self) -> int:
        """The zero point of a symmetric scheme: the middle of its range (of one bit: 0)."""
        return 0 if self.signed or self.bits == 1 else 1 << (self.bits - 1)

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
        if self.group_size is not None:
            where = f" of {self.group_size}"
        usual = self.narrow_range in (None, self.symmetric)
        width = "" if usual else " narrow" if self.narrow_range else " full-range"
        when = " dynamic" if self.dynamic else ""
        return f"{sign}int{self.bits} {mode}{width}{when} per {self.granularity}{where}"

    @property
    def _is_narrow(self) -> bool:
        if self.narrow_range is None:
            return self.symmetric and self.bits > 1
        return self.narrow_range


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


def kernel_range(quant_min: int, quant_max: int) -> tuple[int, int] | None:
    """Return the range of the 8-bit type whose kernels compute with these integers, or None.

    Kernels clip to the whole of a type. A narrow range lacks its lowest integer, which numbers do
    not reach that are clipped before they are quantized.
    """
    for low, high in ((-128, 127), (0, 255)):
        if quant_min in (low, low + 1) and quant_max == high:
            return low, high
    return None


def _check_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise QuantizationError(f"{name} of a quantization scheme is an integer, got {value!r}.")
