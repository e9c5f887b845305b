"""A tensor laid out so that what shares a scale is one row."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from compression_manager.quantization.arithmetic.ranges import range_shape
from compression_manager.quantization.scheme import QuantizationScheme


class Rows(NamedTuple):
    """One row for each scale of a scheme.

    Attributes:
        values: (rows, length), float32.
        groups: how many rows belong to one index of dimension 0; 1 unless per group.
        padding: zeros at the end of every last group, which are no values.
    """

    values: Tensor
    groups: int = 1
    padding: int = 0

    def lengths(self) -> Tensor:
        """Return how many values each row has: int64, (rows,)."""
        rows, length = self.values.shape
        lengths = torch.full((rows,), length, dtype=torch.int64, device=self.values.device)
        lengths.view(-1, self.groups)[:, -1] -= self.padding
        return lengths

    def is_value(self) -> Tensor | None:
        """Return where there is no padding: bool, (rows, length); None without padding."""
        if not self.padding:
            return None
        position = torch.arange(self.values.shape[1], device=self.values.device)
        return position < self.lengths().unsqueeze(1)


def as_rows(input: Tensor, scheme: QuantizationScheme) -> Rows:
    """Return `input` (floating point, not empty) as rows, in the order of the flat scales."""
    input = input.detach().to(torch.float32)
    if scheme.granularity == "tensor":
        return Rows(input.reshape(1, -1))
    if scheme.granularity == "token":
        return Rows(input.reshape(-1, input.shape[-1]))
    if scheme.axis is not None:
        return Rows(input.movedim(scheme.axis, 0).reshape(input.shape[scheme.axis], -1))
    size = scheme.group_size or 1
    rows, groups = range_shape(scheme, input.shape)
    flat = input.reshape(rows, -1)
    padding = groups * size - flat.shape[1]
    return Rows(F.pad(flat, (0, padding)).reshape(rows * groups, size), groups, padding)
