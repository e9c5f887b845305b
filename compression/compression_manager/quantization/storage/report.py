"""What each Parameter of a model takes in a file, and what rounding did to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from compression_manager.quantization.storage.module import IntegerWeights
from compression_manager.quantization.storage.selection import find_parameters


@dataclass(frozen=True)
class WeightReport:
    """One Parameter.

    Attributes:
        name: qualified name; the first one if it is shared.
        detail: the scheme, or why it is in floating point.
        bytes_before: bytes as a float Parameter of the model's present dtype.
        bytes_after: bytes of the integers, scales, zero points and the note on the scheme.
        sqnr_db: signal-to-quantization-noise ratio of the values in decibels, infinite without
            noise; None in floating point, and for integers that were loaded.
    """

    name: str
    detail: str
    bytes_before: int
    bytes_after: int
    sqnr_db: float | None


@dataclass(frozen=True)
class StorageReport:
    """All Parameters, stored weights first; `print(report)` shows a table."""

    weights: tuple[WeightReport, ...]

    @property
    def bytes_before(self) -> int:
        """Bytes of all Parameters in floating point."""
        return sum(item.bytes_before for item in self.weights)

    @property
    def bytes_after(self) -> int:
        """Bytes of what is stored now."""
        return sum(item.bytes_after for item in self.weights)

    def __str__(self) -> str:
        rows = [("weight", "bytes", "after", "SQNR dB", "stored how, or why in floating point")]
        rows += [
            (
                item.name,
                f"{item.bytes_before:,}",
                f"{item.bytes_after:,}",
                "-" if item.sqnr_db is None else f"{item.sqnr_db:.1f}",
                item.detail,
            )
            for item in self.weights
        ]
        rows.append(("total", f"{self.bytes_before:,}", f"{self.bytes_after:,}", "", ""))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = []
        for name, *numbers, detail in rows:
            cells = [name.ljust(widths[0])]
            cells += [item.rjust(width) for item, width in zip(numbers, widths[1:], strict=True)]
            lines.append("  ".join([*cells, detail]).rstrip())
        return "\n".join(lines)


def describe_storage(model: nn.Module, skip: Sequence[str]) -> StorageReport:
    """Return the report on `model`; `skip` is that of its Quantizer."""
    weights = []
    for prefix, module in model.named_modules():
        if not isinstance(module, IntegerWeights):
            continue
        for name, item in module.stored_weights().items():
            # get_buffer would read the weight itself in floating point.
            tensors = [module._buffers[name + suffix] for suffix in item.format.suffixes()]
            weights.append(
                WeightReport(
                    f"{prefix}.{name}" if prefix else name,
                    str(item.format.scheme),
                    math.prod(item.format.shape) * item.dtype.itemsize,
                    sum(tensor.nbytes for tensor in tensors if tensor is not None),
                    item.sqnr_db,
                )
            )
    for found in find_parameters(model, skip):
        size = found.parameter.nbytes
        detail = found.reason or "not quantized yet"
        weights.append(WeightReport(found.names[0], detail, size, size, None))
    return StorageReport(tuple(weights))
