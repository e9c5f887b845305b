"""How a tensor is quantized: independent axes that combine freely."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from compression_manager.errors import QuantizationError
from compression_manager.plugin import option

GRANULARITIES = ("tensor", "channel")


@dataclass(frozen=True)
class QuantizationScheme:
    """An immutable description; it holds no ranges.

    Raises:
        QuantizationError: a combination without meaning.
    """

    bits: int = field(default=8, metadata=option("Bits per value, 2 to 8."))
    symmetric: bool = field(
        default=True, metadata=option("Zero point is 0 and the range is narrow (-max to max).")
    )
    granularity: str = field(
        default="tensor", metadata=option("One scale per 'tensor' or per 'channel'.")
    )
    axis: int | None = field(
        default=None, metadata=option("Channel axis; only with granularity 'channel'.")
    )
    signed: bool = field(default=True, metadata=option("Signed integers, or 0 to 2^bits - 1."))
